"""What httpx leaves open is closed in time: what was idle for too long, and what was cancelled at the wrong moment.

httpx looks for idle connections, and for those that their upstream closed, only when a request comes. And where a task
is cancelled while it opens or closes a connection, httpcore forgets that connection open, and its place in the pool.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from proxy.upstream.wire import EXCHANGE, Exchange

if TYPE_CHECKING:
    import httpx

GRACE_S = 1.0
"""In which a call that is over closes its connection by itself, as nearly all do."""


async def keep_tidy(pool: httpx.AsyncClient, every_s: float = 1.0, grace_s: float = GRACE_S) -> None:
    """For ever."""
    ways: Any = pool._transport
    while True:
        await asyncio.sleep(every_s)
        for layer in [transport._pool for transport in ways.open]:
            _let_go(layer, monotonic() - grace_s)
            for connection in _taken_out(layer):
                await connection.aclose()


def _let_go(layer: Any, before: float) -> None:
    """Requests of calls that were over by then have lost their connections."""
    for waiting in list(layer._requests):
        exchange: Exchange | None = waiting.request.extensions.get(EXCHANGE)
        if exchange is not None and exchange.over_at is not None and exchange.over_at < before:
            layer._requests.remove(waiting)


def _taken_out(layer: Any) -> list[Any]:
    """Connections to close: idle for too long, or in use, or about to be, by no request: no other will ever get one."""
    in_use = {id(waiting.connection) for waiting in layer._requests}
    kept, closing = list[Any](), list[Any]()
    for connection in layer.connections:
        resting = connection.is_idle() or connection.is_closed()
        gone = connection.has_expired() if resting else id(connection) not in in_use
        (closing if gone else kept).append(connection)
    layer._connections = kept
    return closing
