from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Never

import orjson

from proxy.json_text import MAX_VALUES_AT_ONCE, SHALLOW_BYTES, check_limits, decode_json, encode_json
from proxy.upstream.response_memory import HeldMemory
from router_core.text import text_bytes

_MODEL = re.compile(rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]++|\\.)*+")')

# Members called `model` that are tried; tools and schemas may have some of their own.
_MAX_MATCHES = 8

# A longer name is not searched for as it is.
_MAX_NAME_BYTES = 256

_BACKSLASH = ord("\\")


def replace_model(raw: bytes, body: Mapping[str, Any], model: str) -> bytes | None:
    """Replace the value of `model` in JSON bytes, and leave every other byte as it is.

    Args:
        raw: a JSON object without a key twice in one object.
        body: what it was parsed to.

    Returns:
        None: its model is no string, or the place is not found quickly.
    """
    stated = body.get("model")
    if not isinstance(stated, str) or len(stated) > _MAX_NAME_BYTES:
        return None
    return _replace_near_start(raw, stated, model) or _replace_anywhere(raw, model)


def replace_inner_model(raw: bytes, body: Mapping[str, Any], within: str, model: str) -> bytes | None:
    """Replace the value of `model` in the object `within`, as `replace_model` does in the outermost."""
    wanted = _parse_object(raw)
    inner = wanted.get(within)
    if not isinstance(inner, dict) or not isinstance(body[within].get("model"), str):
        return None
    inner["model"] = model
    for number, match in enumerate(_MODEL.finditer(raw)):
        if number == _MAX_MATCHES:
            return None
        start, end = match.span(1)
        changed = raw[:start] + _encode_name(model) + raw[end:]
        if _parse_object(changed) == wanted:
            return changed
    return None


def _replace_near_start(raw: bytes, stated: str, model: str) -> bytes | None:
    """Replace a member that the usual encoders wrote, before any inner object.

    Only the outermost object begins before that place, so the member belongs to it.
    """
    for member, before in _members(stated):
        start = raw.find(member)
        if start > 0 and raw[start - 1] != _BACKSLASH and raw.find(b"{", 1, start) < 0:
            return raw[: start + before] + _encode_name(model) + raw[start + len(member) :]
    return None


def _replace_anywhere(raw: bytes, model: str) -> bytes | None:
    """Try every member called `model`. Where it may belong to an inner object, compare what the bytes parse to.

    Both sides are parsed by the same parser, so that it does not matter what that makes of large numbers.
    """
    wanted: Any = None
    for number, match in enumerate(_MODEL.finditer(raw)):
        if number == _MAX_MATCHES:
            return None
        start, end = match.span(1)
        changed = raw[:start] + _encode_name(model) + raw[end:]
        # Only the outermost object begins before the member, or only that ends after it.
        if raw.count(b"{", 0, match.start()) == 1 or raw.count(b"}", end) == 1:
            return changed
        wanted = wanted or {**_parse_object(raw), "model": model}
        if _parse_object(changed) == wanted:
            return changed
    return None


def _parse_object(raw: bytes) -> dict[str, Any]:
    """Parse an object, or return an empty one if only a more lenient parser can."""
    try:
        parsed: dict[str, Any] = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return parsed


@lru_cache(maxsize=1024)
def _members(model: str) -> tuple[tuple[bytes, int], ...]:
    """Return the usual spellings of the member, and how many bytes of each stand before the value."""
    return tuple((name + _encode_name(model), len(name)) for name in (b'"model":', b'"model": '))


@lru_cache(maxsize=1024)
def _encode_name(model: str) -> bytes:
    return orjson.dumps(model)


_PLAIN_FIELDS = frozenset({"content", "role"})


def simple_text(body: Mapping[str, Any]) -> str | None:
    """Return the text of a chunk or completion that is text alone, quickly. None for any other.

    The text may be empty. Null and empty fields of the delta, which some servers always send, do not count. Members of
    the choice beside its delta or message (index, finish_reason, logprobs) are ignored.
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
    if type(text) is not str or not (part.keys() <= _PLAIN_FIELDS or not _has_other_fields(part)):
        return None
    return text


def _has_other_fields(part: Mapping[str, Any]) -> bool:
    return any(value and name not in _PLAIN_FIELDS for name, value in part.items())


@dataclass(slots=True)
class JSONPayload:
    """A whole completion, or one chunk of a stream."""

    body: dict[str, Any]
    raw: bytes | None = None
    """The upstream's bytes. None: no upstream wrote them, or not every client could read them."""
    held: HeldMemory | None = field(default=None, repr=False, compare=False)
    """The memory that a large payload holds as long as it exists."""

    def with_model(self, model: str) -> bytes:
        """Encode it under our name of the model: the upstream's own bytes, but for the value of `model`."""
        if self.raw is not None:
            renamed = replace_model(self.raw, self.body, model)
            if renamed is not None:
                return renamed
        return encode_json({**self._exact(), "model": model})

    def without(self, name: str) -> JSONPayload:
        """Return a copy without this member."""
        return JSONPayload({each: value for each, value in self._exact().items() if each != name})

    def with_usage(self, usage: object) -> JSONPayload:
        """Return a copy with another report of usage."""
        return JSONPayload({**self._exact(), "usage": usage})

    def _exact(self) -> dict[str, Any]:
        return self.body if self.raw is None else reparse(self.raw, self.body)


