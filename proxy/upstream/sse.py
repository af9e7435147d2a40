from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

from proxy.json_text import encode_json

DONE = b"data: [DONE]\n\n"

KEEP_ALIVE = b": keep-alive\n\n"

MAX_EVENT_BYTES = 20_000_000


class EventTooLong(ValueError):
    """One event is larger than allowed."""


class ErrorData(bytes):
    """The data of an event of a type that ends in "error"."""


class RawLine(bytes):
    """A line of JSON without a field name, which some servers write into a stream for an error."""


class TypedData(bytes):
    """The data of an event, with the type that the event states."""

    event_type: bytes

    @classmethod
    def of(cls, event_type: bytes, data: bytes) -> TypedData:
        made = cls(data)
        made.event_type = event_type
        return made


class SSEDecoder:
    """Turn the bytes of an event stream, however they are split, into the data of each whole event.

    U+2028, U+0085 and form feeds inside JSON are no line ends, which str.splitlines would make of them. The data of an
    error comes as ErrorData, and JSON on a line of its own as RawLine. Pings and comments are left out.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES, *, typed: bool = False) -> None:
        """`typed`: data comes as TypedData where its event states a type, errors and pings among them."""
        self._max_event_bytes = max_event_bytes
        self._typed = typed
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._raw: list[bytes] = []
        self._event_type = b""
        # Bytes of the event that is not complete yet.
        self.size = 0
        self._started = False
        self._ended_with_return = False
        # Nothing is held of an event: the next bytes begin one. False until it is known that no byte order mark comes.
        self.is_between_events = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that this piece completes. Raises EventTooLong."""
        if not (self._started or self.size) and piece.startswith(b"data:"):
            self._started = self.is_between_events = True  # no byte order mark comes any more
        if self.is_between_events and b"\r" not in piece:
            whole, blank, rest = piece.rpartition(b"\n\n")
            if blank:
                return self._decode_whole(whole) + (self._decode_lines(rest) if rest else [])
        return self._decode_lines(piece)

    def _decode_whole(self, whole: bytes) -> list[bytes]:
        """Decode complete events. Most are one line of data, and are not split into lines."""
        found = []
        for event in whole.split(b"\n\n"):
            if event.startswith(b"data: ") and b"\n" not in event and event[6:7] != b":":
                found.append(event[6:])
            else:
                found += [data for line in (*event.split(b"\n"), b"") for data in self._decode_line(line)]
        return found

    def _decode_lines(self, piece: bytes) -> list[bytes]:
        if b"\r" in piece or self._ended_with_return:
            piece = self._normalize_line_ends(piece)
        first, *lines = piece.split(b"\n")
        self._rest.append(first)
        self.size += len(piece)
        if self.size > self._max_event_bytes:
            raise EventTooLong(f"one event of the stream is larger than {self._max_event_bytes} bytes")
        if not lines:
            self.is_between_events = self.is_between_events and not piece
            return []
        whole = [b"".join(self._rest), *lines[:-1]]
        self._rest = [lines[-1]]
        found = [data for line in whole for data in self._decode_line(line)]
        held = lines[-1] or self._data or self._raw or self._event_type or self._ended_with_return
        self.is_between_events = self._started and not held
        return found

    def _normalize_line_ends(self, piece: bytes) -> bytes:
        """Make line feeds of CR and CRLF, also where a CRLF is split between two pieces."""
        if self._ended_with_return and piece.startswith(b"\n"):
            piece = piece[1:]
            self._ended_with_return = False
        if piece:
            self._ended_with_return = piece.endswith(b"\r")
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def close(self) -> list[bytes]:
        """Return the data that is left of a stream without its last blank line."""
        return [data for line in (b"".join(self._rest), b"") for data in self._decode_line(line)]

    def _decode_line(self, line: bytes) -> tuple[bytes, ...]:
        if not self._started:
            self._started, line = True, line.removeprefix(codecs.BOM_UTF8)
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return ()
        if line:
            return self._decode_other_line(line)
        self.size = 0
        if not (self._data or self._raw or self._event_type):
            return ()
        return self._finish_event()

    def _finish_event(self) -> tuple[bytes, ...]:
        """Return what a blank line ends."""
        data, raw = b"\n".join(self._data), b"\n".join(self._raw)
        stated_type = self._event_type.strip()
        event_type, has_data = stated_type.lower(), bool(self._data)
        self._data, self._raw, self._event_type = [], [], b""
        found: tuple[bytes, ...] = (RawLine(raw),) if raw else ()
        if self._typed and has_data and stated_type:
            return (*found, TypedData.of(stated_type, data))
        if event_type.endswith(b"error"):
            return (*found, ErrorData(data))
        if not has_data or event_type in _PINGS or data.startswith(b":"):
            return found
        return (*found, data)

    def _decode_other_line(self, line: bytes) -> tuple[bytes, ...]:
        if line.startswith(b"event:"):
            self._event_type = line[6:]
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


def format_typed_event(kind: str, /, **members: Any) -> bytes:
    """Write an event as Messages and Responses do: its type is stated twice."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **members}))
