"""What a client is shown of a model's chunks: its bytes under our name for the model, and usage as it asked for."""

from __future__ import annotations

from typing import Any

from proxy.recording.meter import Meter
from proxy.storage.usage import usage_of
from proxy.upstream.payload import Payload, content_bytes, is_usage_chunk, says_no_usage, usage_chunk
from proxy.upstream.sse import event


class Shown:
    """One stream. What passes is counted by the meter."""

    def __init__(self, meter: Meter, *, include_usage: bool) -> None:
        self._meter = meter
        self._include_usage = include_usage
        self._usage: object = None
        self._shown = False
        self._last: dict[str, Any] = {}

    def block(self, chunks: list[Payload]) -> bytes:
        """Events, none of them cut; empty where nothing of this block is for the client."""
        meter, model = self._meter, self._meter.model
        pieces: list[bytes] = []
        size = 0
        for chunk in chunks:
            body = chunk.body
            meter.marks.see(body, model)
            size += content_bytes(body)
            shown: Payload | None = chunk
            if usage := usage_of(body):
                meter.received(size)  # the report is of all that came before, and with it
                size = 0
                shown = self._with_usage(chunk, usage)
            elif "usage" in body and not self._include_usage and says_no_usage(body):
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
        return event(usage_chunk({**self._last, "model": self._meter.model}, self._usage))

    def _with_usage(self, chunk: Payload, usage: object) -> Payload | None:
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
