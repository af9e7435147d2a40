"""Bytes of an event stream to data payloads, and payloads to bytes. Cuts on line feeds only."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
MAX_EVENT_BYTES = 20_000_000


class EventTooLong(ValueError):
    """One event grew past what it may."""


class EventCutter:
    """Feed it bytes, however they are split; it gives the data of each whole event.

    U+2028, U+0085 and form feeds inside JSON are not line ends, which str.splitlines would make of them.
    """

    def __init__(self, most: int = MAX_EVENT_BYTES) -> None:
        self._most = most
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self.size = 0
        """Bytes of the event that is not over."""
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises EventTooLong."""
        if self._is_between and b"\r" not in piece:
            whole, gap, rest = piece.rpartition(b"\n\n")
            if gap:
                return self._usual(whole) + (self._lines(rest) if rest else [])
        return self._lines(piece)

    @property
    def _is_between(self) -> bool:
        """Nothing of an event is held."""
        return self._begun and not self._data and not any(self._rest)

    def _usual(self, whole: bytes) -> list[bytes]:
        """Of events that are over: most are one line of data, and need no look at their lines."""
        found = []
        for event in whole.split(b"\n\n"):
            if event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            else:
                found += [data for line in (*event.split(b"\n"), b"") if (data := self._line(line)) is not None]
        return found

    def _lines(self, piece: bytes) -> list[bytes]:
        first, *lines = piece.split(b"\n")
        self._rest.append(first)
        self.size += len(piece)
        if self.size > self._most:
            raise EventTooLong(f"one event of the stream is larger than {self._most} bytes")
        if not lines:
            return []
        whole = [b"".join(self._rest), *lines[:-1]]
        self._rest = [lines[-1]]
        return [data for line in whole if (data := self._line(line)) is not None]

    def close(self) -> list[bytes]:
        """What a stream that ends without its last blank line still holds."""
        return [data for line in (b"".join(self._rest), b"") if (data := self._line(line)) is not None]

    def _line(self, line: bytes) -> bytes | None:
        if not self._begun:
            self._begun, line = True, line.removeprefix(codecs.BOM_UTF8)
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return None
        if line or not self._data:
            return None
        data = b"\n".join(self._data)
        self._data, self.size = [], 0
        return data


def event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + dump(payload) + b"\n\n"


def dump(payload: Mapping[str, Any]) -> bytes:
    """Compact JSON. Half characters, which models do send when they cut an emoji in two, stay escaped; NaN is null."""
    try:
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(_finite(payload), separators=(",", ":")).encode()
    except ValueError:
        return dump(_finite(payload))


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON has no words for and upstreams send all the same, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def loads(data: bytes) -> Any:
    """JSON from an upstream. ValueError, also where it is nested beyond the stack."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
