from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from time import monotonic
from typing import Any, TypeVar

from proxy.concurrency import DeadlineWheel, SilenceTimer
from proxy.errors import ModelAtCapacity, UpstreamError
from proxy.json_text import encode_json
from proxy.routing.requirements import with_effort, without_effort
from proxy.routing.token_limits import smaller_limit, with_limit
from proxy.server.api.adaptation import adapt
from proxy.server.dependencies import ModelPlan, RequestContext
from proxy.server.request_log import RequestRecord
from proxy.settings.schema import NO_OVERRIDES, Timeouts, timeouts_for, total_timeout_s
from proxy.storage.records import ModelRecord
from proxy.storage.usage import usage_of
from proxy.upstream.chunk_reader import ChunkSource, is_finished
from proxy.upstream.client import NativeRequest
from proxy.upstream.health import Attempt
from proxy.upstream.native_api import native_apis, shares_provider
from proxy.upstream.payload import JSONPayload, has_content, is_empty_completion
from proxy.upstream.text_frame import TextRun
from router_core.pool import NO_LIMIT

Answer = TypeVar("Answer")

Call = Callable[[ModelRecord, Timeouts, Attempt], Awaitable[Answer]]


class CircuitOpen(Exception):
    """The circuit of the model is open: other models are asked first."""


