"""A begun stream to the client: whole events, usage only if asked for, one of three endings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.errors import ClientGone, UpstreamFailure, describe
from proxy.recording.meter import Meter
from proxy.relay.chunks import content_bytes, is_usage_chunk, usage_chunk
from proxy.relay.disconnect import until_gone
from proxy.relay.forwarding import OpenStream
from proxy.relay.sse import DONE, KEEP_ALIVE, event

KEEP_ALIVE_S = 15.0
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}


class EventStream(Response):
    """Relays until the upstream ends, breaks, or the client leaves. Closes the upstream's connection in every case."""

    def __init__(self, stream: OpenStream, meter: Meter, headers: Mapping[str, str], *, include_usage: bool) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **headers})
        self._stream = stream
        self._meter = meter
        self._include_usage = include_usage
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_gone(receive, self._relay(send))
        except ClientGone:
            return
        finally:
            self._meter.finish("client_gone")  # only if the relay never ran
            await self._stream.aclose()

    async def _relay(self, send: Send) -> None:
        ending = "client_gone"
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            keeping = asyncio.create_task(self._keep_alive(send))
            try:
                async for chunk in self._chunks():
                    await self._send(send, event(chunk))
                await self._send(send, DONE)
                ending = "complete"
            except UpstreamFailure as failure:
                ending = "broken"
                self._meter.failed(failure)
                await self._send(send, event(_error_event(failure)))
            finally:
                keeping.cancel()
        finally:
            self._meter.finish(ending)
            await self._stream.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        """What the client is shown: our name for the model, and usage as it asked for."""
        usage: object = None
        shown = False
        last: dict[str, Any] = {}
        async for chunk in self._stream:
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
            if waited >= KEEP_ALIVE_S:
                await self._send(send, KEEP_ALIVE)
                waited = 0.0
            await asyncio.sleep(KEEP_ALIVE_S - waited)


def _error_event(failure: UpstreamFailure) -> Mapping[str, Any]:
    _, body, _ = describe(failure)
    return {"error": body["error"]}
