from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from time import monotonic
from typing import Any, Protocol

from proxy.concurrency import DeadlineWheel, SilenceTimer
from proxy.errors import (
    SHUTDOWN_NOTICE_TIMEOUT_S,
    SHUTTING_DOWN_MESSAGE,
    APIError,
    ModelAtCapacity,
    ShuttingDown,
    UpstreamError,
    release_frames,
)
from proxy.json_text import decode_json, encode_json
from proxy.server.api.messages_stream import PING
from proxy.server.api.translation import RelayedEvents, StreamTranslation, Translation
from proxy.server.attempts import AttemptStream
from proxy.server.dependencies import RequestContext
from proxy.server.disconnects import cancelled_ending
from proxy.server.exchange import Exchange
from proxy.server.request_log import RequestRecord
from proxy.server.responses import render_error
from proxy.storage.usage import combine_usage
from proxy.upstream.payload import (
    JSONPayload,
    NativePayload,
    empty_chunk,
    is_null_usage_chunk,
    is_usage_chunk,
    iter_choices,
    usage_chunk,
)
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory
from proxy.upstream.sse import DONE, KEEP_ALIVE, format_event
from proxy.upstream.text_frame import TextRun

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}

StoreAnswer = Callable[[Mapping[str, Any] | None], Awaitable[None]]


class StreamedAnswer:
    """Relay a stream until the upstream ends or breaks it, the client leaves, or the server shuts down.

    The upstream's connection is closed in every case.

    Args:
        store_answer: is given the whole answer before its last bytes are sent, if later requests may ask for it.
    """

    def __init__(
        self, ctx: RequestContext, exchange: Exchange, record: RequestRecord, store_answer: StoreAnswer
    ) -> None:
        self._exchange = exchange
        self._record = record
        self._store_answer = store_answer
        self._deadlines = ctx.app.deadlines
        self._translation = ctx.translation
        self._has_metadata = ctx.request.options.metadata
        self._events: EventWriter = (
            ChatEventWriter(record, include_usage=ctx.request.include_usage)
            if ctx.translation is None
            else TranslatedEventWriter(record, ctx.translation, ctx.app.upstream.memory)
        )
        self._keep_alive = SSEKeepAlive(exchange, record, ctx.app.settings.keep_alive_s, self._deadlines, self._events)

    async def send(self, opening: Coroutine[Any, Any, AttemptStream]) -> None:
        """Wait for the first content, and send the answer. The answer begins before if the content is late.

        Raises:
            ProxyError: as `opening`, unless the answer has begun: then its failure is an event. If `opening` failed
                before, the record is not finished.
        """
        record, exchange = self._record, self._exchange
        stream: AttemptStream | None = None
        ending: str | None = None
        try:
            try:
                stream = await opening
                await self._keep_alive.begin()
                await self._relay(stream)
                ending = "complete"
            finally:
                self._keep_alive.stop()
        except (UpstreamError, ModelAtCapacity) as failure:
            if not exchange.started:
                raise
            await exchange.write(self._events.fail(failure))
            release_frames(failure)
        except asyncio.CancelledError:
            ending = cancelled_ending()
            if exchange.started and ending == "shutdown":
                record.finish(ending)
                await self._send_shutting_down()
            raise
        finally:
            # Before the client can read the end of the stream: an answer that it has read is on record.
            if stream is not None or exchange.started:
                record.finish(ending or ("broken" if record.has_content else "failed"))
            if stream is not None:
                await stream.aclose()
        end = b""
        if ending == "complete":
            end = self._events.end()
            if self._has_metadata:
                end = self._events.with_metadata(end)
            await self._store_answer(self._events.answer)
        # The client's next request comes after this end, and must be checked against limits that include this one.
        await record.wait_until_settled()
        await exchange.end(end)

    async def _relay(self, stream: AttemptStream) -> None:
        """Send all events but those that end the answer."""
        # Only now is it known whether the upstream that answers writes the client's events itself.
        if stream.is_native and self._translation is not None:
            self._events = self._keep_alive.events = NativeEventWriter(self._record, self._translation)
        exchange, events, silence = self._exchange, self._events, self._keep_alive.silence

        def send_block(block: list[JSONPayload]) -> bytes:
            """Send a block at once. Return what the client does not take yet."""
            data = events.encode(block)
            if not data:
                return b""
            silence.since = monotonic()
            return b"" if exchange.write_now(data) else data

        while unsent := await stream.relay(send_block, self._deadlines):
            await exchange.write(unsent)

    async def _send_shutting_down(self) -> None:
        """Send the error event that says that the server shuts down. Give up soon: the client may not be reading."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_NOTICE_TIMEOUT_S):
                await self._exchange.end(self._events.fail(ShuttingDown(SHUTTING_DOWN_MESSAGE)))


class EventWriter(Protocol):
    """Turn the blocks of one stream into what the client is sent, and record their usage and size."""

    keep_alive: bytes
    """What is sent while the model is silent."""

    answer: Mapping[str, Any] | None
    """The whole answer, once `end` was called; None if nobody can ask for it later."""

    def encode(self, block: list[JSONPayload]) -> bytes:
        """Return the events of a block; no bytes if none of it is for the client.

        Raises:
            ResponseTooLarge, ResponseMemoryFull: more is to be held than may be.
        """

    def end(self) -> bytes:
        """Return what ends a complete answer. It is sent once everything is recorded."""

    def with_metadata(self, end: bytes) -> bytes:
        """Return the end with what the answer says of itself."""

    def fail(self, failure: APIError) -> bytes:
        """Return the events that end a stream which failed."""


def _error_of(failure: APIError) -> tuple[int, Mapping[str, Any]]:
    """Return the status and OpenAI's error object of a failure."""
    status, body, _ = render_error(failure)
    return status, body["error"]