class AttemptRunner:
    """Ask the models of one selection, one after the other, until one answers."""

    def __init__(self, ctx: RequestContext, record: RequestRecord) -> None:
        settings, overrides = ctx.app.settings, ctx.request.options.timeouts
        timeout_s = settings.request_timeout_s if overrides is NO_OVERRIDES else total_timeout_s(settings, overrides)
        self._ctx = ctx
        self._record = record
        self._deadline = ctx.received_at + timeout_s
        self._headers = ctx.ids.upstream_headers(ctx.app.instance)
        # Models that rejected the prompt as too long.
        self._rejected_as_too_long: list[str] = []
        # Models that have failed, whatever effort they were asked at.
        self._failed: set[str] = set()

    def complete(self) -> Coroutine[Any, Any, JSONPayload]:
        """Return the first answer that is not empty, or else the last one, which may be empty.

        Raises:
            UpstreamError: the last model that was asked has failed.
            ModelAtCapacity: no model had a free slot.
        """
        return self.run(self._ask_whole, lambda answer: is_empty_completion(answer.body))

    def open_stream(self) -> Coroutine[Any, Any, AttemptStream]:
        """Return the first stream with content. Raises as `complete` does."""
        return self.run(self._ask_stream, lambda stream: stream.is_empty)

    async def run(self, call: Call[Answer], is_empty: Callable[[Answer], bool]) -> Answer:
        """Ask the candidates in their order. If every circuit is open, ask the model that recovers first."""
        outcome: Answer | UpstreamError | None = None
        at_capacity: list[ModelAtCapacity] = []
        cooling_down: list[str] = []
        models_asked = 0
        for name in self._candidates():
            try:
                outcome = await self._attempt(name, call)
            except CircuitOpen:
                cooling_down.append(name)
            except ModelAtCapacity as full:
                at_capacity.append(full)
            except UpstreamError as failure:
                outcome, models_asked = failure, models_asked + 1
                if not failure.retryable:
                    break
            else:
                models_asked += 1
                if not is_empty(outcome):
                    return outcome
                self._record.mark_empty()
            if models_asked == self._record.selection.max_attempts or self._remaining_s() <= 0:
                break
        if outcome is None and cooling_down and not at_capacity:
            return await self._attempt(self._first_to_recover(cooling_down), call, even_if_open=True)
        return _result(outcome, at_capacity)

    def _candidates(self) -> Iterator[str]:
        """Yield the candidates that may still be asked, and whose context window may be large enough.

        One that was paused since the request was selected is asked only if it is the first. Another effort of a model
        that has failed would fail as well.
        """
        for place, name in enumerate(self._record.selection.candidates):
            if place and (name in self._ctx.app.snapshots.current.paused or self._is_sibling_of_failed(name)):
                continue
            if name in self._ctx.snapshot.models and not (self._rejected_as_too_long and self._is_too_small(name)):
                yield name

    def _is_sibling_of_failed(self, name: str) -> bool:
        record = self._ctx.snapshot.models.get(name)
        return record is not None and record.base is not None and record.base in self._failed

    def _is_too_small(self, name: str) -> bool:
        """Whether a model with a context window at least as large has rejected the prompt as too long."""
        window = self._context_window(name)
        # A model whose window is not known tells nothing of the others.
        return any(window <= self._context_window(other) < NO_LIMIT for other in self._rejected_as_too_long)

    def _context_window(self, name: str) -> int:
        """Return how many tokens of a prompt the model accepts; NO_LIMIT if that is not known."""
        pool = self._ctx.snapshot.pool
        row = pool.index.get(name)
        return NO_LIMIT if row is None else int(pool.max_input_tokens[row])

    async def _attempt(
        self, name: str, call: Call[Answer], *, even_if_open: bool = False, reconnects: bool = True
    ) -> Answer:
        """Ask a model within its time limits, and record a failure.

        `first_token_timeout_s` limits a whole answer too, which comes at once.

        Args:
            reconnects: ask once more if the connection is lost before any response.
        """
        app, model = self._ctx.app, self._ctx.snapshot.models[name]
        plan = app.plan_of(model)
        attempt = self._start_at_once(plan, even_if_open=even_if_open)
        if attempt is None:
            attempt = await self._wait_and_start(plan, even_if_open=even_if_open)
        timeouts, overrides = plan.timeouts, self._ctx.request.options.timeouts
        if overrides is not NO_OVERRIDES:
            timeouts = timeouts_for(app.settings, model.info, overrides)
            attempt.is_cut_short = timeouts.stricter_than(plan.timeouts)
        remaining_s = self._remaining_s()
        if remaining_s <= 0:  # the wait for a slot took it, which is no fault of this model
            attempt.abandoned()
            raise UpstreamError("no model was asked in time (request_timeout_s)", timed_out=True, retryable=False)
        if remaining_s < timeouts.first_token_s and self._record.has_asked:
            attempt.is_cut_short = True  # the attempts before took the time
        self._record.start_attempt(name)
        if self._record.trace is not None:
            self._headers |= self._record.trace.headers()
        timeout_s = min(timeouts.first_token_s, remaining_s)
        try:
            with app.deadlines.within(timeout_s):
                return await call(model, timeouts, attempt)
        except TimeoutError:
            setting = "first_token_timeout_s" if timeouts.first_token_s < remaining_s else "request_timeout_s"
            message = f"{name} gave no answer within {timeout_s:.3g} s ({setting})"
            raise self._fail(attempt, UpstreamError(message, timed_out=True)) from None
        except UpstreamError as failure:
            self._fail(attempt, failure)
            if not (reconnects and failure.connection_lost and self._remaining_s() > 0):
                raise
        except BaseException:
            attempt.abandoned()
            raise
        # The lost connection may just have opened the circuit; the second try is made all the same.
        return await self._attempt(name, call, even_if_open=True, reconnects=False)

    def _start_at_once(self, plan: ModelPlan, *, even_if_open: bool) -> Attempt | None:
        """Start an attempt that will release its slot of the model; None: there is no free slot.

        Raises:
            CircuitOpen: the model is not asked.
        """
        app, name = self._ctx.app, plan.record.registered_name
        if not even_if_open and name in app.health.cooling_down():
            raise CircuitOpen(name)
        acquired_at = app.concurrency_limiter.acquire_nowait(name, plan.limits)
        return None if acquired_at is None else app.health.start_attempt(name, app.concurrency_limiter, acquired_at)

    async def _wait_and_start(self, plan: ModelPlan, *, even_if_open: bool) -> Attempt:
        """Wait for one of the model's slots, and start an attempt as `_start_at_once` does.

        Raises:
            CircuitOpen, ModelAtCapacity: the model is not asked.
        """
        app, name = self._ctx.app, plan.record.registered_name
        max_wait_s = max(0.0, min(app.settings.queue_wait_s, self._remaining_s()))
        acquired_at = await app.concurrency_limiter.acquire(name, plan.limits, max_wait_s)
        # The circuit may have opened during the wait, or another request may have become its probe.
        if not even_if_open and name in app.health.cooling_down():
            app.concurrency_limiter.release(name, acquired_at)
            raise CircuitOpen(name)
        return app.health.start_attempt(name, app.concurrency_limiter, acquired_at)

    def _fail(self, attempt: Attempt, failure: UpstreamError) -> UpstreamError:
        """Record why an attempt failed, and return it."""
        self._record.attempt_failed(failure)
        attempt.failed(failure)
        self._failed.add(attempt.model)
        if failure.context_exceeded:
            self._rejected_as_too_long.append(attempt.model)
        return failure

    async def _ask_whole(self, model: ModelRecord, timeouts: Timeouts, attempt: Attempt) -> JSONPayload:
        record, upstream = self._record, self._ctx.app.upstream
        answer: JSONPayload
        if (native := self._native_request(model)) is not None:
            answer = await upstream.complete_native(model, native, connect_timeout_s=timeouts.connect_s)
        else:
            body, raw = self._body_for(model)
            answer = await upstream.complete(model, body, self._headers, raw=raw, connect_timeout_s=timeouts.connect_s)
        attempt.succeeded()
        if record.trace is not None:
            record.trace.observe(answer)
        record.observe_completion(answer.body)
        return answer

    async def _ask_stream(self, model: ModelRecord, timeouts: Timeouts, attempt: Attempt) -> AttemptStream:
        app, upstream = self._ctx.app, self._ctx.app.upstream
        if (native := self._native_request(model)) is not None:
            source = await upstream.stream_native(model, native, connect_timeout_s=timeouts.connect_s)
        else:
            body, raw = self._body_for(model)
            source = await upstream.stream(model, body, self._headers, raw=raw, connect_timeout_s=timeouts.connect_s)
        deadline = monotonic() + app.settings.stream_timeout_s
        stream = AttemptStream(
            source,
            attempt,
            self._record,
            idle_s=timeouts.idle_s,
            deadline=deadline,
            is_native=native is not None,
        )
        await stream.read_until_content()
        return stream

    def _native_request(self, model: ModelRecord) -> NativeRequest | None:
        """Return the client's own request, if the model's upstream speaks the client's API, and that is not chat."""
        translation = self._ctx.translation
        if translation is None or translation.api not in native_apis(model):
            return None
        headers = {**self._headers, **dict(self._ctx.native_headers)}
        limit = self._note_smaller_limit(model)
        self._record.native_document = translation.document
        return NativeRequest(translation.api, translation.document, headers, limit, self._reads_reasoning(model))

    def _reads_reasoning(self, model: ModelRecord) -> bool:
        """Return whether a model may be able to read the reasoning that earlier answers carry."""
        producer = self._ctx.snapshot.models.get(self._record.affinity.producer or "")
        return producer is None or shares_provider(model, producer)

    def _body_for(self, model: ModelRecord) -> tuple[Mapping[str, Any], bytes | None]:
        """Return the caller's body and its bytes; a changed body and no bytes if the model needs it changed."""
        request, translation = self._ctx.request, self._ctx.translation
        body, raw, limit = request.body, request.raw, self._note_smaller_limit(model)
        if limit is not None:
            body, raw = with_limit(body, limit), None
        effort = model.effort
        if translation is not None:
            asked = body if effort is None else without_effort(body)
            body, left_out = adapt(asked, model, reads_reasoning=self._reads_reasoning(model))
            self._record.left_out = (*translation.left_out, *left_out)
        if effort is not None:
            body, raw = with_effort(body, effort), None
        return body, raw

    def _note_smaller_limit(self, model: ModelRecord) -> int | None:
        limit = smaller_limit(self._ctx.snapshot.pool, model.name, self._record.selection.requirements)
        self._record.clamped = limit
        return limit

    def _first_to_recover(self, names: list[str]) -> str:
        cooling_down, models = self._ctx.app.health.cooling_down(), self._ctx.snapshot.models
        return min(names, key=lambda name: cooling_down.get(models[name].registered_name, 0.0))

    def _remaining_s(self) -> float:
        """Return how much time remains for all attempts together."""
        return self._deadline - monotonic()


