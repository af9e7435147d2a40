from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, TypeVar

from proxy.errors import ModelAtCapacity, UpstreamError
from proxy.routing.chat_request import ChatRequest
from proxy.routing.sizes import limited
from proxy.server.request_log import RequestRecord
from proxy.server.requests import RequestIds, instance_id
from proxy.settings.schema import NO_OVERRIDES, Settings, Timeouts, timeouts_for, total_s
from proxy.storage.models import ModelRecord
from proxy.storage.snapshot import RoutingSnapshot
from proxy.storage.usage import usage_of
from proxy.upstream.chunk_reader import is_finished
from proxy.upstream.client import Blocks, UpstreamClient
from proxy.upstream.concurrency_limit import ConcurrencyLimiter, ConcurrencyLimits, Slot
from proxy.upstream.health import Attempt, HealthRegistry
from proxy.upstream.payload import JSONPayload, content_bytes, has_content, is_empty_completion
from proxy.upstream.sse import encode_json
from router_core.pool import NO_LIMIT

T = TypeVar("T")


class IdleTimeout:
    """Ends waits that take too long, as `asyncio.timeout` does for one. To be closed."""

    def __init__(self, idle_s: float, until: float) -> None:
        """`until`: monotonic seconds after which every wait is too long."""
        self._idle_s = idle_s
        self._until = until
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._since = 0.0
        self._struck = False

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises TimeoutError where it is not there in time."""
        task = asyncio.current_task()
        assert task is not None  # a coroutine runs in one
        before = task.cancelling()
        self._waiting, self._since = task, monotonic()
        if self._timer is None:
            self._look()
        try:
            return await work
        except asyncio.CancelledError:
            if self._struck and task.cancelling() - 1 <= before:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None
            if self._struck:
                task.uncancel()
                self._struck = False

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether a wait takes too long by now, and when it would."""
        self._timer = None
        if self._waiting is None or self._struck:
            return  # the next wait looks again
        left_s = min(self._since + self._idle_s, self._until) - monotonic()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._struck = True
        self._waiting.cancel()


class Turn:
    """To be closed, however it ended; closing without an outcome says nothing of the model."""

    def __init__(self, meter: RequestRecord, attempt: Attempt, slot: Slot, *, hurried: bool) -> None:
        """`hurried`: the caller's own time limit is shorter than the model's, so that missing it is no fault."""
        self._meter = meter
        self._attempt = attempt
        self._slot = slot
        self._hurried = hurried

    def begun(self) -> None:
        """Its first content has come."""
        self._meter.first_content()
        self._attempt.answering()

    def answered(self) -> None:
        self._attempt.succeeded()
        self.close()

    def failed(self, failure: UpstreamError) -> None:
        self._meter.failed(failure)
        if not (failure.timed_out and self._hurried):
            self._attempt.failed(failure)
        self.close()

    def close(self) -> None:
        self._attempt.abandoned()
        self._slot.release()


MAX_BUFFERED_CHUNKS = 1000
"""Chunks without content that are kept until the first with some, to be shown before it; more of them are dropped, and
time alone is the limit. As many again are kept that end a choice or report usage."""

MAX_HELD_BYTES = 2**20
"""Of all of them."""


@dataclass
class UpstreamStream:
    """A stream that has begun: what was read while waiting for content, and the rest."""

    rest: Blocks
    turn: Turn
    idle_s: float
    """How long the rest may be silent."""
    until: float
    """Monotonic seconds at which it is given up, however lively it is."""
    held: list[JSONPayload] = field(default_factory=list)
    ended: bool = False
    """Nothing is left to read, and it ended well."""

    @property
    def is_empty(self) -> bool:
        """It ended without a word, and nothing kept it from speaking."""
        return self.ended and is_empty_completion(
            {"choices": [choice for chunk in self.held for choice in chunk.body.get("choices") or ()]}
        )

    async def __aiter__(self) -> AsyncIterator[list[JSONPayload]]:
        """Blocks of chunks. Raises UpstreamFailure where it breaks, stops, or goes on for too long."""
        held, self.held = self.held, []
        if held:
            yield held
        silence = IdleTimeout(self.idle_s, self.until)
        try:
            while not self.ended:
                yield await silence.during(anext(self.rest))
        except StopAsyncIteration:
            self.turn.answered()
        except TimeoutError:
            self.turn.failed(failure := self._too_slow())
            raise failure from None
        except UpstreamError as failure:
            self.turn.failed(failure)
            raise
        finally:
            silence.close()

    def _too_slow(self) -> UpstreamError:
        reason = f"was silent for {self.idle_s:g} s (idle_timeout_s)"
        if monotonic() >= self.until:
            reason = "took longer than stream_timeout_s"
        return UpstreamError(f"the model's stream {reason}", timed_out=True)

    async def aclose(self) -> None:
        self.turn.close()
        await self.close_rest()

    async def close_rest(self) -> None:
        """The upstream's connection alone: how the turn ended is told by whoever knows."""
        close = getattr(self.rest, "aclose", None)
        if close is not None:
            await close()