# Members of an event with the answer so far, under its own `model`.
_ANSWER_MEMBERS = ("message", "response")


@dataclass(slots=True)
class NativePayload(JSONPayload):
    """A whole answer of another API than chat completions, or one event of a stream.

    `body` is a completion or a chunk that says the same, `raw` is the upstream's JSON.
    """

    native: dict[str, Any] = field(default_factory=dict)
    """What `raw` was parsed to."""
    event_type: bytes | None = None
    """Of an event; an empty one for an event without a type. None: it is a whole answer."""

    def with_model(self, model: str) -> bytes:
        """Return what the client is sent, under our name of the model: a whole answer, or an event with its lines."""
        if self.event_type is None:
            return self._answer(model)
        data = self._event(model).replace(b"\n", b"\ndata: ")
        return b"event: %b\ndata: %b\n\n" % (self.event_type, data) if self.event_type else b"data: %b\n\n" % data

    def _exact(self) -> dict[str, Any]:
        return self.body

    def _answer(self, model: str) -> bytes:
        raw = self._raw_or_encoded()
        return replace_model(raw, self.native, model) or encode_json({**reparse(raw, self.native), "model": model})

    def _event(self, model: str) -> bytes:
        raw = self._raw_or_encoded()
        for name in _ANSWER_MEMBERS:
            answer = self.native.get(name)
            if isinstance(answer, dict) and "model" in answer:
                renamed = replace_inner_model(raw, self.native, name, model)
                if renamed is None:
                    exact = reparse(raw, self.native)
                    renamed = encode_json({**exact, name: {**exact[name], "model": model}})
                return renamed
        return raw

    def _raw_or_encoded(self) -> bytes:
        return encode_json(self.native) if self.raw is None else self.raw


def parse(data: bytes, *, checked: bool = False) -> tuple[Any, bytes | None]:
    """Parse JSON, and return its bytes too if they may be passed on: not if they hold NaN, which is no JSON.

    Args:
        checked: whether it is known to hold at most MAX_VALUES_AT_ONCE.

    Raises:
        JSONTooLarge: it would take too long.
        ValueError: it is not JSON at all, or nested beyond the stack.
    """
    if len(data) > SHALLOW_BYTES and not checked:
        check_limits(data, MAX_VALUES_AT_ONCE)
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return decode_json(data), None


def parse_exact(data: bytes) -> tuple[Any, None]:
    """Parse JSON and keep every number as it was written, to encode it again. Raises ValueError."""
    check_limits(data, MAX_VALUES_AT_ONCE)
    return decode_json(data), None


async def parse_in_thread(data: bytes) -> tuple[Any, bytes | None]:
    """Parse JSON that is too large for `parse`, in a thread and in pure Python. Raises ValueError.

    Parsers in C hold the interpreter until they are done, in whichever thread.
    """
    return await asyncio.get_running_loop().run_in_executor(_EXECUTOR, _parse_in_python, data), data


def _parse_in_python(data: bytes) -> Any:
    return _PYTHON_DECODER.decode(data.decode())


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


_EXECUTOR = ThreadPoolExecutor(1, "uniroute-parsing")

# The parts of `json` that are written in Python. They have no types.
_json: Any = json
_PYTHON_DECODER: Any = json.JSONDecoder(parse_constant=_refuse_constant)
_PYTHON_DECODER.parse_object, _PYTHON_DECODER.parse_array = _json.decoder.JSONObject, _json.decoder.JSONArray
_PYTHON_DECODER.scan_once = _json.scanner.py_make_scanner(_PYTHON_DECODER)


