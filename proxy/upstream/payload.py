from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Never

import orjson

from proxy.errors import AnswerTooLarge, NoRoomForAnswer, UpstreamError
from proxy.safety.json_shape import MAX_VALUES_AT_ONCE, SHALLOW, SMALL, TooMuchJson, check_shape
from proxy.upstream.answer_room import AnswerBounds, AnswerRoom, Held
from proxy.upstream.completion_reader import Joined, chunks_of_completion, form_of, has_choices
from proxy.upstream.errors import MAX_MESSAGE_CHARS, MAY_TELL, error_in, not_a_completion, reported
from proxy.upstream.sse import ErrorData, EventTooLong, RawLine, SSEDecoder, decode_json, encode_json
from router_core.text import text_bytes

_MODEL = re.compile(rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]++|\\.)*+")')

_MAX_PLACES = 8
"""Members called `model` that are tried, where tools and schemas have some of their own."""

_MAX_NAME_BYTES = 256
"""Of a name that is looked for as it is, and remembered."""

_BACKSLASH = ord("\\")


def replace_model(raw: bytes, body: Mapping[str, Any], model: str) -> bytes | None:
    """`raw` naming `model`; None where its own is no text, or written in a way that is not seen at once.

    Args:
        raw: a JSON object without a key twice in one object.
        body: what it says.
    """
    stated = body.get("model")
    if not isinstance(stated, str) or len(stated) > _MAX_NAME_BYTES:
        return None
    return _in_front(raw, stated, model) or _anywhere(raw, model)


def _in_front(raw: bytes, stated: str, model: str) -> bytes | None:
    """As the usual encoders write it, before any object within. No object begins in front of the place that is
    changed, but the outermost: so it is of this one."""
    for member, before in _members(stated):
        start = raw.find(member)
        if start > 0 and raw[start - 1] != _BACKSLASH and raw.find(b"{", 1, start) < 0:
            return raw[: start + before] + _value(model) + raw[start + len(member) :]
    return None


def _anywhere(raw: bytes, model: str) -> bytes | None:
    """Where it is not plain that a place is the outermost, what comes of it is read: by the same parser as `raw`, so
    that it does not matter what that makes of large numbers."""
    wanted: Any = None
    for place, found in enumerate(_MODEL.finditer(raw)):
        if place == _MAX_PLACES:
            return None
        start, end = found.span(1)
        changed = raw[:start] + _value(model) + raw[end:]
        if _is_outermost(raw, found.start(), end):
            return changed
        wanted = wanted or {**_read(raw), "model": model}
        if _read(changed) == wanted:
            return changed
    return None


def _is_outermost(raw: bytes, start: int, end: int) -> bool:
    """No object begins before it but the outermost, or none ends behind it but that."""
    return raw.count(b"{", 0, start) == 1 or raw.count(b"}", end) == 1


def _read(raw: bytes) -> dict[str, Any]:
    """Nothing where another parser than this made sense of it."""
    try:
        read: dict[str, Any] = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return read


@lru_cache(maxsize=1024)
def _members(model: str) -> tuple[tuple[bytes, int], ...]:
    """And how much of each stands before the value."""
    return tuple((name + _value(model), len(name)) for name in (b'"model":', b'"model": '))


@lru_cache(maxsize=1024)
def _value(model: str) -> bytes:
    return orjson.dumps(model)


_SAYING_NO_MORE = frozenset({"content", "role"})


def simple_text(body: Mapping[str, Any]) -> str | None:
    """The text of such a chunk or answer, which may be empty; None of any other, which has to be looked at in general.

    Fields of the delta that are null or empty, as some servers send them all, say nothing. What the choice has beside
    its delta or message (index, finish_reason, logprobs) is not looked at.
    """
    choices = body.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or ("message" in choice and "delta" in choice):
        return None
    part = choice.get("delta") or choice.get("message")
    if type(part) is not dict:
        return None
    text = part.get("content")
    if type(text) is not str or (len(part) > 1 and _says_more(part)):
        return None
    return text


def _says_more(part: Mapping[str, Any]) -> bool:
    return any(value and name not in _SAYING_NO_MORE for name, value in part.items())


