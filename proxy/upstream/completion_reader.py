from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from proxy.errors import ResponseTooLarge
from proxy.json_text import MAX_VALUES_AT_ONCE, SMALL_BYTES, JSONTooLarge, count_values
from proxy.storage.usage import combine_usage, usage_of
from proxy.upstream.chunk_reader import (
    MAX_OTHER_BYTES,
    ChunkReader,
    JSONObject,
    Parse,
    body_format,
    choice_index,
    is_completion,
)
from proxy.upstream.errors import find_error, not_a_completion
from proxy.upstream.payload import JSONPayload, parse, parse_exact, parse_in_thread, reparse
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory, ValueLimit

# Counts so many more values. Raises ResponseTooLarge.
_CountValues = Callable[[int], None]

# Strings that are stated at once, not written bit by bit. A name that comes in pieces is put together all the same.
_IDENTIFIERS = frozenset({"id", "type", "role", "index", "format", "expires_at", "name"})

# Members of a chunk that are not copied from it as they are.
_CHUNK_MEMBERS = frozenset({"choices", "usage", "object", "model", "error"})

# Members of a choice that are not copied from it as they are.
_CHOICE_MEMBERS = frozenset({"index", "delta", "message", "logprobs", "usage"})

# Levels of objects that are put together. Of what is deeper the last value stays.
_MAX_NESTING = 6


class AnswerBody:
    """Collect the body of a whole answer: one JSON text, or the events of it, which are put together as they come."""

    def __init__(self, bounds: ResponseBounds) -> None:
        """`bounds`: of the body; the answer then holds its memory."""
        self._bounds = bounds
        self._pieces: list[bytes] = []
        # Whether it is decided that the body is JSON or events.
        self._decided = False
        self._events: ChunkReader | None = None

    @property
    def is_events(self) -> bool:
        """Return whether the body is known to be a stream of events."""
        return self._events is not None

    @property
    def finished(self) -> bool:
        """Return whether the answer is complete, as far as that shows before the end of the body."""
        return self._events is not None and self._events.finished

    @property
    def done(self) -> bool:
        """Return whether nothing more is to be read."""
        return self._events is not None and self._events.done

    def feed(self, piece: bytes) -> None:
        """Raises ResponseTooLarge, ResponseMemoryFull."""
        self._bounds.add_bytes(len(piece))
        if self._events is not None:
            self._add_chunks(self._events.feed(piece))
            return
        self._pieces.append(piece)
        if self._decided:
            self._bounds.count_values(piece)
            return
        start = b"".join(self._pieces)
        form = body_format(start)
        if form is None:
            self._pieces = [start[-MAX_OTHER_BYTES:]]
            return
        self._decided = True
        if form == "events":
            self._pieces = []
            self._events = self._new_event_reader()
            self._add_chunks(self._events.feed(start))
        else:
            self._bounds.count_values(start)

    def break_off(self) -> bool:
        """Note that the connection broke, and return whether the answer was complete."""
        return self._events is not None and self._events.break_off()

    def _new_event_reader(self) -> ChunkReader:
        """Return a reader with `_event_memory`."""
        raise NotImplementedError

    def _add_chunks(self, block: list[JSONPayload]) -> None:
        raise NotImplementedError

    def _event_memory(self) -> ResponseMemory:
        """Return a memory that is no share of the process's: all of the body is counted here."""
        return ResponseMemory(self._bounds.memory.max_response_bytes)

    def _end_events(self, events: ChunkReader) -> None:
        """Read what is left of the events. Raises UpstreamError if they are no complete answer."""
        if not events.done:
            self._add_chunks(events.close())
        if (error := events.final_error) is not None:
            raise error

    def _take_data(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)).removeprefix(codecs.BOM_UTF8)