def reparse(data: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """Parse again what is to be encoded again: orjson, which made `body`, rounds integers beyond 64 bits."""
    try:
        parsed: dict[str, Any] = decode_json(data)
    except ValueError:  # nested deeper than this parser follows
        return body
    return parsed


# Members of a delta that are no content. Any other that is not empty is content, whatever its name.
_NOT_CONTENT = frozenset({"role"})

# Members of a message that are no text written by a model: names, sounds, pictures, encrypted reasoning.
_NOT_TEXT = frozenset({"role", "id", "type", "index", "format", "data", "url", "image_url", "signature", "annotations"})

MAX_NESTING = 6

# Reasons for which an empty answer is accepted: the limit was the caller's, and a filter has decided.
EXPECTED_EMPTY_REASONS = frozenset({"length", "content_filter", "max_tokens"})


def has_content(body: Mapping[str, Any]) -> bool:
    """Return whether a chunk or completion has any content."""
    plain = simple_text(body)
    if plain is not None:
        return bool(plain)
    for part in _messages(body):
        for name, value in part.items():
            if value and name not in _NOT_CONTENT and _is_nonempty(value):
                return True
    return False


def _is_nonempty(value: Any, depth: int = 0) -> bool:
    """Return whether anything within is not empty."""
    if depth < MAX_NESTING and isinstance(value, Mapping):
        return any(inner and _is_nonempty(inner, depth + 1) for inner in value.values())
    if depth < MAX_NESTING and isinstance(value, list):
        return any(inner and _is_nonempty(inner, depth + 1) for inner in value)
    return bool(value)


def content_bytes(body: Mapping[str, Any]) -> int:
    """Count the UTF-8 bytes of the text in a chunk or completion; sounds and images do not count."""
    plain = simple_text(body)
    if plain is not None:
        return text_bytes(plain)
    return sum(_text_size(part) for part in _messages(body))


def _text_size(part: Mapping[str, Any]) -> int:
    """Count the bytes of the texts in a delta or message. Equal texts under two names were written once."""
    texts: list[str] = []
    for name, value in part.items():
        if value and name not in _NOT_TEXT:
            _collect_texts(value, texts, 0)
    if len(texts) < 2:
        return text_bytes(texts[0]) if texts else 0
    return sum(text_bytes(text) for text in set(texts))


def _collect_texts(value: Any, texts: list[str], depth: int) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif depth < MAX_NESTING and isinstance(value, list):
        for inner in value:
            _collect_texts(inner, texts, depth + 1)
    elif depth < MAX_NESTING and isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NOT_TEXT:
                _collect_texts(inner, texts, depth + 1)


def is_empty_completion(body: Mapping[str, Any]) -> bool:
    """Return whether a whole completion is empty for no accepted reason."""
    return not has_content(body) and not EXPECTED_EMPTY_REASONS.intersection(finish_reasons(body))


def finish_reasons(body: Mapping[str, Any]) -> set[str]:
    return {choice["finish_reason"] for choice in iter_choices(body) if isinstance(choice.get("finish_reason"), str)}


def is_usage_chunk(chunk: Mapping[str, Any]) -> bool:
    return bool(chunk.get("usage")) and not chunk.get("choices")


def is_null_usage_chunk(chunk: Mapping[str, Any]) -> bool:
    """Return whether a chunk holds a null `usage` and nothing else."""
    return "usage" in chunk and not chunk["usage"] and not chunk.get("choices") and _ENVELOPE.issuperset(chunk)


_ENVELOPE = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})


def usage_chunk(like: Mapping[str, Any], usage: object) -> dict[str, Any]:
    """Make the extra chunk of `include_usage`, for upstreams that put usage elsewhere."""
    return empty_chunk(like, usage=usage)


def empty_chunk(like: Mapping[str, Any], **members: object) -> dict[str, Any]:
    """Make a chunk without choices, of the same stream as `like`."""
    kept = {name: like[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in like}
    return {**kept, "choices": [], **members}


def with_member(raw: bytes, name: str, value: Mapping[str, Any]) -> bytes:
    """Add a member to the bytes of a JSON object, or replace it; every other byte stays."""
    member = f'"{name}":'.encode()
    end = raw.rfind(b"}")
    if member[:-1] in raw or b":" not in raw or end < 0:
        return encode_json({**decode_json(raw), name: value})
    return raw[:end] + b"," + member + encode_json(value) + raw[end:]


def iter_choices(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    choices = body.get("choices")
    if isinstance(choices, list):
        yield from (choice for choice in choices if isinstance(choice, Mapping))


def _messages(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for choice in iter_choices(body):
        for name in ("message", "delta"):
            part = choice.get(name)
            if isinstance(part, Mapping):
                yield part
