"""How much a JSON text holds, seen before it is parsed: levels and values, by a linear scan that makes no objects.

One rule for callers' bodies and for what upstreams send. A parser makes an object of every three bytes of `[],[],…`,
and the garbage collector goes through all of them again and again: 30 MB took seconds and a gigabyte.
"""

from __future__ import annotations

from typing import Final

import numpy as np

MAX_DEPTH: Final = 64

# Texts (keys among them), numbers, lists and objects in one document, all levels together.
MAX_VALUES: Final = 300_000

# Of what is parsed on the event loop: that takes a few milliseconds.
MAX_VALUES_AT_ONCE: Final = 50_000

# Bytes. What is no larger can hold neither many values nor take long.
SMALL_BYTES: Final = 64 * 2**10

# Bytes in which at most half as many levels fit, which every part of the program follows.
SHALLOW_BYTES: Final = 512

_SLICE = 64 * 2**10

_NO_STRUCTURE = bytes(set(range(256)).difference(b"[]{},:"))

_STEPS = np.zeros(256, np.int8)

_STEPS[list(b"[{")] = 1

_STEPS[list(b"]}")] = -1


class JSONTooLarge(ValueError):
    """More levels or values than are read; the message goes on from what it is of."""


class JSONSizeCounter:
    """Feed it a JSON text, however it is split. What is no JSON counts up to where a parser would give up at most."""

    __slots__ = ("_bound", "_depth", "_escaped", "_most", "_quoted", "_texts", "values")

    def __init__(self, most: int = MAX_VALUES, *, rough: bool = False) -> None:
        """`rough`: what is refused holds more than `most`, but not all that holds more is refused."""
        # No fewer than there are; a list or an object that is empty counts twice.
        self.values = 1
        self._most, self._bound = most, 2 * most if rough else most
        self._depth = self._texts = 0
        self._quoted = self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Raises TooMuchJson."""
        for start in range(0, len(piece), _SLICE):
            self._count(self._unquoted(piece[start : start + _SLICE]))

    def _unquoted(self, text: bytes) -> bytes:
        """What of it stands in no text."""
        if self._escaped:
            text = b"_" + text[1:]
        self._escaped = (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
        if b'\\"' in text:
            text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        parts = text.split(b'"')
        outside = parts[self._quoted :: 2]
        self._quoted ^= len(parts) % 2 == 0
        self._texts += len(parts) // 2
        return outside[0] if len(outside) == 1 else b"".join(outside)

    def _count(self, text: bytes) -> None:
        structure = text.translate(None, _NO_STRUCTURE)
        opened = structure.count(b"[") + structure.count(b"{")
        closed = structure.count(b"]") + structure.count(b"}")
        self.values += len(structure) - closed  # one behind each comma, colon, and what opens and is not empty
        if max(self.values, self._texts) > self._bound:
            raise JSONTooLarge(f"holds more than {self._most} values")
        if self._depth + opened > MAX_DEPTH:
            steps = np.cumsum(_STEPS[np.frombuffer(structure, np.uint8)], dtype=np.int32)
            if self._depth + int(steps.max()) > MAX_DEPTH:
                raise JSONTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
        self._depth += opened - closed


def check_limits(data: bytes, most: int = MAX_VALUES) -> None:
    """Before `data` is parsed. Costs nothing noticeable where it is small. Raises TooMuchJson."""
    size = len(data)
    if size <= SHALLOW_BYTES or (size <= SMALL_BYTES and data.count(b"[") + data.count(b"{") <= MAX_DEPTH):
        return
    JSONSizeCounter(most).feed(data)


def reject_large(data: bytes) -> None:
    """For a document whose values are counted exactly once it is parsed: raises TooMuchJson where not even that is
    worth while."""
    if len(data) > MAX_VALUES and _has_many_signs(data):
        JSONSizeCounter(rough=True).feed(data)


def _has_many_signs(data: bytes) -> bool:
    """Whether there are as many as MAX_VALUES need, those in texts too: the quickest look, and mostly the last."""
    signs = 0
    for start in range(0, len(data), _SLICE):
        signs += len(data[start : start + _SLICE].translate(None, _NO_STRUCTURE))
        if signs > MAX_VALUES:
            return True
    return False
