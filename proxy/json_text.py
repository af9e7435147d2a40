"""Write JSON, and limit the levels and values of a JSON text before it is parsed.

The limits are checked by a linear scan that makes no objects. They are the same for callers' bodies and for upstreams'
responses. A parser makes an object of every three bytes of `[],[],…`, and the garbage collector goes through all of
them again and again: 30 MB took seconds and a gigabyte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

MAX_DEPTH: Final = 64

# Strings (keys too), numbers, lists and objects in one document, all levels together.
MAX_VALUES: Final = 300_000

# Limit for parsing on the event loop, which takes a few milliseconds then.
MAX_VALUES_AT_ONCE: Final = 50_000

# No text of this size can hold many values, or take long to parse.
SMALL_BYTES: Final = 64 * 2**10

# At most half as many levels fit into this size, which is no trouble for any parser.
SHALLOW_BYTES: Final = 512

_SLICE_BYTES = 64 * 2**10

_NO_STRUCTURE = bytes(set(range(256)).difference(b"[]{},:"))

# By byte: how it changes the depth.
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


class JSONTooLarge(ValueError):
    """A text has too many levels or values. The message begins with the verb: "holds more than …"."""


class JSONSizeCounter:
    """Count the values and levels of a JSON text that is fed in pieces, however it is split.

    Text that is not JSON is counted as if it were; a parser may give up earlier.
    """

    __slots__ = ("_depth", "_escaped", "_in_string", "_limit", "_max_values", "_strings", "values")

    def __init__(self, max_values: int = MAX_VALUES, *, rough: bool = False) -> None:
        """`rough`: only a text that certainly holds more than `max_values` is refused."""
        # No fewer than there are; an empty list or object counts twice.
        self.values = 1
        self._max_values = max_values
        self._limit = 2 * max_values if rough else max_values
        self._depth = self._strings = 0
        self._in_string = self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Raises JSONTooLarge."""
        for start in range(0, len(piece), _SLICE_BYTES):
            self._count(self._outside_strings(piece[start : start + _SLICE_BYTES]))

    def _outside_strings(self, text: bytes) -> bytes:
        """Cut the strings out of the text."""
        if self._escaped:
            text = b"_" + text[1:]
        self._escaped = (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
        if b'\\"' in text:
            text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        parts = text.split(b'"')
        outside = parts[self._in_string :: 2]
        self._in_string ^= len(parts) % 2 == 0
        self._strings += len(parts) // 2
        return outside[0] if len(outside) == 1 else b"".join(outside)

    def _count(self, text: bytes) -> None:
        structure = text.translate(None, _NO_STRUCTURE)
        opened = structure.count(b"[") + structure.count(b"{")
        closed = structure.count(b"]") + structure.count(b"}")
        self.values += len(structure) - closed  # one after each comma, colon and opening bracket
        if max(self.values, self._strings) > self._limit:
            raise JSONTooLarge(f"holds more than {self._max_values} values")
        if self._depth + opened > MAX_DEPTH:
            steps = np.cumsum(_STEPS[np.frombuffer(structure, np.uint8)], dtype=np.int32)
            if self._depth + int(steps.max()) > MAX_DEPTH:
                raise JSONTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
        self._depth += opened - closed


def check_limits(data: bytes, max_values: int = MAX_VALUES) -> None:
    """Check `data` before it is parsed. Small texts cost next to nothing. Raises JSONTooLarge."""
    size = len(data)
    if size <= SHALLOW_BYTES or (size <= SMALL_BYTES and data.count(b"[") + data.count(b"{") <= MAX_DEPTH):
        return
    JSONSizeCounter(max_values).feed(data)


def reject_large(data: bytes) -> None:
    """Refuse a document that is certainly too large, whose values are counted exactly after parsing.

    Raises:
        JSONTooLarge: it is not worth parsing.
    """
    if len(data) > MAX_VALUES and _has_many_marks(data):
        JSONSizeCounter(rough=True).feed(data)


def _has_many_marks(data: bytes) -> bool:
    """Return whether there is enough punctuation for MAX_VALUES, strings included. Quick, and mostly decisive."""
    marks = 0
    for start in range(0, len(data), _SLICE_BYTES):
        marks += len(data[start : start + _SLICE_BYTES].translate(None, _NO_STRUCTURE))
        if marks > MAX_VALUES:
            return True
    return False


def count_values(value: Any) -> int:
    """Count the values in a JSON value."""
    found, left = 1, [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            inner = list(inner.values())
        if isinstance(inner, list):
            found += len(inner)
            left += inner
    return found


def encode_json(value: Any) -> bytes:
    """Encode compact JSON. NaN becomes null, and half characters, to which models do cut emoji, stay escaped."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half a character, or an integer of more than 64 bits
        return _encode_anything(value)


def _encode_anything(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(_finite(value), separators=(",", ":")).encode()
    except ValueError:
        return _encode_anything(_finite(value))


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which upstreams send although JSON has none, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def decode_json(data: bytes) -> Any:
    """Decode JSON from an upstream. Raises ValueError, also if it is nested beyond the stack."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
