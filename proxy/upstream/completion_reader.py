from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from proxy.errors import AnswerTooLarge
from proxy.safety.json_shape import MAX_VALUES
from proxy.storage.usage import usage_of

Json = dict[str, Any]

_Hold = Callable[[int], None]
"""Is told of so many values more. Raises AnswerTooLarge."""

_IDENTIFIERS = frozenset({"id", "type", "role", "index", "format", "expires_at", "name"})
"""Texts that are stated, not written bit by bit. A name that comes in pieces is put together all the same."""

_OF_THE_STREAM = frozenset({"choices", "usage", "object", "model", "error"})

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


_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
"""Of an event stream; `error` is llama.cpp's."""


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


_DEEPEST = 6
"""Levels of objects that are put together; what is deeper is taken as it came last."""


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
