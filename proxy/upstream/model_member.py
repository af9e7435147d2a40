"""A JSON object's outermost `model`, given another value in the bytes of the object. All others stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

_MODEL = re.compile(rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]++|\\.)*+")')
_MOST_PLACES = 8
"""Members called `model` that are tried, where tools and schemas have some of their own."""
_BACKSLASH = ord("\\")


def with_model(raw: bytes, body: Mapping[str, Any], model: str) -> bytes | None:
    """`raw` naming `model`; None where its own is no text, or written in a way that is not seen at once.

    Args:
        raw: a JSON object without a key twice in one object.
        body: what it says.
    """
    stated = body.get("model")
    if not isinstance(stated, str):
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
        if place == _MOST_PLACES:
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
