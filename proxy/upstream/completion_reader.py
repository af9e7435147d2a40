from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from proxy.errors import AnswerTooLarge
from proxy.json_limits import MAX_VALUES, MAX_VALUES_AT_ONCE, SMALL_BYTES, JSONTooLarge
from proxy.storage.usage import usage_of
from proxy.upstream.chunk_reader import _MAX_REST, ChunkReader, Json, Parse, form_of, has_choices, place_of
from proxy.upstream.errors import error_in, not_a_completion
from proxy.upstream.payload import JSONPayload, parse, parse_exact, parsed_in_turns, reparse
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory

# Is told of so many values more. Raises AnswerTooLarge.
_Hold = Callable[[int], None]

# Texts that are stated, not written bit by bit. A name that comes in pieces is put together all the same.
_IDENTIFIERS = frozenset({"id", "type", "role", "index", "format", "expires_at", "name"})

_OF_THE_STREAM = frozenset({"choices", "usage", "object", "model", "error"})


class Joined:
    """Give it the chunks of a stream; it makes the completion of them. Holds what was written, not the chunks, and no
    more values of it than a whole answer may have."""

    def __init__(self) -> None:
        self._left = MAX_VALUES
        self._beside: Json = {}
        self._usage: Any = None
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """`chunk`: its choices are objects with a `delta`. Raises AnswerTooLarge."""
        for name, value in chunk.items():
            if name not in _OF_THE_STREAM and value not in (None, "", [], {}):
                if name in ("id", "created"):  # one answer has one of each, whatever its chunks say
                    self._beside.setdefault(name, value)
                else:
                    _put(self._beside, name, value, self._hold)
            elif name == "model" and value:
                self._beside["model"] = value
        self._usage = usage_of(chunk) or self._usage
        for place, choice in enumerate(chunk["choices"]):
            number = place_of(choice, place)
            if number not in self._choices:
                self._choices[number] = _Choice(self._hold)
            self._choices[number].add(choice)

    def _hold(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise AnswerTooLarge(f"the model's answer holds more than {MAX_VALUES} values")

    def completion(self) -> Json:
        choices = [self._choices[number].whole(number) for number in sorted(self._choices)]
        completion = {"id": "", "object": "chat.completion", "created": 0, **self._beside, "choices": choices}
        return completion if self._usage is None else {**completion, "usage": self._usage}


class _Choice:
    """One choice of the answer, as it grows."""

    def __init__(self, hold: _Hold) -> None:
        self._hold = hold
        self._delta = _Parts(hold)
        self._message: Json | None = None
        self._logprobs = _Parts(hold)
        self._beside: Json = {}

    def add(self, choice: Mapping[str, Any]) -> None:
        for name, value in choice.items():
            if name == "delta" and isinstance(value, dict):
                self._delta.add(value)
            elif name == "message" and isinstance(value, dict):
                self._message = value  # some servers repeat all of it beside each delta
            elif name == "logprobs" and isinstance(value, dict):
                self._logprobs.add(value)
            elif name not in _GROWING and value not in (None, ""):
                _put(self._beside, name, value, self._hold)

    def whole(self, number: int) -> Json:
        message = {"role": "assistant", "content": None, **(self._delta.whole() or self._message or {})}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [_less_index(call) for call in calls]
        ended = {"finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}
        logprobs = self._logprobs.whole()
        return {"index": number, "message": message, "logprobs": logprobs or None, **ended, **self._beside}


_GROWING = frozenset({"index", "delta", "message", "logprobs", "usage"})


def _less_index(call: Any) -> Any:
    return {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call


class _Parts:
    """An object that is written bit by bit: texts grow, objects and numbered lists within grow as this does."""

    def __init__(self, hold: _Hold) -> None:
        hold(1)
        self._hold = hold
        self._texts: dict[str, list[str]] = {}
        self._objects: dict[str, _Parts] = {}
        self._lists: dict[str, _Items] = {}
        self._others: Json = {}
        self._order: dict[str, None] = {}

    def add(self, part: Mapping[str, Any], depth: int = 0) -> None:
        for name, value in part.items():
            if value is None:
                continue
            _put(self._order, name, None, self._hold)
            if isinstance(value, str):
                self._write(name, value)
            elif isinstance(value, dict) and depth < _DEEPEST:
                self._object(name).add(value, depth + 1)
            elif isinstance(value, list) and depth < _DEEPEST:
                self._list(name).add(value, depth + 1)
            else:
                self._others[name] = value

    def _object(self, name: str) -> _Parts:
        if name not in self._objects:
            self._objects[name] = _Parts(self._hold)
        return self._objects[name]

    def _list(self, name: str) -> _Items:
        if name not in self._lists:
            self._lists[name] = _Items(self._hold)
        return self._lists[name]

    def _write(self, name: str, text: str) -> None:
        pieces = self._texts.setdefault(name, [])
        if name not in _IDENTIFIERS:
            pieces.append(text)
        elif name == "name":
            if text and text not in pieces:  # some servers repeat it with every piece of the arguments
                pieces.append(text)
        elif text and not pieces:
            pieces.append(text)

    @property
    def id(self) -> str | None:
        return "".join(self._texts.get("id", ())) or None

    def whole(self) -> Json:
        return dict(self._items())

    def _items(self) -> Iterator[tuple[str, Any]]:
        for name in self._order:
            text = "".join(self._texts.get(name, ()))
            if name in self._lists:  # Mistral thinks in parts, and answers in a text
                yield name, self._lists[name].whole() + ([{"type": "text", "text": text}] if text else [])
            elif name in self._objects:
                yield name, self._objects[name].whole()
            elif name not in self._texts:
                yield name, self._others[name]
            elif text or name not in _IDENTIFIERS:
                yield name, text


# Levels of objects that are put together; what is deeper is taken as it came last.
_DEEPEST = 6


class _Items:
    """A list that is written bit by bit. Objects with an `index` grow; all others are one behind the other."""

    def __init__(self, hold: _Hold) -> None:
        self._hold = hold
        self._items: list[Any] = []
        self._numbered: dict[int, _Parts] = {}

    def add(self, items: list[Any], depth: int) -> None:
        for item in items:
            if not isinstance(item, dict) or not _goes_on(item):
                self._hold(_values_in(item))
                self._items.append(item)
                continue
            self._parts_of(item).add(item, depth)

    def _parts_of(self, item: Json) -> _Parts:
        """Those that it goes on with. Another id under a known number is another call, and so is one with no number."""
        number, id_ = item.get("index"), item.get("id")
        known = self._numbered.get(number) if type(number) is int else next(reversed(self._numbered.values()), None)
        if known is not None and (not id_ or known.id in (None, id_)) and (type(number) is int or not id_):
            return known
        parts = _Parts(self._hold)
        self._items.append(parts)
        key = number if type(number) is int else -1 - len(self._items)
        self._numbered.pop(key, None)
        self._numbered[key] = parts
        return parts

    def whole(self) -> list[Any]:
        return [item.whole() if isinstance(item, _Parts) else item for item in self._items]


def _put(into: dict[str, Any], name: str, value: Any, hold: _Hold) -> None:
    if name not in into:
        hold(1)
    into[name] = value


def _values_in(value: Any) -> int:
    found, left = 1, [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            inner = list(inner.values())
        if isinstance(inner, list):
            found += len(inner)
            left += inner
    return found


def _goes_on(item: Json) -> bool:
    """Whether it may be a piece of something: a numbered part, or a call."""
    return type(item.get("index")) is int or "function" in item or "custom" in item


class CompletionReader:
    """Feed it the body of an answer that is to be no stream; a stream of events is put together all the same."""

    def __init__(
        self,
        model: str,
        bounds: ResponseBounds,
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
        # Whether it is JSON or events.
        self._is_known = False
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
        room = ResponseMemory(self._bounds.room.largest)
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
            read, raw = parse(said, checked=len(said) > SMALL_BYTES) if self._parse is None else self._parse(said)
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
        if isinstance(error, JSONTooLarge):
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
