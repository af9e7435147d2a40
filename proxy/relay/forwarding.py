"""Asking models in order until one begins to answer. After the first content there is no way back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import UpstreamFailure
from proxy.recording.meter import Meter
from proxy.relay.chunks import has_content, is_empty_answer
from proxy.routing.request import ChatRequest
from proxy.state.snapshot import RoutingState
from proxy.trace import Trace
from proxy.upstream.client import Chunks, LitellmUpstream


@dataclass
class OpenStream:
    """A stream that has begun: what was read while waiting for content, and the rest."""

    held: list[dict[str, Any]]
    rest: Chunks
    ended: bool = False
    """Nothing is left to read, and it ended well."""

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for chunk in self.held:
            yield chunk
        async for chunk in self.rest:
            yield chunk

    async def aclose(self) -> None:
        close = getattr(self.rest, "aclose", None)
        if close is not None:
            await close()


@dataclass(frozen=True)
class Forwarder:
    """The models of one request's choice, asked one after the other."""

    upstream: LitellmUpstream
    state: RoutingState
    request: ChatRequest
    trace: Trace
    meter: Meter

    async def complete(self) -> dict[str, Any]:
        """The first whole answer. Raises the last UpstreamFailure."""
        for name, is_last in self._order():
            try:
                answer = await self.upstream.complete(self.state.models[name], self._body(name), self.trace.headers())
            except UpstreamFailure as failure:
                self._pass_over_or_raise(failure, is_last=is_last)
                continue
            self.meter.used(answer.get("usage"))
            self.meter.marks.answer(answer, name)
            if is_last or not is_empty_answer(answer):
                return {**answer, "model": name}
            self.meter.passed_over(None)
        raise UpstreamFailure("no model was asked")

    async def open_stream(self) -> OpenStream:
        """The first stream with content. Raises the last UpstreamFailure."""
        for name, is_last in self._order():
            try:
                stream = await self._begin(name)
            except UpstreamFailure as failure:
                self._pass_over_or_raise(failure, is_last=is_last)
                continue
            if is_last or not stream.ended or not is_empty_answer({"choices": _all_choices(stream.held)}):
                return stream
            self.meter.passed_over(None)
        raise UpstreamFailure("no model was asked")

    def _order(self) -> list[tuple[str, bool]]:
        order = [name for name in self.meter.choice.order if name in self.state.models]
        return [(name, place == len(order)) for place, name in enumerate(order, start=1)]

    def _body(self, name: str) -> Mapping[str, Any]:
        self.meter.asking(name)
        return self.request.body

    def _pass_over_or_raise(self, failure: UpstreamFailure, *, is_last: bool) -> None:
        if is_last or not failure.retryable:
            raise failure
        self.meter.passed_over(failure)

    async def _begin(self, name: str) -> OpenStream:
        """Reads up to the first content, or to the end if there is none."""
        chunks = await self.upstream.stream(self.state.models[name], self._body(name), self.trace.headers())
        stream = OpenStream([], chunks)
        try:
            async for chunk in chunks:
                stream.held.append(chunk)
                if chunk.get("usage"):
                    self.meter.used(chunk["usage"])
                if has_content(chunk):
                    self.meter.first_content()
                    return stream
        except BaseException:
            await stream.aclose()
            raise
        stream.ended = True
        return stream


def _all_choices(chunks: list[dict[str, Any]]) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk.get("choices") or ()]
