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

from proxy.json_limits import MAX_VALUES_AT_ONCE, SHALLOW_BYTES, check_limits
from proxy.upstream.response_memory import HeldMemory
from proxy.upstream.sse import decode_json, encode_json
from router_core.pricing import text_bytes

_MODEL = re.compile(rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]++|\\.)*+")')

# Members called `model` that are tried, where tools and schemas have some of their own.
_MAX_PLACES = 8

# Of a name that is looked for as it is, and remembered.
_MAX_NAME_BYTES = 256

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
    held: HeldMemory | None = field(default=None, repr=False, compare=False)
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
    if len(data) > SHALLOW_BYTES and not checked:
        check_limits(data, MAX_VALUES_AT_ONCE)
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return decode_json(data), None


def parse_exact(data: bytes) -> tuple[Any, None]:
    """As `parse`, every number as it was written, for what is to be written again. Raises ValueError."""
    check_limits(data, MAX_VALUES_AT_ONCE)
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


# What a delta may have without saying anything. Whatever else is not empty is content, by whatever name.
_NO_CONTENT = frozenset({"role"})

# Parts of a message that are no text which a model wrote: names of things, sounds, pictures, what is encrypted.
_NO_TEXT = frozenset({"role", "id", "type", "index", "format", "data", "url", "image_url", "signature", "annotations"})

_DEEPEST = 6

# Ends of an answer that another model is not asked to better: the limit was the caller's, the filter a verdict.
EXPECTED_EMPTY_REASONS = frozenset({"length", "content_filter", "max_tokens"})


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
