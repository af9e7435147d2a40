"""Asking models in order until one begins to answer. After the first content there is no way back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from proxy.errors import UpstreamFailure
from proxy.recording.meter import Meter
from proxy.relay.beginning import OpenStream, begin
from proxy.relay.chunks import is_empty_answer
from proxy.routing.request import ChatRequest
from proxy.settings import Settings
from proxy.state.records import ModelRecord
from proxy.state.snapshot import RoutingState
from proxy.timeouts import Timeouts, timeouts_for
from proxy.trace import Trace
from proxy.upstream.client import LitellmUpstream

Answer = TypeVar("Answer")
Ask = Callable[[ModelRecord, Timeouts], Awaitable[Answer]]


@dataclass(frozen=True)
class Forwarder:
    """The models of one request's choice, asked one after the other."""

    upstream: LitellmUpstream
    settings: Settings
    state: RoutingState
    request: ChatRequest
    trace: Trace
    meter: Meter

    async def complete(self) -> dict[str, Any]:
        """The first whole answer. Raises the last UpstreamFailure."""
        return await self._first(self._answer, is_empty_answer)

    async def open_stream(self) -> OpenStream:
        """The first stream with content. Raises the last UpstreamFailure."""
        return await self._first(self._begin, lambda stream: stream.is_empty)

    async def _first(self, ask: Ask[Answer], is_empty: Callable[[Answer], bool]) -> Answer:
        order = [name for name in self.meter.choice.order if name in self.state.models]
        for place, name in enumerate(order, start=1):
            is_last = place == len(order)
            try:
                answer = await self._asked(self.state.models[name], ask)
            except UpstreamFailure as failure:
                if is_last or not failure.retryable or self._late():
                    raise
                self.meter.passed_over(failure)
                continue
            if is_last or not is_empty(answer):
                return answer
            self.meter.passed_over(None)
        raise UpstreamFailure("no model was asked")

    async def _asked(self, record: ModelRecord, ask: Ask[Answer]) -> Answer:
        """One model, and once more where its connection died before it said anything."""
        try:
            return await self._in_time(record, ask)
        except UpstreamFailure as failure:
            if not failure.lost or self._late():
                raise
            self.meter.passed_over(failure)
            return await self._in_time(record, ask)

    async def _in_time(self, record: ModelRecord, ask: Ask[Answer]) -> Answer:
        timeouts = self._timeouts(record)
        left_s = self.meter.started + timeouts.total_s - monotonic()
        self.meter.asking(record.name)
        try:
            async with asyncio.timeout(min(timeouts.first_token_s, left_s)):
                return await ask(record, timeouts)
        except TimeoutError:
            stated = "first_token_timeout_s" if timeouts.first_token_s < left_s else "request_timeout_s"
            message = f"{record.name} gave no answer within {min(timeouts.first_token_s, left_s):.3g} s ({stated})"
            raise UpstreamFailure(message, timed_out=True) from None

    async def _answer(self, record: ModelRecord, timeouts: Timeouts) -> dict[str, Any]:
        answer = await self.upstream.complete(record, *self._sent(), connect_s=timeouts.connect_s)
        self.meter.used(answer.get("usage"))
        return {**answer, "model": record.name}

    async def _begin(self, record: ModelRecord, timeouts: Timeouts) -> OpenStream:
        chunks = await self.upstream.stream(record, *self._sent(), connect_s=timeouts.connect_s)
        return await begin(chunks, self.meter, timeouts.idle_s, self.settings.stream_timeout_s)

    def _sent(self) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        return self.request.body, self.trace.headers()

    def _timeouts(self, record: ModelRecord) -> Timeouts:
        return timeouts_for(self.settings, record.info, self.request.options.timeouts)

    def _late(self) -> bool:
        """Nobody is asked any more: the time for all attempts together is over."""
        stated = self.request.options.timeouts.total_s or self.settings.request_timeout_s
        return monotonic() - self.meter.started >= min(stated, self.settings.request_timeout_s)
