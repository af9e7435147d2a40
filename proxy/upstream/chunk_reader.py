from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import Any, Literal

from proxy.errors import AnswerTooLarge, NoRoomForAnswer, UpstreamError
from proxy.json_limits import MAX_VALUES_AT_ONCE, SMALL_BYTES, JSONTooLarge
from proxy.upstream.errors import MAX_MESSAGE_CHARS, MAY_TELL, error_in, not_a_completion, reported
from proxy.upstream.payload import JSONPayload, parse, parse_exact, reparse
from proxy.upstream.response_memory import HeldMemory, ResponseBounds, ResponseMemory
from proxy.upstream.sse import ErrorData, EventTooLong, RawLine, SSEDecoder

# An event's data to JSON, and its bytes where they may be shown as they are.
Parse = Callable[[bytes], tuple[Any, bytes | None]]

_DONE = b"[DONE]"

_ODD_CHOICES = "the model sent a chunk whose `choices` are not a list of objects"

_NO_JSON = "the model sent an event that is not JSON"

_REPORTED = "the model reported an error within its stream"

# Of one answer. OpenAI's `n` is 128 at most.
MAX_CHOICES = 1024

# Bytes that are kept of what is neither events nor a completion.
_MAX_REST = 16 * 2**10

# How long more is waited for, usage for example, once every choice has ended.
LAST_WORDS_S = 5.0


def answers_of(body: Mapping[str, Any]) -> int:
    """How many a request asks for."""
    stated = body.get("n")
    return stated if type(stated) is int and stated > 1 else 1


class ChoiceEnds:
    """Which choices of an answer have begun, and which of them have ended."""

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    def see(self, choices: list[Any]) -> None:
        """Raises UpstreamFailure where there are more than anybody asks for."""
        for place, choice in enumerate(choices):
            index = choice.get("index")
            if type(index) is not int:
                index = place
            if index not in self._begun:
                self._begun.add(index)
                if len(self._begun) > MAX_CHOICES:
                    raise UpstreamError(f"the model's answer has more than {MAX_CHOICES} choices")
            if choice.get("finish_reason"):
                self._ended.add(index)

    @property
    def begun(self) -> bool:
        return bool(self._begun)

    def all(self, least: int = 1) -> bool:
        """Whether all that began have ended, and so many at least."""
        return len(self._ended) == len(self._begun) >= least