class ChatEventWriter:
    """Send the chunks themselves, under our name of the model."""

    keep_alive = KEEP_ALIVE
    answer: Mapping[str, Any] | None = None

    def __init__(self, record: RequestRecord, *, include_usage: bool) -> None:
        self._record = record
        self._include_usage = include_usage
        self._usage: object = None
        self._usage_sent = False
        self._last: JSONPayload = JSONPayload({})

    def encode(self, block: list[JSONPayload]) -> bytes:
        record, model = self._record, self._record.model
        pieces: list[bytes] = []
        for chunk in block:
            if type(chunk) is TextRun:  # text alone: no usage, no fingerprint, no end
                record.add_output(chunk.size)
                pieces.append(chunk.events(model))
                continue
            body = chunk.body
            _, usage = record.observe(body)
            sent: JSONPayload | None = chunk
            if usage:
                sent = self._with_usage(chunk, usage)
            elif "usage" in body and not self._include_usage and is_null_usage_chunk(body):
                sent = None
            if sent is not None:
                pieces += (b"data: ", sent.with_model(model), b"\n\n")
        if block:
            self._last = block[-1]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> bytes:
        """Return [DONE], after the usage that the caller asked for if the upstream reported it in other chunks only."""
        if not self._include_usage or self._usage is None or self._usage_sent:
            return DONE
        return format_event(usage_chunk({**self._last.body, "model": self._record.model}, self._usage)) + DONE

    def with_metadata(self, end: bytes) -> bytes:
        return _before_done(end, {**self._last.body, "model": self._record.model}, self._record.metadata())

    def fail(self, failure: APIError) -> bytes:
        return format_event({"error": _error_of(failure)[1]})

    def _with_usage(self, chunk: JSONPayload, usage: object) -> JSONPayload | None:
        """Keep a chunk's usage. Return the chunk as the client receives it; None: the client receives none."""
        self._usage = combine_usage(self._usage, usage)
        if not chunk.body.get("usage"):
            return chunk
        only_usage = is_usage_chunk(chunk.body)
        if self._include_usage:
            self._usage_sent = self._usage_sent or only_usage
            # Clients count by the last report alone.
            return chunk if self._usage is usage or not only_usage else chunk.with_usage(self._usage)
        if only_usage:
            return None
        return chunk.without("usage")


# What a translation holds of a chunk beside its text.
CHUNK_BYTES = 64


class TranslatedEventWriter:
    """Send events of another API, translated from chunks.

    Some APIs repeat the whole answer at its end: what is held for that counts as a whole response does.
    """

    keep_alive = KEEP_ALIVE
    answer: Mapping[str, Any] | None = None

    def __init__(self, record: RequestRecord, translation: Translation, memory: ResponseMemory) -> None:
        self._record = record
        self._translation = translation
        self._bounds = ResponseBounds(memory)
        # Begun at the first event: only then is it known which model answers.
        self._stream: StreamTranslation | None = None
        self._last = b""

    def encode(self, block: list[JSONPayload]) -> bytes:
        stream = self._begin()
        pieces: list[bytes] = []
        for chunk in block:
            if type(chunk) is TextRun:
                self._bounds.add_bytes(chunk.size + len(chunk.texts) * CHUNK_BYTES)
                self._record.add_output(chunk.size)
                written = stream.write_run(chunk)
                pieces += [stream.write(each.body) for each in chunk.chunks()] if written is None else [written]
                continue
            size, _ = self._record.observe(chunk.body)
            self._bounds.add_bytes(size + logprobs_bytes(chunk.body) + CHUNK_BYTES)
            pieces.append(stream.write(chunk.body))
        events = b"".join(pieces)
        self._last = events or self._last
        return events

    def end(self) -> bytes:
        stream = self._begin()
        data = stream.finish()
        self.answer = stream.answer
        return data

    def with_metadata(self, end: bytes) -> bytes:
        if end.endswith(DONE):
            return _before_done(end, _last_event(self._last)[2], self._record.metadata())
        return _in_last_event(end, self._record.metadata())

    def fail(self, failure: APIError) -> bytes:
        status, error = _error_of(failure)
        return self._begin().fail(error, status)

    def _begin(self) -> StreamTranslation:
        if self._stream is None:
            self._stream = self._translation.stream(self._record.model)
            self.keep_alive = self._stream.keep_alive
        return self._stream