async def read_until_content(stream: UpstreamStream, meter: RequestRecord) -> UpstreamStream:
    """Reads up to the first content, or to the end if there is none. Where that fails it closes the connection, and
    leaves the turn to the caller: a limit that cuts this off is known out there, as a failure of the model."""
    held = _Held()
    try:
        async for block in stream.rest:
            start = _first_content(block, meter)
            held.add(block[:start])
            if start < len(block):
                stream.held = held.chunks + block[start:]
                stream.turn.begun()
                return stream
    except BaseException:
        await stream.close_rest()
        raise
    stream.held, stream.ended = held.chunks, True
    stream.turn.answered()
    return stream


class _Held:
    """Chunks without content, as many as can be kept."""

    def __init__(self) -> None:
        self.chunks: list[JSONPayload] = []
        self._bytes = 0

    def add(self, block: list[JSONPayload]) -> None:
        for chunk in block:
            most = 2 * MAX_BUFFERED_CHUNKS if usage_of(chunk.body) or is_finished(chunk.body) else MAX_BUFFERED_CHUNKS
            if len(self.chunks) >= most or self._bytes >= MAX_HELD_BYTES:
                continue
            self._bytes += len(chunk.raw if chunk.raw is not None else encode_json(chunk.body))
            if self._bytes < MAX_HELD_BYTES:
                self.chunks.append(chunk)


def _first_content(block: list[JSONPayload], meter: RequestRecord) -> int:
    """Its place; that behind the last where none has any."""
    for chunk in block:
        if usage := usage_of(chunk.body):
            meter.used(usage)
    return next((place for place, chunk in enumerate(block) if has_content(chunk.body)), len(block))


Answer = TypeVar("Answer")

Call = Callable[[ModelRecord, Timeouts, Turn], Awaitable[Answer]]


class CircuitOpen(Exception):
    """The model may not be asked now. Never told to anybody: another is asked, or this one after all."""


@dataclass(frozen=True)
class Outlets:
    """What it takes to ask models."""

    upstream: UpstreamClient
    health: HealthRegistry
    capacities: ConcurrencyLimiter
    settings: Settings


