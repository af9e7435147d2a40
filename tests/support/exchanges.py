"""Serve one function at the paths of models, by our own protocol over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import uvicorn

from proxy.server.exchange import Exchange
from proxy.server.protocol import LimitedHTTPProtocol
from tests.support.waiting import until

Serve = Callable[[Exchange], Awaitable[None]]

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"


class Recording(LimitedHTTPProtocol):
    write_timeout_s = 0.3
    header_timeout_s = 5.0
    opened: ClassVar[list[Recording]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened.append(self)


class App:
    """An app whose model endpoints are one function."""

    def __init__(self, serve: Serve, app: Any) -> None:
        self.serve_exchange = serve
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


async def no_content(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def served(serve: Serve, app: Any = None) -> AsyncIterator[Any]:
    """Serve, and yield the address.

    Args:
        app: serves what is not an exchange; None: it is answered with 204.
    """
    Recording.opened.clear()
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        App(serve, app or no_content), http=Recording, lifespan="off", log_config=None, ws="none", proxy_headers=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([bound]))
    await until(lambda: server.started)
    try:
        yield bound.getsockname()
        await until(lambda: not server.server_state.tasks)
    finally:
        for task in server.server_state.tasks:  # what a failed test has left would hold up the end
            task.cancel()
        server.should_exit = True
        await serving
        bound.close()


def framed(body: bytes, *, chunked: bool = False) -> bytes:
    if chunked:
        parts = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return POST + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return POST + b"content-length: %d\r\n\r\n" % len(body) + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the status and the body of an answer of stated length."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert head.startswith(b"HTTP/1.1 "), head
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head.split(b" ")[1], await asyncio.wait_for(reader.readexactly(length), 60)