class ChunkReader:
    """Feed it what was read; it gives the chunks of each whole event, until the stream is `over`.

    A body that is one JSON value becomes the chunks of it, whatever its headers called it.
    """

    def __init__(
        self,
        parse: Parse = parse,
        *,
        room: ResponseMemory | None = None,
        answers: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            room: for what it holds, and for the chunks that it gives, while they are there.
            answers: how many the caller asked for (`n`).
            headers: of the response.
        """
        self._room = room or ResponseMemory()
        # For the event that is not over.
        self._held = HeldMemory(self._room)
        self._cutter = SSEDecoder(self._room.largest)
        self._parse = parse
        self._answers = answers
        self._headers = headers
        self._ends = ChoiceEnds()
        # What came before the first byte that says what this is. None: it is known.
        self._head: bytes | None = b""
        self._json: _JsonBody | None = None
        # The beginning of a body that is neither JSON nor events.
        self._other: bytes | None = None
        self._told_done = False
        # A chunk has come.
        self.begun = False
        # Nothing more is to be read.
        self.over = False
        # What ended it, after the chunks before.
        self.failure: UpstreamError | None = None

    @property
    def finished(self) -> bool:
        """The answer has come to its end: of every choice, or [DONE] after something."""
        return (self._told_done and self._ends.begun) or self._ends.all()

    def feed(self, piece: bytes) -> list[JSONPayload]:
        if self._head is not None:
            return self._begin(self._head + piece)
        if self._json is not None:
            return self._go_on_with_json(self._json, piece)
        return self._events(piece)

    def close(self) -> list[JSONPayload]:
        """Nothing more comes."""
        block: list[JSONPayload] = []
        if self._head:
            block = self._events(self._head)
        if self._json is not None:
            block = self._of_whole_json(self._json)
        if not self.over:
            finished = self.finished
            block += self._block(self._cutter.close())
            if finished and self.failure is not None and self.failure.message == _NO_JSON:
                self.failure = None  # half an event, where the connection broke behind the end of the answer
        self.over = True
        self.drop()
        return block

    def drop(self) -> None:
        """What it holds of what is not over."""
        self._held.release()
        if self._json is not None:
            self._json.bounds.restart()

    def break_off(self) -> bool:
        """The connection broke. Whether the answer had ended before, so that this does not matter."""
        self.over = self._ends.all(self._answers)
        return self.over

    @property
    def fault(self) -> UpstreamError | None:
        """Of a stream that is over: what was wrong with how it ended."""
        if self.failure is not None or self.finished:
            return self.failure
        if self._other and not self.begun:
            return not_a_completion("the model", self._other, self._headers)
        return UpstreamError("the model's stream ended before its answer did")

    def _begin(self, head: bytes) -> list[JSONPayload]:
        """Once it is known what this is."""
        form = form_of(head)
        if form is None:
            self._head = head[-_MAX_REST:]
            return []
        self._head = None
        if form == "json":
            self._json = _JsonBody(self._room)
            return self._go_on_with_json(self._json, head.removeprefix(codecs.BOM_UTF8).lstrip())
        if form == "other":
            self._other = b""
        return self._events(head)

    def _go_on_with_json(self, body: _JsonBody, piece: bytes) -> list[JSONPayload]:
        had_little = body.size < _MAX_REST
        try:
            body.add(piece)
        except UpstreamError as failure:
            return self._fail(failure)
        if had_little and b"\n" in piece:
            said = body.whole()
            if _is_of_a_stream(said.partition(b"\n")[0]):
                return self._events_after_all(body, said)
        return []

    def _events_after_all(self, body: _JsonBody, said: bytes) -> list[JSONPayload]:
        body.bounds.restart()
        self._json = None
        return self._events(said)

    def _of_whole_json(self, body: _JsonBody) -> list[JSONPayload]:
        """A completion in place of a stream, or an error."""
        said = body.whole()
        try:
            completion = self._parse(said)[0]
        except JSONTooLarge as error:
            return self._fail(AnswerTooLarge(f"the model's answer {error}"))
        except ValueError:  # it only began like JSON
            self._other = b""
            return self._events_after_all(body, said)
        self.over = True
        if not isinstance(completion, dict) or error_in(completion) is not None or not has_choices(completion):
            return self._fail(not_a_completion("the model", completion, self._headers))
        chunks = chunks_of_completion(reparse(said, completion))
        try:
            for chunk in chunks:
                self._ends.see(chunk["choices"])
        except UpstreamError as failure:
            return self._fail(failure)
        self.begun, self._json = True, None
        return [JSONPayload(chunk, held=body.bounds.held) for chunk in chunks]

    def _events(self, piece: bytes) -> list[JSONPayload]:
        if self._other is not None and len(self._other) < _MAX_REST:
            self._other = (self._other + piece)[:_MAX_REST]
        cutter = self._cutter
        try:
            events = cutter.feed(piece)
            if cutter.size > SMALL_BYTES or self._held.size:
                self._hold(cutter.size)
        except EventTooLong as error:
            return self._fail(AnswerTooLarge(f"{error} (max_answer_bytes)"))
        except NoRoomForAnswer as failure:
            return self._fail(failure)
        return self._block(events)

    def _hold(self, size: int) -> None:
        """Of the event that is not over."""
        if size <= self._held.size:
            self._held.release()
        if size > SMALL_BYTES:
            self._held.grow_to(size)

    def _block(self, events: list[bytes]) -> list[JSONPayload]:
        block: list[JSONPayload] = []
        for event in events:
            try:
                self._add(event, block)
            except UpstreamError as failure:
                self._fail(failure)
            if self.over:
                break
        return block

    def _add(self, event: bytes, block: list[JSONPayload]) -> None:
        """Raises UpstreamFailure."""
        data = event.strip()
        if type(event) is ErrorData:
            raise reported(_REPORTED, _error_of(data), self._headers)
        if not data or (type(event) is RawLine and not _is_of_a_stream(data)):
            return
        if data == _DONE:
            self._told_done = self.over = True
            return
        try:
            said, raw = self._parse(data)
        except JSONTooLarge as error:
            raise _too_much(error) from error
        except ValueError as error:
            self._add_lines(data.split(b"\n"), block, error)
            return
        chunk = _chunk(said, raw, data, self._headers)
        if len(data) > SMALL_BYTES:
            chunk.held = HeldMemory(self._room, len(data))
        block.append(chunk)
        self.begun = True
        self._ends.see(chunk.body["choices"])

    def _add_lines(self, lines: list[bytes], block: list[JSONPayload], error: ValueError) -> None:
        """Events of some servers, with no blank line between them."""
        if len(lines) == 1:
            raise UpstreamError(_NO_JSON) from error
        for line in lines:
            if not self.over:
                self._add(line, block)

    def _fail(self, failure: UpstreamError) -> list[JSONPayload]:
        self.failure, self.over = failure, True
        self.drop()
        return []


class _JsonBody:
    """All that came of a body that is JSON."""

    def __init__(self, room: ResponseMemory) -> None:
        self.bounds = ResponseBounds(room, MAX_VALUES_AT_ONCE)
        self.size = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Raises AnswerTooLarge, NoRoomForAnswer."""
        self.bounds.add(piece)
        self._pieces.append(piece)
        self.size += len(piece)

    def whole(self) -> bytes:
        return b"".join(self._pieces)


def _is_of_a_stream(line: bytes) -> bool:
    """Whether a line of JSON alone is an error or a chunk, which belongs into an event."""
    try:
        said = parse_exact(line)[0]
    except ValueError:
        return False
    return isinstance(said, dict) and (error_in(said) is not None or ("choices" in said and not has_choices(said)))


def _error_of(data: bytes) -> Any:
    """What an event that is called an error says."""
    try:
        said = parse_exact(data)[0]
    except ValueError:
        return {"error": data.decode("utf-8", "replace")[:MAX_MESSAGE_CHARS]}
    return said if error_in(said) is not None else {"error": said}


def chunk_of(data: bytes, parse: Parse = parse) -> JSONPayload:
    """Raises UpstreamFailure. No choices and no delta, which some servers say as null, become what clients expect."""
    try:
        said, raw = parse(data)
    except JSONTooLarge as error:
        raise _too_much(error) from error
    except ValueError as error:
        raise UpstreamError(_NO_JSON) from error
    return _chunk(said, raw, data)


def _too_much(error: JSONTooLarge) -> AnswerTooLarge:
    return AnswerTooLarge(f"the model sent an event that {error}")


def _chunk(said: Any, raw: bytes | None, data: bytes, headers: Mapping[str, str] | None = None) -> JSONPayload:
    if not isinstance(said, dict):
        raise UpstreamError("the model sent an event that is not a JSON object")
    odd = said.get("object") == "error" or not MAY_TELL.isdisjoint(said)
    choices = said.get("choices")
    if not isinstance(choices, list | None):
        _raise_if_error(said, headers)
        raise UpstreamError(_ODD_CHOICES)
    usual = choices is not None
    for choice in choices or ():
        if not isinstance(choice, dict):
            _raise_if_error(said, headers)
            raise UpstreamError(_ODD_CHOICES)
        odd = odd or "error" in choice or bool(choice.get("finish_reason"))
        usual = usual and choice.get("delta") is not None and "usage" not in choice
    if odd:
        _raise_if_error(said, headers)
    if not usual or b"\n" in data or b"\r" in data:  # an event is one line here
        return JSONPayload(_filled(reparse(data, said)))
    return JSONPayload(said, raw)


def _raise_if_error(said: dict[str, Any], headers: Mapping[str, str] | None) -> None:
    error = error_in(said)
    if error is not None:
        raise reported(_REPORTED, error, headers)


def _filled(chunk: dict[str, Any]) -> dict[str, Any]:
    if chunk.get("choices") is None:
        chunk["choices"] = []
    for choice in chunk["choices"]:
        if choice.get("delta") is None:
            choice["delta"] = {}
        if isinstance(choice.get("usage"), dict) and not chunk.get("usage"):  # Moonshot's place for it
            chunk["usage"] = choice["usage"]
    return chunk


def is_finished(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():  # noqa: SIM110  # any() over a generator takes three times as long
        if choice.get("finish_reason"):
            return True
    return False


Json = dict[str, Any]

_BLANK = b" \t\r\n"


def form_of(beginning: bytes) -> Literal["json", "events", "other"] | None:
    """What a body is, by how it begins: one JSON value, an event stream, or neither. None: too little came yet."""
    rest = beginning.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    if rest[:1] in (b"{", b"["):
        return "json"
    if rest.startswith(_FIELDS):
        return "events"
    begun = not rest or any(field.startswith(rest) for field in (*_FIELDS, codecs.BOM_UTF8))
    return None if begun else "other"


# Of an event stream; `error` is llama.cpp's.
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")


def has_choices(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    return all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)


def chunks_of_completion(completion: Json) -> list[Json]:
    """What a stream of this completion would have been: what each choice says, how it ended, and what it used."""
    base = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    base["object"] = "chat.completion.chunk"
    said: list[Json] = []
    ends: list[Json] = []
    for place, choice in enumerate(completion["choices"]):
        index = place_of(choice, place)
        message = choice["message"]
        beside = {name: value for name, value in choice.items() if name not in _OF_A_CHOICE}
        delta = {"role": "assistant", **{name: value for name, value in message.items() if value is not None}}
        if isinstance(calls := message.get("tool_calls"), list):
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(calls) if isinstance(call, dict)
            ]
        reason = choice.get("finish_reason") or ("tool_calls" if delta.get("tool_calls") else "stop")
        said.append({**base, "choices": [{"index": index, "delta": delta, **beside, "finish_reason": None}]})
        ends.append({**base, "choices": [{"index": index, "delta": {}, "finish_reason": reason}]})
    usage = completion.get("usage")
    return [*said, *ends, *([{**base, "choices": [], "usage": usage}] if usage else [])]


_OF_A_CHOICE = frozenset({"index", "message", "delta", "finish_reason", "usage"})


def place_of(choice: Mapping[str, Any], place: int) -> int:
    """The choice's number; its place in the list where it states none."""
    index = choice.get("index")
    return index if type(index) is int else place
