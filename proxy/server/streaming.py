from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.concurrency import cancel_until_done
from proxy.errors import (
    LAST_WORDS_S,
    SHUTTING_DOWN,
    ClientDisconnected,
    ModelAtCapacity,
    ProxyError,
    ShuttingDown,
    UpstreamError,
)
from proxy.server.attempts import UpstreamStream
from proxy.server.request_log import RequestRecord
from proxy.server.requests import cancel_on_disconnect, cut_ending
from proxy.server.responses import render_error
from proxy.storage.usage import usage_of
from proxy.upstream.payload import JSONPayload, content_bytes, is_null_usage_chunk, is_usage_chunk, usage_chunk
from proxy.upstream.sse import DONE, KEEP_ALIVE, format_event


class SSEKeepAlive:
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


class StreamRewriter:
    """One stream. What passes is counted by the meter."""

    def __init__(self, meter: RequestRecord, *, include_usage: bool) -> None:
        self._meter = meter
        self._include_usage = include_usage
        self._usage: object = None
        self._shown = False
        self._last: dict[str, Any] = {}

    def block(self, chunks: list[JSONPayload]) -> bytes:
        """Events, none of them cut; empty where nothing of this block is for the client."""
        meter, model = self._meter, self._meter.model
        pieces: list[bytes] = []
        size = 0
        for chunk in chunks:
            body = chunk.body
            meter.marks.see(body, model)
            size += content_bytes(body)
            shown: JSONPayload | None = chunk
            if usage := usage_of(body):
                meter.received(size)  # the report is of all that came before, and with it
                size = 0
                shown = self._with_usage(chunk, usage)
            elif "usage" in body and not self._include_usage and is_null_usage_chunk(body):
                shown = None
            if shown is not None:
                pieces += (b"data: ", shown.named(model), b"\n\n")
        if chunks:
            self._last = chunks[-1].body
        meter.received(size)
        return b"".join(pieces)

    def end(self) -> bytes:
        """The usage chunk that was asked for, where the upstream put its usage elsewhere."""
        if not self._include_usage or self._usage is None or self._shown:
            return b""
        return format_event(usage_chunk({**self._last, "model": self._meter.model}, self._usage))

    def _with_usage(self, chunk: JSONPayload, usage: object) -> JSONPayload | None:
        self._usage = usage
        self._meter.used(usage)
        if not chunk.body.get("usage"):
            return chunk
        only_usage = is_usage_chunk(chunk.body)
        if self._include_usage:
            self._shown = self._shown or only_usage
            return chunk
        if only_usage:
            return None
        return chunk.without("usage")


HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}

PendingStream = asyncio.Task[UpstreamStream]


class CompletionStream(Response):
    """Relays until the upstream ends or breaks, the client leaves, or the server ends. Closes the upstream's connection
    in every case."""

    def __init__(
        self, opening: PendingStream, meter: RequestRecord, *, keep_alive_s: float, include_usage: bool
    ) -> None:
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
            await cancel_on_disconnect(scope, receive, self._relay(send))
        except ClientDisconnected:
            return
        finally:
            await self.close()

    async def close(self) -> None:
        """Where it was never begun the client had left before. Harmless when repeated."""
        self._meter.finish("client_gone")  # only if the relay never ran
        await cancel_or_close(self._opening)

    async def _relay(self, send: Send) -> None:
        ending = "client_gone"
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            keeping = SSEKeepAlive(partial(_send, send), self._keep_alive_s, sent=self._opening.done())
            try:
                await self._events(send, keeping)
                ending = "complete"
            except (UpstreamError, ModelAtCapacity) as failure:
                ending = "broken" if self._meter.has_content else "failed"
                await _send(send, format_event(_error_event(failure)))
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
            await cancel_or_close(self._opening)
        await self._meter.settled()  # a client that asks again at once is judged by what this answer cost
        await send({"type": "http.response.body", "body": DONE if ending == "complete" else b"", "more_body": False})

    async def _events(self, send: Send, keeping: SSEKeepAlive) -> None:
        stream = await self._opening
        shown = StreamRewriter(self._meter, include_usage=self._include_usage)
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
            await _send(send, format_event(_error_event(ShuttingDown(SHUTTING_DOWN))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def cancel_or_close(opening: PendingStream) -> None:
    """Ends the asking, or closes what was opened, even if we are cancelled meanwhile. Harmless when repeated."""
    try:
        await cancel_until_done((opening,))
    finally:
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().aclose()


def _error_event(failure: ProxyError) -> Mapping[str, Any]:
    _, body, _ = render_error(failure)
    return {"error": body["error"]}