class CompletionReader(AnswerBody):
    """Turn the bytes of a response into one completion. A stream of events is put together all the same."""

    def __init__(
        self,
        model: str,
        bounds: ResponseBounds,
        parse: Parse | None = None,
        *,
        choices: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            bounds: of the body; the completion then holds its memory.
            parse: None for `parse`.
            choices: how many the caller asked for (`n`).
            headers: of the response.
        """
        super().__init__(bounds)
        self._model = model
        self._parse = parse
        self._choices = choices
        self._headers = headers
        self._builder = CompletionBuilder()

    def _new_event_reader(self) -> ChunkReader:
        return ChunkReader(parse_exact, memory=self._event_memory(), choices=self._choices, headers=self._headers)

    def completion(self) -> JSONPayload:
        """Return the completion, once all of the body has come. Raises UpstreamError."""
        if self._events is not None:
            return self._build(self._events)
        data = self._take_data()
        try:
            value, raw = parse(data, checked=len(data) > SMALL_BYTES) if self._parse is None else self._parse(data)
        except ValueError as error:
            return self._read_as_events(data, error)
        return self._from_json(value, raw)

    async def completion_in_thread(self) -> JSONPayload:
        """Return the completion as `completion` does. Parse a large one in a thread, so that others get a turn."""
        if self._events is not None or self._bounds.values <= MAX_VALUES_AT_ONCE:
            return self.completion()
        data = self._take_data()
        try:
            value, raw = await parse_in_thread(data)
        except ValueError as error:
            return self._read_as_events(data, error)
        return self._from_json(value, raw)

    def _from_json(self, value: Any, raw: bytes | None) -> JSONPayload:
        completion = check_completion(self._model, value, raw, self._headers)
        completion.held = self._bounds.held
        return completion

    def _read_as_events(self, data: bytes, error: ValueError) -> JSONPayload:
        """Read as events what may only have started like JSON."""
        if isinstance(error, JSONTooLarge):
            raise ResponseTooLarge(f"the model's answer {error}") from error
        events = self._new_event_reader()
        self._add_chunks(events.feed(data))
        self._add_chunks(events.close())
        if events.error is None and not events.started:
            raise not_a_completion(self._model, data, self._headers) from None
        return self._build(events)

    def _build(self, events: ChunkReader) -> JSONPayload:
        self._end_events(events)
        return JSONPayload(self._builder.completion(), held=self._bounds.held)

    def _add_chunks(self, block: list[JSONPayload]) -> None:
        for chunk in block:
            self._builder.add(chunk.body)


def check_completion(
    model: str, value: Any, raw: bytes | None, headers: Mapping[str, str] | None = None
) -> JSONPayload:
    """Return a parsed body as a completion. Raises UpstreamError if it is none, or an error."""
    if not isinstance(value, dict) or find_error(value) is not None or not is_completion(value):
        raise not_a_completion(model, value, headers)
    if not value.get("usage"):
        for choice in value["choices"]:
            if isinstance(choice.get("usage"), dict):
                whole = value if raw is None else reparse(raw, value)
                return JSONPayload({**whole, "usage": choice["usage"]})
    return JSONPayload(value, raw)


class CompletionBuilder:
    """Build a completion from the chunks of a stream.

    It holds what was written, not the chunks, and no more values than a whole completion may have.
    """

    def __init__(self) -> None:
        self._count_values = ValueLimit().add
        self._members: JSONObject = {}
        self._usage: Any = None
        self._choices: dict[int, _ChoiceBuilder] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Add a chunk whose choices are objects with a `delta`. Raises ResponseTooLarge."""
        for name, value in chunk.items():
            if name not in _CHUNK_MEMBERS and value not in (None, "", [], {}):
                if name in ("id", "created"):  # a completion has one of each, whatever its chunks say
                    self._members.setdefault(name, value)
                else:
                    _set(self._members, name, value, self._count_values)
            elif name == "model" and value:
                self._members["model"] = value
        if usage := usage_of(chunk):
            self._usage = combine_usage(self._usage, usage)
        for position, choice in enumerate(chunk["choices"]):
            index = choice_index(choice, position)
            if index not in self._choices:
                self._choices[index] = _ChoiceBuilder(self._count_values)
            self._choices[index].add(choice)

    def completion(self) -> JSONObject:
        choices = [self._choices[index].choice(index) for index in sorted(self._choices)]
        completion = {"id": "", "object": "chat.completion", "created": 0, **self._members, "choices": choices}
        return completion if self._usage is None else {**completion, "usage": self._usage}


class _ChoiceBuilder:
    def __init__(self, count_values: _CountValues) -> None:
        self._count_values = count_values
        self._delta = _ObjectBuilder(count_values)
        self._message: JSONObject | None = None
        self._logprobs = _ObjectBuilder(count_values)
        self._members: JSONObject = {}

    def add(self, choice: Mapping[str, Any]) -> None:
        for name, value in choice.items():
            if name == "delta" and isinstance(value, dict):
                self._delta.add(value)
            elif name == "message" and isinstance(value, dict):
                self._message = value  # some servers repeat all of it beside each delta
            elif name == "logprobs" and isinstance(value, dict):
                self._logprobs.add(value)
            elif name not in _CHOICE_MEMBERS and value not in (None, ""):
                _set(self._members, name, value, self._count_values)

    def choice(self, index: int) -> JSONObject:
        message = {"role": "assistant", "content": None, **(self._delta.build() or self._message or {})}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [_without_index(call) for call in calls]
        default = {"finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}
        logprobs = self._logprobs.build()
        return {"index": index, "message": message, "logprobs": logprobs or None, **default, **self._members}


def _without_index(call: Any) -> Any:
    return {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call


class _ObjectBuilder:
    """An object that is written bit by bit: strings are appended, objects and lists within grow in the same way."""

    def __init__(self, count_values: _CountValues) -> None:
        count_values(1)
        self._count_values = count_values
        self._strings: dict[str, list[str]] = {}
        self._objects: dict[str, _ObjectBuilder] = {}
        self._lists: dict[str, _ListBuilder] = {}
        self._others: JSONObject = {}
        self._order: dict[str, None] = {}

    def add(self, part: Mapping[str, Any], depth: int = 0) -> None:
        for name, value in part.items():
            if value is None:
                continue
            _set(self._order, name, None, self._count_values)
            if isinstance(value, str):
                self._add_string(name, value)
            elif isinstance(value, dict) and depth < _MAX_NESTING:
                if name not in self._objects:
                    self._objects[name] = _ObjectBuilder(self._count_values)
                self._objects[name].add(value, depth + 1)
            elif isinstance(value, list) and depth < _MAX_NESTING:
                if name not in self._lists:
                    self._lists[name] = _ListBuilder(self._count_values)
                self._lists[name].add(value, depth + 1)
            else:
                self._others[name] = value

    def _add_string(self, name: str, text: str) -> None:
        pieces = self._strings.setdefault(name, [])
        if name not in _IDENTIFIERS:
            pieces.append(text)
        elif name == "name":
            if text and text not in pieces:  # some servers repeat it with every piece of the arguments
                pieces.append(text)
        elif text and not pieces:
            pieces.append(text)

    @property
    def id(self) -> str | None:
        return "".join(self._strings.get("id", ())) or None

    def build(self) -> JSONObject:
        return dict(self._items())

    def _items(self) -> Iterator[tuple[str, Any]]:
        for name in self._order:
            text = "".join(self._strings.get(name, ()))
            if name in self._lists:  # Mistral's thoughts are parts of a list, and its answer is a string
                yield name, self._lists[name].build() + ([{"type": "text", "text": text}] if text else [])
            elif name in self._objects:
                yield name, self._objects[name].build()
            elif name not in self._strings:
                yield name, self._others[name]
            elif text or name not in _IDENTIFIERS:
                yield name, text


class _ListBuilder:
    """A list that is written bit by bit. Objects with an `index` grow; all other items are appended."""

    def __init__(self, count_values: _CountValues) -> None:
        self._count_values = count_values
        self._items: list[Any] = []
        self._by_index: dict[int, _ObjectBuilder] = {}

    def add(self, items: list[Any], depth: int) -> None:
        for item in items:
            if isinstance(item, dict) and _may_be_part(item):
                self._builder_of(item).add(item, depth)
            else:
                self._count_values(count_values(item))
                self._items.append(item)

    def _builder_of(self, item: JSONObject) -> _ObjectBuilder:
        """Find the object that an item continues, or begin another.

        Another id under a known index is another call, and so is an id without an index.
        """
        index, id_ = item.get("index"), item.get("id")
        known = self._by_index.get(index) if type(index) is int else next(reversed(self._by_index.values()), None)
        if known is not None and (not id_ or known.id in (None, id_)) and (type(index) is int or not id_):
            return known
        builder = _ObjectBuilder(self._count_values)
        self._items.append(builder)
        key = index if type(index) is int else -1 - len(self._items)
        self._by_index.pop(key, None)
        self._by_index[key] = builder
        return builder

    def build(self) -> list[Any]:
        return [item.build() if isinstance(item, _ObjectBuilder) else item for item in self._items]


def _set(into: dict[str, Any], name: str, value: Any, count_values: _CountValues) -> None:
    if name not in into:
        count_values(1)
    into[name] = value


def _may_be_part(item: JSONObject) -> bool:
    """Return whether an item may be a piece of something: it has an index, or is a tool call."""
    return type(item.get("index")) is int or "function" in item or "custom" in item
