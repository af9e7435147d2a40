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


class ErrorData(bytes):
    """Data of an event that is called an error."""


class RawLine(bytes):
    """A line of JSON that no field name stands before, as some servers write an error into a stream."""


class SSEDecoder:
    """Feed it bytes, however they are split; it gives the data of each whole event.

    U+2028, U+0085 and form feeds inside JSON are not line ends, which str.splitlines would make of them. Data that is
    called an error comes as ErrorData, and JSON in a line of its own as RawLine. Pings and comments are left out.
    """

    def __init__(self, most: int = MAX_EVENT_BYTES) -> None:
        self._most = most
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._raw: list[bytes] = []
        self._name = b""
        # Bytes of the event that is not over.
        self.size = 0
        self._begun = False
        # The last byte was a carriage return.
        self._returned = False

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
        held = self._data or self._raw or self._name or self._returned
        return self._begun and not held and not any(self._rest)

    def _usual(self, whole: bytes) -> list[bytes]:
        """Of events that are over: most are one line of data, and need no look at their lines."""
        found = []
        for format_event in whole.split(b"\n\n"):
            if format_event.startswith(b"data: ") and b"\n" not in format_event and format_event[6:7] != b":":
                found.append(format_event[6:])
            else:
                found += [data for line in (*format_event.split(b"\n"), b"") for data in self._line(line)]
        return found

    def _lines(self, piece: bytes) -> list[bytes]:
        if b"\r" in piece or self._returned:
            piece = self._with_line_feeds(piece)
        first, *lines = piece.split(b"\n")
        self._rest.append(first)
        self.size += len(piece)
        if self.size > self._most:
            raise EventTooLong(f"one event of the stream is larger than {self._most} bytes")
        if not lines:
            return []
        whole = [b"".join(self._rest), *lines[:-1]]
        self._rest = [lines[-1]]
        return [data for line in whole for data in self._line(line)]

    def _with_line_feeds(self, piece: bytes) -> bytes:
        """A carriage return ends a line too, and with the line feed behind it one line."""
        if self._returned and piece.startswith(b"\n"):
            piece = piece[1:]
            self._returned = False
        if piece:
            self._returned = piece.endswith(b"\r")
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def close(self) -> list[bytes]:
        """What a stream that ends without its last blank line still holds."""
        return [data for line in (b"".join(self._rest), b"") for data in self._line(line)]

    def _line(self, line: bytes) -> tuple[bytes, ...]:
        if not self._begun:
            self._begun, line = True, line.removeprefix(codecs.BOM_UTF8)
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return ()
        if line:
            return self._other_line(line)
        self.size = 0
        if not (self._data or self._raw or self._name):
            return ()
        return self._event()

    def _event(self) -> tuple[bytes, ...]:
        """What a blank line ends."""
        data, raw, name = b"\n".join(self._data), b"\n".join(self._raw), self._name.strip().lower()
        has_data = bool(self._data)
        self._data, self._raw, self._name = [], [], b""
        found: tuple[bytes, ...] = (RawLine(raw),) if raw else ()
        if name.endswith(b"error"):
            return (*found, ErrorData(data))
        if not has_data or name in _PINGS or data.startswith(b":"):
            return found
        return (*found, data)

    def _other_line(self, line: bytes) -> tuple[bytes, ...]:
        if line.startswith(b"event:"):
            self._name = line[6:]
        elif line.startswith(b"error:"):  # llama.cpp's
            return (ErrorData(line[6:].strip()),)
        elif self._raw or line.lstrip()[:1] == b"{":
            if not self._raw and line.rstrip().endswith(b"}"):
                return (RawLine(line),)
            self._raw.append(line)
        return ()


_PINGS = frozenset({b"ping", b"heartbeat", b"keepalive", b"keep-alive"})


def format_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"


def encode_json(payload: Mapping[str, Any]) -> bytes:
    """Compact JSON. Half characters, which models do send when they cut an emoji in two, stay escaped; NaN is null."""
    try:
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(_finite(payload), separators=(",", ":")).encode()
    except ValueError:
        return encode_json(_finite(payload))


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON has no words for and upstreams send all the same, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def decode_json(data: bytes) -> Any:
    """JSON from an upstream. ValueError, also where it is nested beyond the stack."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