def _result(outcome: Answer | UpstreamError | None, at_capacity: list[ModelAtCapacity]) -> Answer:
    """Return the answer of the last attempt, or raise its failure.

    If no model was asked, raise the ModelAtCapacity with the shortest wait.
    """
    if isinstance(outcome, UpstreamError):
        raise outcome
    if outcome is not None:
        return outcome
    if at_capacity:
        raise min(at_capacity, key=lambda full: full.retry_after_s)
    raise UpstreamError("no model was asked")


# Chunks that come before the first content are kept, up to this many, and sent ahead of it. Later ones are dropped, and
# reading goes on until a timeout. Of chunks that end a choice or report usage, up to twice as many are kept.
MAX_BUFFERED_CHUNKS = 1000

# Limit on the bytes of these chunks together. The chunk that crosses it is dropped, and so are all after it.
MAX_BUFFERED_BYTES = 2**20


# Send what a block becomes. Return what the client does not take yet, if it reads too slowly; else no bytes.
SendBlock = Callable[[list[JSONPayload]], bytes]


class AttemptStream:
    """Receive one model's stream: first `read_until_content`, then `relay` it, and `aclose` it at the end.

    The source pushes blocks to `receive` from callbacks of the event loop. They are buffered up to the first content;
    then the source is held until `relay`, which passes each block to `send_block` in the callback that brings it. A
    wait ends by `_wake`: there is content, the stream has ended, a block could not be taken, or the client reads too
    slowly.
    """

    def __init__(
        self,
        source: ChunkSource,
        attempt: Attempt,
        record: RequestRecord,
        *,
        idle_s: float,
        deadline: float,
        is_native: bool = False,
    ) -> None:
        self._source = source
        self._attempt = attempt
        self._record = record
        self._trace = record.trace
        self._idle_s = idle_s
        self._deadline = deadline  # monotonic seconds
        # The upstream speaks the client's own API, and that is not chat.
        self.is_native = is_native
        self._buffered: list[JSONPayload] = []
        self._buffered_bytes = 0
        self._has_content = self._ended = False
        # Why the stream broke.
        self._error: Exception | None = None
        # Why its chunks could not be taken.
        self._own_error: Exception | None = None
        self._limit: SilenceTimer | None = None
        # While blocks are relayed: what sends them, and what the client has not taken of them.
        self._send_block: SendBlock | None = None
        self._unsent = b""
        # Whoever waits for content, for the end, or until the client has to be waited for.
        self._waiter: asyncio.Future[None] | None = None

    async def read_until_content(self) -> None:
        """Read up to the first content, or to the end if there is none.

        On an error the connection is closed, but the attempt stays open. The caller ends it: only the caller can tell a
        timeout, which is a failure of the model, from a cancellation, which is not.
        """
        if self._trace is not None:
            self._trace.event("uniroute.first_byte")
        try:
            self._source.start(self)
            await self._wait()
            if self._own_error is not None:
                raise self._own_error
            if not self._has_content and self._error is not None:
                raise self._error
        except BaseException:
            await self._source.aclose()
            raise
        if not self._has_content:
            self._attempt.succeeded()

    @property
    def is_empty(self) -> bool:
        """Whether the stream ended without content, and without a reason that explains it."""
        return (
            self._ended
            and not self._has_content
            and is_empty_completion(
                {"choices": [choice for chunk in self._buffered for choice in chunk.body.get("choices") or ()]}
            )
        )

    async def relay(self, send_block: SendBlock, deadlines: DeadlineWheel) -> bytes:
        """Pass each block to `send_block` as it arrives, in the callback that brings it.

        Returns:
            What the client has not taken: send it, and call this again. No bytes: the stream has ended.

        Raises:
            UpstreamError: the stream broke, was silent for too long, or went on for too long.
        """
        buffered, self._buffered = self._buffered, []
        if buffered and (unsent := send_block(buffered)):
            return unsent
        if not self._ended:
            if self._limit is None:
                self._limit = SilenceTimer(deadlines, self._idle_s, self._time_out, latest=self._deadline)
            self._limit.start()
            self._send_block = send_block
            try:
                self._source.resume()
                await self._wait()
            except BaseException:
                self._source.hold()
                raise
            finally:
                self._send_block = None
                self._limit.stop()
            if self._own_error is not None:
                raise self._own_error
            if self._unsent:
                unsent, self._unsent = self._unsent, b""
                return unsent
        if self._error is None:
            self._attempt.succeeded()
            return b""
        if isinstance(self._error, UpstreamError):
            self._record.attempt_failed(self._error)
            self._attempt.failed(self._error)
        raise self._error

    async def aclose(self) -> None:
        self._attempt.abandoned()
        if self._limit is not None:
            self._limit.close()
        await self._source.aclose()

    # Called by the source, as ChunkReceiver.

    def receive(self, block: list[JSONPayload]) -> None:
        try:
            if self._trace is not None:
                for chunk in block:
                    self._trace.observe(chunk)
            if not self._has_content:
                self._look_for_content(block)
            elif self._send_block is None:  # it came in spite of being held
                self._buffered += block
            elif unsent := self._send_block(block):
                self._unsent = unsent
                self._stop()
            elif self._limit is not None:
                self._limit.since = monotonic()
        except Exception as error:  # noqa: BLE001  it is raised by whoever waits: a callback has nobody to raise it to
            self._own_error = error
            self._stop()

    def end(self, error: Exception | None) -> None:
        self._ended, self._error = True, self._error or error
        self._wake()

    def _look_for_content(self, block: list[JSONPayload]) -> None:
        """Buffer up to the first content, and record what usage is reported: an answer without content goes nowhere."""
        start = _index_of_content(block)
        for place, chunk in enumerate(block):
            usage = None if type(chunk) is TextRun else usage_of(chunk.body)
            if usage:
                self._record.set_usage(usage)
            if place < start:
                self._buffer(chunk, is_essential=self.is_native or bool(usage) or is_finished(chunk.body))
        if start < len(block):
            self._has_content = True
            self._buffered += block[start:]
            self._record.first_content()
            self._attempt.first_content()
            self._stop()

    def _buffer(self, chunk: JSONPayload, *, is_essential: bool) -> None:
        """Keep a chunk that came before the first content, within the limits."""
        limit = 2 * MAX_BUFFERED_CHUNKS if is_essential else MAX_BUFFERED_CHUNKS
        if len(self._buffered) >= limit:
            return
        # Events of other APIs build on those before them. Large ones count in the memory for responses.
        if not self.is_native:
            if self._buffered_bytes >= MAX_BUFFERED_BYTES:
                return
            self._buffered_bytes += len(chunk.raw if chunk.raw is not None else encode_json(chunk.body))
        if self._buffered_bytes < MAX_BUFFERED_BYTES:
            self._buffered.append(chunk)

    async def _wait(self) -> None:
        """Wait until the source has brought what is waited for, if it has not done so at once."""
        if self._ended or self._own_error is not None or (self._send_block is None and self._has_content):
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _stop(self) -> None:
        """Take no more for now."""
        self._send_block = None
        self._source.hold()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _time_out(self) -> None:
        if self._send_block is None or self._ended:
            return  # something has come in this very moment
        reason = f"was silent for {self._idle_s:g} s (idle_timeout_s)"
        if monotonic() >= self._deadline:
            reason = "took longer than stream_timeout_s"
        self._send_block = None
        self._source.hold()
        self.end(UpstreamError(f"the model's stream {reason}", timed_out=True))


def _index_of_content(block: list[JSONPayload]) -> int:
    """Return the index of the first chunk with content; the block's length if none has."""
    return next((index for index, chunk in enumerate(block) if has_content(chunk.body)), len(block))
