from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from proxy.errors import ResponseMemoryFull, ResponseTooLarge, UpstreamError
from proxy.json_text import MAX_VALUES_AT_ONCE, SMALL_BYTES, JSONTooLarge
from proxy.upstream.errors import ERROR_MEMBERS, MAX_MESSAGE_CHARS, error_from_body, find_error, not_a_completion
from proxy.upstream.payload import JSONPayload, parse, parse_exact, reparse, simple_text
from proxy.upstream.response_memory import HeldMemory, JSONBody, ResponseBounds, ResponseMemory
from proxy.upstream.sse import ErrorData, EventTooLong, RawLine, SSEDecoder
from proxy.upstream.text_frame import TextFrame, learn_frame

JSONObject = dict[str, Any]

# Turns the data of an event into JSON, and its bytes if they may be passed on as they are.
Parse = Callable[[bytes], tuple[Any, bytes | None]]

# Of one response. OpenAI's `n` is 128 at most.
MAX_CHOICES = 1024

# How long the rest of a stream is waited for, usage for example, once every choice has finished.
MAX_TAIL_S = 5.0

# How much is kept of a body that is neither events nor a completion.
MAX_OTHER_BYTES = 16 * 2**10

# Chunks of text in one stream from which a frame is learned. Where they are all different, none fits for long.
MAX_FRAMES = 8

_DONE = b"[DONE]"

_BLANK = b" \t\r\n"

# Fields of an event stream; `error` is llama.cpp's.
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")

NOT_JSON = "the model sent an event that is not JSON"

REPORTED = "the model reported an error within its stream"

_CHOICE_MEMBERS = frozenset({"index", "message", "delta", "finish_reason", "usage"})


def requested_choices(body: Mapping[str, Any]) -> int:
    """Return how many choices a request asks for."""
    stated = body.get("n")
    return stated if type(stated) is int and stated > 1 else 1


def choice_index(choice: Mapping[str, Any], position: int) -> int:
    """Return the index of a choice, or its position in the list if it states none."""
    index = choice.get("index")
    return index if type(index) is int else position


