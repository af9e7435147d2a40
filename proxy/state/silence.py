"""Whether a server answers at all: once it did not, it is asked by a ping alone until it does. Knows no commands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.concurrency import end
from proxy.state.redis_server import RedisServer

PING_S = 2.0
"""One ping waits this long: it is answered as soon as the server is, and few connections pile up in front of it."""
PROBE_INTERVAL_S = 0.25


class Silence:
    """Ends by itself. While it lasts nobody needs to wait for the server."""

    def __init__(self, server: RedisServer, before_its_end: Callable[[], Awaitable[None]]) -> None:
        self._server = server
        self._before_its_end = before_its_end
        self._since: float | None = None
        self._pinging: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float | None:
        """How long it has lasted; None: the server answers for all we know."""
        return None if self._since is None else time.monotonic() - self._since

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._pinging = asyncio.create_task(self._until_it_answers(), name="uniroute-ping")

    async def close(self) -> None:
        await end(self._pinging)

    async def _until_it_answers(self) -> None:
        pool = self._server.pool(
            socket_timeout=PING_S, socket_connect_timeout=PING_S, retry=Retry(NoBackoff(), 0), timeout=None
        )
        client = Redis.from_pool(pool)
        try:
            while True:
                if await _answers(client):
                    await self._before_its_end()
                    return
                await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            self._since = None
            await client.aclose()


async def _answers(client: Redis) -> bool:
    """Also with an error, or by refusing the connection: whoever asks then need not wait to be told."""
    try:
        async with asyncio.timeout(PING_S):
            reply: Any = client.ping()  # typed for the blocking client too: "Awaitable[bool] | bool"
            await reply
    except (NoAnswer, TimeoutError):
        return False
    except (RedisError, OSError):
        return True
    return True