@dataclass(slots=True)
class JSONPayload:
    """A whole completion, or one chunk of a stream."""

    body: dict[str, Any]
    raw: bytes | None = None
    """As the upstream wrote it. None: no upstream wrote this, or not in a way that every client could read."""
    held: Held | None = field(default=None, repr=False, compare=False)
    """Of a large one: the room that it takes, as long as it is here."""

    def named(self, model: str) -> bytes:
        """As JSON, under our name for the model: the upstream's own bytes but for the value of `model`."""
        if self.raw is not None:
            renamed = replace_model(self.raw, self.body, model)
            if renamed is not None:
                return renamed
        return encode_json({**self._exact(), "model": model})

    def without(self, name: str) -> JSONPayload:
        """All but this member."""
        return JSONPayload({each: value for each, value in self._exact().items() if each != name})

    def _exact(self) -> dict[str, Any]:
        return self.body if self.raw is None else reparse(self.raw, self.body)


def parse(data: bytes, *, checked: bool = False) -> tuple[Any, bytes | None]:
    """JSON, and its bytes where they may be shown as they are: not where they hold NaN, which is no JSON.

    Args:
        checked: it is known to hold no more than MAX_VALUES_AT_ONCE.

    Raises:
        TooMuchJson: it would take too long.
        ValueError: it is not JSON at all, or nested beyond the stack.
    """
    if len(data) > SHALLOW and not checked:
        check_shape(data, MAX_VALUES_AT_ONCE)
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return decode_json(data), None


def parse_exact(data: bytes) -> tuple[Any, None]:
    """As `parse`, every number as it was written, for what is to be written again. Raises ValueError."""
    check_shape(data, MAX_VALUES_AT_ONCE)
    return decode_json(data), None


async def parsed_in_turns(data: bytes) -> tuple[Any, bytes | None]:
    """As `parse`, of what holds too much for that: in a thread, by a parser that lets others run meanwhile. The usual
    ones hold the interpreter until they are done, in whichever thread. Raises ValueError."""
    return await asyncio.get_running_loop().run_in_executor(_PARSING, _patiently_parsed, data), data


def _patiently_parsed(data: bytes) -> Any:
    return _PATIENT.decode(data.decode())


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


_PARSING = ThreadPoolExecutor(1, "uniroute-parsing")

_json: Any = json  # these parts of it have no types

_PATIENT: Any = json.JSONDecoder(parse_constant=_refuse_constant)

_PATIENT.parse_object, _PATIENT.parse_array = _json.decoder.JSONObject, _json.decoder.JSONArray

_PATIENT.scan_once = _json.scanner.py_make_scanner(_PATIENT)


