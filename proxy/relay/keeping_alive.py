"""Comments to a client between events while its upstream thinks, so that no proxy on the way gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from proxy.upstream.sse import KEEP_ALIVE


class KeepAlive:
    """Runs from now on. One timer, and a task only where there is something to say."""

    def __init__(self, send: Callable[[bytes], Awaitable[None]], every_s: float, *, sent: bool) -> None:
        """`sent`: whether anything was sent just now; else the first comment goes out at once."""
        self._send = send
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time() if sent else float("-inf")
        self._saying: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(every_s if sent else 0.0, self._tick)

    def sending(self) -> None:
        """Something goes out now."""
        self._sent_at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()
        if self._saying is not None:
            self._saying.cancel()

    def _tick(self) -> None:
        waited = self._loop.time() - self._sent_at
        if waited >= self._every_s:
            waited = 0.0
            self.sending()
            if self._saying is None or self._saying.done():  # else the client reads nothing
                self._saying = asyncio.create_task(self._say(), name="uniroute-keep-alive")
        self._timer = self._loop.call_later(self._every_s - waited, self._tick)

    async def _say(self) -> None:
        await self._send(KEEP_ALIVE)