@dataclass(frozen=True)
class Attempts:
    """The models of one request's choice, asked one after the other."""

    outlets: Outlets
    state: RoutingSnapshot
    request: ChatRequest
    trace: RequestIds
    meter: RequestRecord
    overflowed: list[str] = field(default_factory=list)
    """Models that the prompt was found too long for."""

    async def complete(self) -> JSONPayload:
        """The first whole answer. Raises the last UpstreamFailure, or ModelBusy where all are busy."""
        return await self.run(self._answer, lambda answer: is_empty_completion(answer.body))

    async def open_stream(self) -> UpstreamStream:
        """The first stream with content. Raises as `complete`."""
        return await self.run(self._begin, lambda stream: stream.is_empty)

    async def run(self, ask: Call[Answer], is_empty: Callable[[Answer], bool]) -> Answer:
        """In rank. Those that rest are asked only where nobody else could be, and then the one that recovers first."""
        outcome: Answer | UpstreamError | None = None
        busy: list[ModelAtCapacity] = []
        rested: list[str] = []
        asked = 0
        for name in self._candidates():
            try:
                outcome = await self._with_reconnect(name, ask)
            except CircuitOpen:
                rested.append(name)
            except ModelAtCapacity as full:
                busy.append(full)
            except UpstreamError as failure:
                outcome, asked = failure, asked + 1
                if not failure.retryable:
                    break
            else:
                asked += 1
                if not is_empty(outcome):
                    return outcome
                self.meter.empty()
            if asked == self.meter.choice.attempts or self._remaining_s() <= 0:
                break
        if outcome is None and rested and not busy:
            return await self._with_reconnect(self._first_to_recover(rested), ask, resting_too=True)
        return _result(outcome, busy)

    def _candidates(self) -> Iterator[str]:
        """Those with more room alone, once the prompt was found too long for a model whose window is known."""
        for name in self.meter.choice.order:
            if name in self.state.models and not (self.overflowed and self._is_too_small(name)):
                yield name

    def _is_too_small(self, name: str) -> bool:
        window = self._window(name)
        return any(window <= self._window(other) < NO_LIMIT for other in self.overflowed)

    def _window(self, name: str) -> int:
        """Tokens that a prompt for this model may have; NO_LIMIT: as many as it says, for all that is known."""
        pool = self.state.pool
        place = pool.index.get(name)
        return NO_LIMIT if place is None else int(pool.max_input_tokens[place])

    async def _with_reconnect(self, name: str, ask: Call[Answer], *, resting_too: bool = False) -> Answer:
        """One model, and once more where its connection died before it said anything."""
        try:
            return await self._attempt(name, ask, resting_too=resting_too)
        except UpstreamError as failure:
            if not failure.lost or self._remaining_s() <= 0:
                raise
        return await self._attempt(name, ask, resting_too=True)

    async def _attempt(self, name: str, ask: Call[Answer], *, resting_too: bool) -> Answer:
        outlets, record = self.outlets, self.state.models[name]
        if not resting_too and name in outlets.health.resting():
            raise CircuitOpen(name)
        waits_s = max(0.0, min(outlets.settings.queue_wait_s, self._remaining_s()))
        slot = await outlets.capacities.slot(name, ConcurrencyLimits.of(record.info, waits_s))
        if not resting_too and name in outlets.health.resting():  # since then, or somebody else is the probe
            slot.release()
            raise CircuitOpen(name)
        if self._remaining_s() <= 0:  # the wait for a place took it: no fault of this model
            slot.release()
            raise UpstreamError("no model was asked in time (request_timeout_s)", timed_out=True, retryable=False)
        usual, stated = timeouts_for(outlets.settings, record.info), self.request.options.timeouts
        timeouts = usual if stated is NO_OVERRIDES else timeouts_for(outlets.settings, record.info, stated)
        turn = Turn(self.meter, outlets.health.begin(name), slot, hurried=timeouts.stricter_than(usual))
        self.meter.asking(name)
        try:
            return await self._in_time(record, ask, timeouts, turn)
        except UpstreamError as failure:
            turn.failed(failure)
            if failure.overflow:
                self.overflowed.append(name)
            raise
        except BaseException:
            turn.close()
            raise

    async def _in_time(self, record: ModelRecord, ask: Call[Answer], timeouts: Timeouts, turn: Turn) -> Answer:
        left_s = self._remaining_s()
        try:
            async with asyncio.timeout(min(timeouts.first_token_s, left_s)):
                return await ask(record, timeouts, turn)
        except TimeoutError:
            stated = "first_token_timeout_s" if timeouts.first_token_s < left_s else "request_timeout_s"
            message = f"{record.name} gave no answer within {min(timeouts.first_token_s, left_s):.3g} s ({stated})"
            raise UpstreamError(message, timed_out=True) from None

    async def _answer(self, record: ModelRecord, timeouts: Timeouts, turn: Turn) -> JSONPayload:
        body, raw = self._sent_to(record.name)
        answer = await self.outlets.upstream.complete(
            record, body, self._upstream_headers, raw=raw, connect_s=timeouts.connect_s
        )
        turn.answered()
        self.meter.received(content_bytes(answer.body))
        self.meter.used(answer.body)
        self.meter.marks.answer(answer.body, record.name)
        return answer

    async def _begin(self, record: ModelRecord, timeouts: Timeouts, turn: Turn) -> UpstreamStream:
        body, raw = self._sent_to(record.name)
        blocks = await self.outlets.upstream.stream(
            record, body, self._upstream_headers, raw=raw, connect_s=timeouts.connect_s
        )
        stream = UpstreamStream(blocks, turn, timeouts.idle_s, monotonic() + self.outlets.settings.stream_timeout_s)
        return await read_until_content(stream, self.meter)

    def _sent_to(self, name: str) -> tuple[Mapping[str, Any], bytes | None]:
        """The caller's body and its bytes; where this model is told a smaller limit, another body and no bytes."""
        request, choice = self.request, self.meter.choice
        stated = choice.needs.max_output_tokens
        told = None if stated is None else choice.told_limit(self.state.pool, name)
        if told is None or told == stated:
            return request.body, request.raw
        self.meter.clamped = told
        return limited(request.body, told), None

    def _first_to_recover(self, rested: list[str]) -> str:
        resting = self.outlets.health.resting()
        return min(rested, key=lambda name: resting.get(name, 0.0))

    def _remaining_s(self) -> float:
        """Of the time for all attempts together. Without any, nobody is asked any more."""
        return self._until - monotonic()

    @cached_property
    def _upstream_headers(self) -> dict[str, str]:
        return self.trace.upstream_headers(instance_id(str(self.outlets.settings.data_dir)))

    @cached_property
    def _until(self) -> float:
        return self.meter.started + total_s(self.outlets.settings, self.request.options.timeouts)


def _result(outcome: Answer | UpstreamError | None, busy: list[ModelAtCapacity]) -> Answer:
    """What came of the last model that was asked; where none could be, when the first of them has a place."""
    if isinstance(outcome, UpstreamError):
        raise outcome
    if outcome is not None:
        return outcome
    if busy:
        raise min(busy, key=lambda full: full.retry_after_s)
    raise UpstreamError("no model was asked")