class NativeEventWriter:
    """Send the events of an upstream that speaks the client's own API, under our name of the model."""

    keep_alive = KEEP_ALIVE

    def __init__(self, record: RequestRecord, translation: Translation) -> None:
        self.answer: Mapping[str, Any] | None = None
        self._record = record
        self._translation = translation
        # The last event is held back until everything is recorded.
        self._last = b""
        # What the client has seen: the newest `response` and the newest `sequence_number`, where events have them.
        self._response: Mapping[str, Any] | None = None
        self._number: int | None = None

    def encode(self, block: list[JSONPayload]) -> bytes:
        pieces: list[bytes] = []
        for event in block:
            assert isinstance(event, NativePayload)
            self._record.observe(event.body)
            self._note(event)
            data = event.with_model(self._record.model)
            if event.event_type in _LAST_EVENTS:
                self._last = data
                if isinstance(response := event.native.get("response"), Mapping):
                    self.answer = {**response, "model": self._record.model}
            else:
                pieces.append(data)
        return b"".join(pieces)

    def end(self) -> bytes:
        return self._last

    def with_metadata(self, end: bytes) -> bytes:
        return _in_last_event(end, self._record.metadata())

    def fail(self, failure: APIError) -> bytes:
        status, error = _error_of(failure)
        seen = RelayedEvents(self._record.model, self._response, self._number)
        return self._translation.fail_relayed(seen, error, status)

    def _note(self, event: NativePayload) -> None:
        response, number = event.native.get("response"), event.native.get("sequence_number")
        if isinstance(response, Mapping):
            self._response = response
        if type(number) is int:
            self._number = number
        if event.event_type == b"message_start":
            self.keep_alive = PING


_LAST_EVENTS = frozenset({b"message_stop", b"response.completed", b"response.incomplete"})


# Member of an answer, or of an event, that says how the answer came about.
METADATA = "uniroute"


def _before_done(end: bytes, like: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """Add one more chunk, without choices."""
    return end.removesuffix(DONE) + format_event(empty_chunk(like, **{METADATA: metadata})) + DONE


def _in_last_event(end: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Add it to the response that the last event holds, or to the event itself where it holds none."""
    before, lines, event = _last_event(end)
    response = event.get("response")
    added = {"response": {**response, METADATA: metadata}} if isinstance(response, dict) else {METADATA: metadata}
    return before + b"".join(lines) + format_event({**event, **added}) if event else end


def _last_event(events: bytes) -> tuple[bytes, list[bytes], Mapping[str, Any]]:
    """Return what stands before the last event, its lines but for the data, and the data; empty if it has none."""
    last = events.rfind(b"\n\n", 0, -2)
    start = 0 if last < 0 else last + 2
    lines = events[start:].rstrip(b"\n").split(b"\n")
    data = b"\n".join(line[6:] for line in lines if line.startswith(b"data: "))
    others = [line + b"\n" for line in lines if not line.startswith(b"data: ")]
    return events[:start], others, decode_json(data) if data.startswith(b"{") else {}


def logprobs_bytes(chunk: Mapping[str, Any]) -> int:
    """Return the size of a chunk's log probabilities, of which there may be many for each token."""
    return sum(len(encode_json(choice["logprobs"])) for choice in iter_choices(chunk) if choice.get("logprobs"))


class SSEKeepAlive:
    """Send a comment or a ping whenever nothing was sent for `interval_s`, from now on until `stop`.

    The first one begins the answer, if nothing else has. Whoever sends something else sets `silence.since`.

    Args:
        events: says what is sent.
    """

    def __init__(
        self,
        exchange: Exchange,
        record: RequestRecord,
        interval_s: float,
        deadlines: DeadlineWheel,
        events: EventWriter,
    ) -> None:
        self._exchange = exchange
        self._record = record
        self.events = events
        self._sending: asyncio.Task[None] | None = None
        self.silence = SilenceTimer(deadlines, interval_s, self._send)
        self.silence.start()

    async def begin(self) -> None:
        """Begin the answer, if that has not been done, with headers that name the model that answers now."""
        if self._sending is not None:
            await self._sending
        if not self._exchange.started:
            await self._send_head()

    def stop(self) -> None:
        self.silence.close()
        if self._sending is not None:
            self._sending.cancel()

    def _send(self) -> None:
        data = self.events.keep_alive
        # If the last one is still being sent, the client reads nothing: do not send another.
        if self._sending is None or self._sending.done():
            if not self._exchange.started:
                self._sending = asyncio.create_task(self._begin_with(data), name="uniroute-keep-alive")
            elif not self._exchange.write_now(data):
                self._sending = asyncio.create_task(self._exchange.write(data), name="uniroute-keep-alive")
        self.silence.start()

    async def _begin_with(self, data: bytes) -> None:
        await self._send_head()
        await self._exchange.write(data)

    async def _send_head(self) -> None:
        await self._exchange.begin(200, {**HEADERS, **self._record.headers()})