def reparse(data: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """What is to be written again. orjson, which made `body` of it, rounds whole numbers beyond 64 bits."""
    try:
        read: dict[str, Any] = decode_json(data)
    except ValueError:  # nested deeper than this parser follows
        return body
    return read


_NO_CONTENT = frozenset({"role"})
"""What a delta may have without saying anything. Whatever else is not empty is content, by whatever name."""

_NO_TEXT = frozenset({"role", "id", "type", "index", "format", "data", "url", "image_url", "signature", "annotations"})
"""Parts of a message that are no text which a model wrote: names of things, sounds, pictures, what is encrypted."""

_DEEPEST = 6

EXPECTED_EMPTY_REASONS = frozenset({"length", "content_filter", "max_tokens"})
"""Ends of an answer that another model is not asked to better: the limit was the caller's, the filter a verdict."""


def has_content(body: Mapping[str, Any]) -> bool:
    """Of a chunk or a whole completion."""
    plain = simple_text(body)
    if plain is not None:
        return bool(plain)
    for part in _parts(body):
        for name, value in part.items():
            if value and name not in _NO_CONTENT and _says(value):
                return True
    return False


def _says(value: Any, depth: int = 0) -> bool:
    """Whether anything within is not empty."""
    if depth < _DEEPEST and isinstance(value, Mapping):
        return any(inner and _says(inner, depth + 1) for inner in value.values())
    if depth < _DEEPEST and isinstance(value, list):
        return any(inner and _says(inner, depth + 1) for inner in value)
    return bool(value)


def content_bytes(body: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a model wrote in a chunk or a whole completion; sounds and images are not counted."""
    plain = simple_text(body)
    if plain is not None:
        return text_bytes(plain)
    return sum(_text_size(part) for part in _parts(body))


def _text_size(part: Mapping[str, Any]) -> int:
    """Of the texts in a delta or a message. The same thoughts under two names were written once."""
    texts: list[str] = []
    for name, value in part.items():
        if value and name not in _NO_TEXT:
            _gather(value, texts, 0)
    if len(texts) < 2:
        return text_bytes(texts[0]) if texts else 0
    return sum(text_bytes(text) for text in set(texts))


def _gather(value: Any, texts: list[str], depth: int) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif depth < _DEEPEST and isinstance(value, list):
        for inner in value:
            _gather(inner, texts, depth + 1)
    elif depth < _DEEPEST and isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NO_TEXT:
                _gather(inner, texts, depth + 1)


def is_empty_completion(body: Mapping[str, Any]) -> bool:
    """A whole completion that says nothing, though nothing kept it from speaking."""
    return not has_content(body) and not EXPECTED_EMPTY_REASONS.intersection(finish_reasons(body))


def finish_reasons(body: Mapping[str, Any]) -> set[str]:
    return {choice["finish_reason"] for choice in iter_choices(body) if isinstance(choice.get("finish_reason"), str)}


def is_usage_chunk(chunk: Mapping[str, Any]) -> bool:
    return bool(chunk.get("usage")) and not chunk.get("choices")


def says_no_usage(chunk: Mapping[str, Any]) -> bool:
    """`usage` is null, and it says nothing else."""
    return "usage" in chunk and not chunk["usage"] and not chunk.get("choices") and _ENVELOPE.issuperset(chunk)


_ENVELOPE = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})


def usage_chunk(like: Mapping[str, Any], usage: object) -> dict[str, Any]:
    """The extra chunk of `include_usage`, for upstreams that put usage elsewhere."""
    kept = {name: like[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in like}
    return {**kept, "choices": [], "usage": usage}


def iter_choices(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    choices = body.get("choices")
    if isinstance(choices, list):
        yield from (choice for choice in choices if isinstance(choice, Mapping))


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for choice in iter_choices(body):
        for name in ("message", "delta"):
            part = choice.get(name)
            if isinstance(part, Mapping):
                yield part


Parse = Callable[[bytes], tuple[Any, bytes | None]]
"""An event's data to JSON, and its bytes where they may be shown as they are."""

_DONE = b"[DONE]"

_ODD_CHOICES = "the model sent a chunk whose `choices` are not a list of objects"

_NO_JSON = "the model sent an event that is not JSON"

_REPORTED = "the model reported an error within its stream"

MAX_CHOICES = 1024
"""Of one answer. OpenAI's `n` is 128 at most."""

_MAX_REST = 16 * 2**10
"""Bytes that are kept of what is neither events nor a completion."""

LAST_WORDS_S = 5.0
"""How long more is waited for, usage for example, once every choice has ended."""


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
        room: AnswerRoom | None = None,
        answers: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            room: for what it holds, and for the chunks that it gives, while they are there.
            answers: how many the caller asked for (`n`).
            headers: of the response.
        """
        self._room = room or AnswerRoom()
        self._held = Held(self._room)
        """For the event that is not over."""
        self._cutter = SSEDecoder(self._room.largest)
        self._parse = parse
        self._answers = answers
        self._headers = headers
        self._ends = ChoiceEnds()
        self._head: bytes | None = b""
        """What came before the first byte that says what this is. None: it is known."""
        self._json: _JsonBody | None = None
        self._other: bytes | None = None
        """The beginning of a body that is neither JSON nor events."""
        self._told_done = False
        self.begun = False
        """A chunk has come."""
        self.over = False
        """Nothing more is to be read."""
        self.failure: UpstreamError | None = None
        """What ended it, after the chunks before."""

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
        except TooMuchJson as error:
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
            if cutter.size > SMALL or self._held.size:
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
        if size > SMALL:
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
        except TooMuchJson as error:
            raise _too_much(error) from error
        except ValueError as error:
            self._add_lines(data.split(b"\n"), block, error)
            return
        chunk = _chunk(said, raw, data, self._headers)
        if len(data) > SMALL:
            chunk.held = Held(self._room, len(data))
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

    def __init__(self, room: AnswerRoom) -> None:
        self.bounds = AnswerBounds(room, MAX_VALUES_AT_ONCE)
        self.size = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Raises AnswerTooLarge, NoRoomForAnswer."""
        self.bounds.add(piece)
        self._pieces.append(piece)
        self.size += len(piece)

    def whole(self) -> bytes:
        return b"".join(self._pieces)


class CompletionReader:
    """Feed it the body of an answer that is to be no stream; a stream of events is put together all the same."""

    def __init__(
        self,
        model: str,
        bounds: AnswerBounds,
        parse: Parse | None = None,
        *,
        answers: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """As ChunkReader.

        Args:
            bounds: of the body, and what holds its room; the completion has that then.
            parse: None: as `parse`.
        """
        self._model = model
        self._bounds = bounds
        self._parse = parse
        self._answers = answers
        self._headers = headers
        self._pieces: list[bytes] = []
        self._is_known = False
        """Whether it is JSON or events."""
        self._events: ChunkReader | None = None
        self._joined = Joined()

    @property
    def of_events(self) -> bool:
        """It was no JSON that came, as far as is known."""
        return self._events is not None

    @property
    def finished(self) -> bool:
        """The answer has come to its end, as far as that shows before the end of the body."""
        return self._events is not None and self._events.finished

    @property
    def over(self) -> bool:
        """Nothing more is to be read."""
        return self._events is not None and self._events.over

    def feed(self, piece: bytes) -> None:
        """Raises AnswerTooLarge, NoRoomForAnswer."""
        self._bounds.add_bytes(len(piece))
        if self._events is not None:
            self._join(self._events.feed(piece))
            return
        self._pieces.append(piece)
        if self._is_known:
            self._bounds.look_at(piece)
            return
        head = b"".join(self._pieces)
        form = form_of(head)
        if form is None:
            self._pieces = [head[-_MAX_REST:]]
            return
        self._is_known = True
        if form == "events":
            self._pieces = []
            self._events = self._event_reader()
            self._join(self._events.feed(head))
        else:
            self._bounds.look_at(head)

    def _event_reader(self) -> ChunkReader:
        """Of events that are counted as a whole here."""
        room = AnswerRoom(self._bounds.room.largest)
        return ChunkReader(parse_exact, room=room, answers=self._answers, headers=self._headers)

    def break_off(self) -> bool:
        """The connection broke. Whether the answer had ended before."""
        return self._events is not None and self._events.break_off()

    def completion(self) -> JSONPayload:
        """Once all has come. Raises UpstreamFailure."""
        if self._events is not None:
            return self._put_together(self._events)
        said = self._said()
        try:
            read, raw = parse(said, checked=len(said) > SMALL) if self._parse is None else self._parse(said)
        except ValueError as error:
            return self._of_no_json(said, error)
        return self._of_json(read, raw)

    async def completion_in_turns(self) -> JSONPayload:
        """As `completion`, and others get a turn while much is parsed."""
        if self._events is not None or self._bounds.values <= MAX_VALUES_AT_ONCE:
            return self.completion()
        said = self._said()
        try:
            read, raw = await parsed_in_turns(said)
        except ValueError as error:
            return self._of_no_json(said, error)
        return self._of_json(read, raw)

    def _said(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)).removeprefix(codecs.BOM_UTF8)

    def _of_json(self, read: Any, raw: bytes | None) -> JSONPayload:
        completion = completion_of(self._model, read, raw, self._headers)
        completion.held = self._bounds.held
        return completion

    def _of_no_json(self, said: bytes, error: ValueError) -> JSONPayload:
        """It may only have begun like JSON."""
        if isinstance(error, TooMuchJson):
            raise AnswerTooLarge(f"the model's answer {error}") from error
        events = self._event_reader()
        self._join(events.feed(said))
        self._join(events.close())
        if events.failure is None and not events.begun:
            raise not_a_completion(self._model, said, self._headers) from None
        return self._put_together(events)

    def _put_together(self, events: ChunkReader) -> JSONPayload:
        if not events.over:
            self._join(events.close())
        if (fault := events.fault) is not None:
            raise fault
        return JSONPayload(self._joined.completion(), held=self._bounds.held)

    def _join(self, block: list[JSONPayload]) -> None:
        for chunk in block:
            self._joined.add(chunk.body)


def completion_of(model: str, said: Any, raw: bytes | None, headers: Mapping[str, str] | None = None) -> JSONPayload:
    """Raises UpstreamFailure: it is none, or tells of an error."""
    if not isinstance(said, dict) or error_in(said) is not None or not has_choices(said):
        raise not_a_completion(model, said, headers)
    if not said.get("usage"):
        for choice in said["choices"]:
            if isinstance(choice.get("usage"), dict):
                whole = said if raw is None else reparse(raw, said)
                return JSONPayload({**whole, "usage": choice["usage"]})
    return JSONPayload(said, raw)


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
    except TooMuchJson as error:
        raise _too_much(error) from error
    except ValueError as error:
        raise UpstreamError(_NO_JSON) from error
    return _chunk(said, raw, data)


def _too_much(error: TooMuchJson) -> AnswerTooLarge:
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
