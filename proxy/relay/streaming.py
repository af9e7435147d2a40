"""A stream to the client: whole events, usage only if asked for, one of three endings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.errors import ClientGone, ModelBusy, ProxyError, UpstreamFailure, describe
from proxy.recording.meter import Meter
from proxy.relay.beginning import OpenStream
from proxy.relay.chunks import content_bytes, is_usage_chunk, usage_chunk
from proxy.relay.disconnect import until_gone
from proxy.relay.sse import DONE, KEEP_ALIVE, event
from proxy.tasks import cancel_until_done

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
Opening = asyncio.Task[OpenStream]


class EventStream(Response):
    """Relays until the upstream ends, breaks, or the client leaves. Closes the upstream's connection in every case."""

    def __init__(self, opening: Opening, meter: Meter, *, keep_alive_s: float, include_usage: bool) -> None:
        """`opening` need not be done: the client then reads comments until some model begins to answer."""
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **meter.headers()})
        self._opening = opening
        self._meter = meter
        self._keep_alive_s = keep_alive_s
        self._include_usage = include_usage
        self._sent_at = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_gone(receive, self._relay(send))
        except ClientGone:
            return
        finally:
            self._meter.finish("client_gone")  # only if the relay never ran
            await close_opened(self._opening)

    async def _relay(self, send: Send) -> None:
        ending = "client_gone"
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if self._opening.done():
                self._sent_at = time.monotonic()
            keeping = asyncio.create_task(self._keep_alive(send))
            try:
                async for chunk in self._chunks(await self._opening):
                    await self._send(send, event(chunk))
                ending = "complete"
            except (UpstreamFailure, ModelBusy) as failure:
                ending = "broken" if self._meter.has_content else "failed"
                await self._send(send, event(_error_event(failure)))
            finally:
                keeping.cancel()
        finally:
            self._meter.finish(ending)  # before the client reads the end: what was answered is on record
            await close_opened(self._opening)
        await send({"type": "http.response.body", "body": DONE if ending == "complete" else b"", "more_body": False})

    async def _chunks(self, stream: OpenStream) -> AsyncIterator[dict[str, Any]]:
        """What the client is shown: our name for the model, and usage as it asked for."""
        usage: object = None
        shown = False
        last: dict[str, Any] = {}
        async for chunk in stream:
            self._meter.marks.see(chunk, self._meter.model)
            self._meter.received(content_bytes(chunk))
            last = {**chunk, "model": self._meter.model}
            if chunk.get("usage"):
                usage = chunk["usage"]
                self._meter.used(usage)
                shown = shown or (self._include_usage and is_usage_chunk(chunk))
                if not self._include_usage:
                    if is_usage_chunk(chunk):
                        continue
                    del last["usage"]
            yield last
        if self._include_usage and usage is not None and not shown:
            yield usage_chunk(last, usage)

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Comments between events while the upstream thinks, so that no proxy on the way gives up."""
        while True:
            waited = time.monotonic() - self._sent_at
            if waited >= self._keep_alive_s:
                await self._send(send, KEEP_ALIVE)
                waited = 0.0
            await asyncio.sleep(self._keep_alive_s - waited)


async def close_opened(opening: Opening) -> None:
    """Ends the asking, or closes what was opened. Harmless when repeated."""
    await cancel_until_done((opening,))
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().aclose()


def _error_event(failure: ProxyError) -> Mapping[str, Any]:
    _, body, _ = describe(failure)
    return {"error": body["error"]}