def is_completion(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    for choice in choices:  # noqa: SIM110  # all() over a generator takes three times as long
        if not (isinstance(choice, dict) and isinstance(choice.get("message"), dict)):
            return False
    return True


def is_finished(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():  # noqa: SIM110  # any() over a generator takes three times as long
        if choice.get("finish_reason"):
            return True
    return False


class FinishTracker:
    """Track which choices of a stream have started, and which of them have finished."""

    def __init__(self) -> None:
        self._started: set[int] = set()
        self._finished: set[int] = set()

    def observe(self, choices: list[Any]) -> None:
        """Raises UpstreamError if there are more than MAX_CHOICES."""
        for position, choice in enumerate(choices):
            index = choice.get("index")
            if type(index) is not int:
                index = position
            if index not in self._started:
                self._started.add(index)
                if len(self._started) > MAX_CHOICES:
                    raise UpstreamError(f"the model's answer has more than {MAX_CHOICES} choices")
            if choice.get("finish_reason"):
                self._finished.add(index)

    @property
    def started(self) -> bool:
        return bool(self._started)

    def all_finished(self, at_least: int = 1) -> bool:
        """Return whether all that started have finished, and at least so many."""
        return len(self._finished) == len(self._started) >= at_least


def body_format(start: bytes) -> Literal["json", "events", "other"] | None:
    """Tell a JSON value, an event stream, and anything else by how a body starts. None: too little came yet."""
    rest = start.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    if rest[:1] in (b"{", b"["):
        return "json"
    if rest.startswith(_EVENT_FIELDS):
        return "events"
    undecided = not rest or any(field.startswith(rest) for field in (*_EVENT_FIELDS, codecs.BOM_UTF8))
    return None if undecided else "other"


class ChunkReceiver(Protocol):
    """What takes the chunks of one stream."""

    def receive(self, block: list[JSONPayload]) -> None:
        """Take chunks that arrived together, at least one. Raises nothing. May tell the source to hold."""

    def end(self, error: Exception | None) -> None:
        """Note that no more comes. `error`: UpstreamError if the stream broke, or ended before its answer did."""


class ChunkSource(Protocol):
    """A stream of chunks. Close it, however it ended."""

    def start(self, receiver: ChunkReceiver) -> None:
        """Give the receiver what has arrived, and then what arrives. It may be told all of it, and the end, at once."""

    def hold(self) -> None:
        """Give the receiver no more chunks, until `resume` is called. The end may still be told."""

    def resume(self) -> None: ...

    async def aclose(self) -> None:
        """Close the upstream's connection; the receiver is told nothing more. May be called again."""


class ChunkReader:
    """Turn the bytes of a streamed response into chunks, until the stream is `done`.

    A body that is one JSON value becomes the chunks of it, whatever its headers say.
    """

    def __init__(
        self,
        parse: Parse = parse,
        *,
        memory: ResponseMemory | None = None,
        choices: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            memory: for what this holds, and for the chunks that it returns, as long as they exist.
            choices: how many the caller asked for (`n`).
            headers: of the response.
        """
        self._memory = memory or ResponseMemory()
        # For the event that is not complete yet.
        self._held = HeldMemory(self._memory)
        self._decoder = self._new_decoder()
        self._parse = parse
        self._choices = choices
        self._headers = headers
        self._tracker = FinishTracker()
        # What came before it could be said what this is; None once it is known.
        self._undecided: bytes | None = b""
        self._json: JSONBody | None = None
        # The start of a body that is neither JSON nor events.
        self._other: bytes | None = None
        self._seen_done = False
        # What most chunks have around their text, and how many more are looked at to learn it.
        self._frame: TextFrame | None = None
        self._frames_left = MAX_FRAMES
        # The answer is complete: every choice has finished, or [DONE] came after something.
        self.finished = False
        # A chunk has come.
        self.started = False
        # Nothing more is to be read.
        self.done = False
        # What ended the stream, after the chunks before.
        self.error: UpstreamError | None = None

    def _new_decoder(self) -> SSEDecoder:
        return SSEDecoder(self._memory.max_response_bytes)

    def _is_finished(self) -> bool:
        return (self._seen_done and self._tracker.started) or self._tracker.all_finished()

    def feed(self, piece: bytes) -> list[JSONPayload]:
        """Return the chunks of the events that this piece completes. Those of text alone may be one TextRun."""
        if self._undecided is not None:
            return self._decide(self._undecided + piece)
        if self._json is not None:
            return self._add_json(self._json, piece)
        if self._other is not None and len(self._other) < MAX_OTHER_BYTES:
            self._other = (self._other + piece)[:MAX_OTHER_BYTES]
        block: list[JSONPayload] = []
        place = 0
        while place < len(piece) and not self.done:
            if self._frame is not None and self._decoder.is_between_events:
                run, place = self._frame.match(piece, place)
                if run is not None:
                    block.append(run)
                    continue
            place = self._decode(piece, place, block)
        return block

    def close(self) -> list[JSONPayload]:
        """Return the chunks that are left at the end of the body."""
        block: list[JSONPayload] = []
        if self._undecided:
            start, self._undecided = self._undecided, None
            block = self.feed(start)
        if self._json is not None:
            block = self._read_json(self._json)
        if not self.done:
            finished = self.finished
            self._read_block(self._decoder.close(), block)
            if finished and self.error is not None and self.error.message == NOT_JSON:
                self.error = None  # half an event, from a connection that broke after the end of the answer
        self.done = True
        self.release()
        return block

    def release(self) -> None:
        """Give back the memory for what is not complete."""
        self._held.release()
        if self._json is not None:
            self._json.bounds.restart()

    def break_off(self) -> bool:
        """Note that the connection broke, and return whether the answer was complete, so that this does not matter."""
        self.done = self._tracker.all_finished(self._choices)
        return self.done

    @property
    def final_error(self) -> UpstreamError | None:
        """Return what was wrong with how a stream ended that is done."""
        if self.error is not None or self.finished:
            return self.error
        if self._other and not self.started:
            return not_a_completion("the model", self._other, self._headers)
        return UpstreamError("the model's stream ended before its answer did")

    def _decide(self, start: bytes) -> list[JSONPayload]:
        """Choose a format once enough has come."""
        form = body_format(start)
        if form is None:
            self._undecided = start[-MAX_OTHER_BYTES:]
            return []
        self._undecided = None
        if form == "json":
            self._json = JSONBody(ResponseBounds(self._memory, MAX_VALUES_AT_ONCE))
            return self._add_json(self._json, start.removeprefix(codecs.BOM_UTF8).lstrip())
        if form == "other":
            self._other = b""
        return self.feed(start)

    def _add_json(self, body: JSONBody, piece: bytes) -> list[JSONPayload]:
        was_small = body.size < MAX_OTHER_BYTES
        try:
            body.feed(piece)
        except UpstreamError as error:
            return self._fail(error)
        if was_small and b"\n" in piece:
            data = body.join()
            if is_stream_line(data.partition(b"\n")[0]):
                return self._read_as_events(body, data)
        return []

    def _read_as_events(self, body: JSONBody, data: bytes) -> list[JSONPayload]:
        """Read as events what had only started like JSON."""
        body.bounds.restart()
        self._json = None
        return self.feed(data)

    def _read_json(self, body: JSONBody) -> list[JSONPayload]:
        """Read a whole completion that came in place of a stream, or an error."""
        data = body.join()
        try:
            completion = self._parse(data)[0]
        except JSONTooLarge as error:
            return self._fail(ResponseTooLarge(f"the model's answer {error}"))
        except ValueError:
            self._other = b""
            return self._read_as_events(body, data)
        self.done = True
        return self._read_whole(completion, data, body)

    def _read_whole(self, completion: Any, data: bytes, body: JSONBody) -> list[JSONPayload]:
        """Read a JSON value that is all of the body."""
        if not isinstance(completion, dict) or find_error(completion) is not None or not is_completion(completion):
            return self._fail(not_a_completion("the model", completion, self._headers))
        chunks = split_completion(reparse(data, completion))
        try:
            for chunk in chunks:
                self._tracker.observe(chunk["choices"])
        except UpstreamError as error:
            return self._fail(error)
        self.started, self._json, self.finished = True, None, self._is_finished()
        return [JSONPayload(chunk, held=body.bounds.held) for chunk in chunks]

    def _decode(self, piece: bytes, place: int, block: list[JSONPayload]) -> int:
        """Decode and parse events from a place on, up to where a frame may fit. Return where that is."""
        stop = -1
        if self._frame is not None:
            stop = piece.find(b"\n\n" + self._frame.start, place)
        elif self._frames_left:
            stop = piece.find(b"\n\n", place)
        stop = stop + 2 if stop >= 0 else len(piece)
        decoder = self._decoder
        try:
            events = decoder.feed(piece[place:stop])
            if decoder.size > SMALL_BYTES or self._held.size:
                self._hold(decoder.size)
        except EventTooLong as error:
            self._fail(ResponseTooLarge(f"{error} (max_answer_bytes)"))
        except ResponseMemoryFull as error:
            self._fail(error)
        else:
            self._read_block(events, block)
        return stop

    def _hold(self, size: int) -> None:
        """Hold memory for the event that is not complete yet."""
        if size <= self._held.size:
            self._held.release()
        if size > SMALL_BYTES:
            self._held.grow_to(size)

    def _read_block(self, events: list[bytes], block: list[JSONPayload]) -> None:
        """Append the chunks of events to the block."""
        for event in events:
            try:
                self._read_event(event, block)
            except UpstreamError as error:
                self._fail(error)
            if self.done:
                break
        self.finished = self._is_finished()

    def _read_event(self, event: bytes, block: list[JSONPayload]) -> None:
        """Append the chunk of an event to the block. Raises UpstreamError."""
        if self._frame is not None and type(event) is bytes and (framed := self._frame.match_data(event)) is not None:
            block.append(framed)
            return
        data = event.strip()
        if type(event) is ErrorData:
            raise error_from_body(REPORTED, parse_error(data), self._headers)
        if not data or (type(event) is RawLine and not is_stream_line(data)):
            return
        if data == _DONE:
            self._seen_done = self.done = True
            return
        try:
            value, raw = self._parse(data)
        except JSONTooLarge as error:
            raise event_too_large(error) from error
        except ValueError as error:
            self._read_lines(data.split(b"\n"), block, error)
            return
        chunk = _make_chunk(value, raw, data, self._headers)
        self._append(chunk, len(data), block)
        self._tracker.observe(chunk.body["choices"])
        if self._frames_left:
            self._learn(chunk)

    def _learn(self, chunk: JSONPayload) -> None:
        """Learn what a chunk of text has around its text."""
        text = None if chunk.raw is None else simple_text(chunk.body)
        if chunk.raw is None or text:
            self._frames_left -= 1
        if chunk.raw is not None and text:
            self._frame = learn_frame(chunk.raw, chunk.body, text) or self._frame

    def _append(self, chunk: JSONPayload, size: int, block: list[JSONPayload]) -> None:
        if size > SMALL_BYTES:
            chunk.held = HeldMemory(self._memory, size)
        block.append(chunk)
        self.started = True

    def _read_lines(self, lines: list[bytes], block: list[JSONPayload], error: ValueError) -> None:
        """Read events with no blank line between them, as some servers send them."""
        if len(lines) == 1:
            raise UpstreamError(NOT_JSON) from error
        for line in lines:
            if not self.done:
                self._read_event(line, block)

    def _fail(self, error: UpstreamError) -> list[JSONPayload]:
        self.error, self.done = error, True
        self.release()
        return []


def is_stream_line(line: bytes) -> bool:
    """Return whether a line of JSON outside of events is an error or a chunk."""
    try:
        value = parse_exact(line)[0]
    except ValueError:
        return False
    return isinstance(value, dict) and (
        find_error(value) is not None or ("choices" in value and not is_completion(value))
    )


def parse_error(data: bytes) -> Any:
    """Parse the data of an event that is called an error."""
    try:
        value = parse_exact(data)[0]
    except ValueError:
        return {"error": data.decode("utf-8", "replace")[:MAX_MESSAGE_CHARS]}
    return value if find_error(value) is not None else {"error": value}


def event_too_large(error: JSONTooLarge) -> ResponseTooLarge:
    return ResponseTooLarge(f"the model sent an event that {error}")


def _make_chunk(value: Any, raw: bytes | None, data: bytes, headers: Mapping[str, str] | None) -> JSONPayload:
    """Make a chunk of a parsed event. Missing or null choices and deltas become empty ones, as clients expect.

    Raises:
        UpstreamError: it is no chunk, or an error.
    """
    if not isinstance(value, dict):
        raise UpstreamError("the model sent an event that is not a JSON object")
    choices = value.get("choices")
    may_be_error = value.get("object") == "error" or not ERROR_MEMBERS.isdisjoint(value)
    is_complete = choices is not None
    if not isinstance(choices, list | None):
        raise _not_a_chunk(value, headers)
    for choice in choices or ():
        if not isinstance(choice, dict):
            raise _not_a_chunk(value, headers)
        may_be_error = may_be_error or "error" in choice or bool(choice.get("finish_reason"))
        is_complete = is_complete and choice.get("delta") is not None and "usage" not in choice
    if may_be_error and (error := find_error(value)) is not None:
        raise error_from_body(REPORTED, error, headers)
    if not is_complete or b"\n" in data or b"\r" in data:  # an event is one line here
        return JSONPayload(_complete_chunk(reparse(data, value)))
    return JSONPayload(value, raw)


def _not_a_chunk(value: dict[str, Any], headers: Mapping[str, str] | None) -> UpstreamError:
    error = find_error(value)
    if error is not None:
        return error_from_body(REPORTED, error, headers)
    return UpstreamError("the model sent a chunk whose `choices` are not a list of objects")


def _complete_chunk(chunk: dict[str, Any]) -> dict[str, Any]:
    """Add the members that clients expect of a chunk."""
    if chunk.get("choices") is None:
        chunk["choices"] = []
    for choice in chunk["choices"]:
        if choice.get("delta") is None:
            choice["delta"] = {}
        if isinstance(choice.get("usage"), dict) and not chunk.get("usage"):  # where Moonshot puts it
            chunk["usage"] = choice["usage"]
    return chunk


def split_completion(completion: JSONObject) -> list[JSONObject]:
    """Return the chunks of a stream of this completion: content and end of each choice, and the usage."""
    base = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    base["object"] = "chat.completion.chunk"
    contents: list[JSONObject] = []
    ends: list[JSONObject] = []
    for position, choice in enumerate(completion["choices"]):
        index = choice_index(choice, position)
        message = choice["message"]
        more = {name: value for name, value in choice.items() if name not in _CHOICE_MEMBERS}
        delta = {"role": "assistant", **{name: value for name, value in message.items() if value is not None}}
        if isinstance(calls := message.get("tool_calls"), list):
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(calls) if isinstance(call, dict)
            ]
        reason = choice.get("finish_reason") or ("tool_calls" if delta.get("tool_calls") else "stop")
        contents.append({**base, "choices": [{"index": index, "delta": delta, **more, "finish_reason": None}]})
        ends.append({**base, "choices": [{"index": index, "delta": {}, "finish_reason": reason}]})
    usage = completion.get("usage")
    return [*contents, *ends, *([{**base, "choices": [], "usage": usage}] if usage else [])]
