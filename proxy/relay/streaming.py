"""A stream to the client: whole events, usage only if asked for, one of four endings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.concurrency import cancel_until_done
from proxy.errors import (
    LAST_WORDS_S,
    SHUTTING_DOWN,
    ClientGone,
    ModelBusy,
    ProxyError,
    ShuttingDown,
    UpstreamFailure,
    describe,
)
from proxy.recording.meter import Meter
from proxy.relay.beginning import OpenStream
from proxy.relay.disconnect import cut_ending, until_gone
from proxy.relay.keeping_alive import KeepAlive
from proxy.relay.showing import Shown
from proxy.upstream.sse import DONE, event

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
Opening = asyncio.Task[OpenStream]


class EventStream(Response):
    """Relays until the upstream ends or breaks, the client leaves, or the server ends. Closes the upstream's connection
    in every case."""

    def __init__(self, opening: Opening, meter: Meter, *, keep_alive_s: float, include_usage: bool) -> None:
        """`opening` need not be done: the client then reads comments until some model begins to answer."""
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **meter.headers()})
        self._opening = opening
        self._meter = meter
        self._keep_alive_s = keep_alive_s
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(scope, receive, self._relay(send))
        except ClientGone:
            return
        finally:
            await self.close()

    async def close(self) -> None:
        """Where it was never begun the client had left before. Harmless when repeated."""
        self._meter.finish("client_gone")  # only if the relay never ran
        await close_opened(self._opening)

    async def _relay(self, send: Send) -> None:
        ending = "client_gone"
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            keeping = KeepAlive(partial(_send, send), self._keep_alive_s, sent=self._opening.done())
            try:
                await self._events(send, keeping)
                ending = "complete"
            except (UpstreamFailure, ModelBusy) as failure:
                ending = "broken" if self._meter.has_content else "failed"
                await _send(send, event(_error_event(failure)))
            except asyncio.CancelledError:
                ending = cut_ending()
                self._meter.finish(ending)
                if ending == "shutdown":
                    await _last_words(send)
                raise
            finally:
                keeping.stop()
        finally:
            self._meter.finish(ending)  # before the client reads the end: what was answered is on record
            await close_opened(self._opening)
        await self._meter.settled()  # a client that asks again at once is judged by what this answer cost
        await send({"type": "http.response.body", "body": DONE if ending == "complete" else b"", "more_body": False})

    async def _events(self, send: Send, keeping: KeepAlive) -> None:
        stream = await self._opening
        shown = Shown(self._meter, include_usage=self._include_usage)
        async for block in stream:
            if data := shown.block(block):
                keeping.sending()
                await _send(send, data)
        if data := shown.end():
            await _send(send, data)


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _last_words(send: Send) -> None:
    """Tell that the server ends; not for long, for the client may not be reading."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await _send(send, event(_error_event(ShuttingDown(SHUTTING_DOWN))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def close_opened(opening: Opening) -> None:
    """Ends the asking, or closes what was opened, even if we are cancelled meanwhile. Harmless when repeated."""
    try:
        await cancel_until_done((opening,))
    finally:
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().aclose()


def _error_event(failure: ProxyError) -> Mapping[str, Any]:
    _, body, _ = describe(failure)
    return {"error": body["error"]}
