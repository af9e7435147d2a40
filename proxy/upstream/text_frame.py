"""Chunks of a stream that differ in their text alone, recognised without parsing each of them.

Most chunks of a stream are the same bytes around a few characters of text. The first is parsed and checked in full, and
gives the frame. A later event that begins and ends alike, and has a plain JSON string in between, is the same chunk
with another text: a JSON parser could find nothing else. Everything else is parsed as ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from proxy.storage.usage import usage_of
from proxy.upstream.payload import JSONPayload, replace_model, simple_text

# Longer chunks are parsed.
MAX_FRAME_BYTES = 4096

# Characters that stand for themselves within a JSON string.
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')

# OpenAI's random member, which makes all chunks equally long.
_PADDING = "obfuscation"


# The bytes before the text, between text and padding, and behind. There is no second part without padding.
Parts = tuple[bytes, bytes, bytes]


class TextChunk(JSONPayload):
    """A chunk of text alone, without usage and end, that was recognised by its frame."""

    __slots__ = ("_frame", "_padding", "_parsed", "text")

    def __init__(self, raw: bytes, frame: TextFrame, text: bytes, padding: bytes) -> None:
        self.raw = raw
        self.held = None
        self.text = text
        self._frame = frame
        self._padding = padding
        self._parsed: dict[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:  # type: ignore[override]
        """Parse it, for those who need more than its text."""
        if self._parsed is None:
            assert self.raw is not None
            self._parsed = orjson.loads(self.raw)
        return self._parsed

    def with_model(self, model: str) -> bytes:
        parts = self._frame.renamed(model)
        if parts is None:
            return super().with_model(model)
        return b"".join((parts[0], self.text, parts[1], self._padding, parts[2]))


class TextFrame:
    """What the chunks of one stream have around their text, and around their padding if they have one."""

    __slots__ = ("_body", "_length", "_parts", "_renamed")

    def __init__(self, body: dict[str, Any], parts: Parts) -> None:
        """`body`: a chunk of this frame."""
        self._body = body
        self._parts = parts
        self._length = sum(map(len, parts))
        self._renamed: tuple[str, Parts | None] | None = None

    def match(self, data: bytes) -> TextChunk | None:
        """Return the chunk that the data of an event is; None if it does not fit this frame."""
        before, between, after = self._parts
        if not self._length <= len(data) <= MAX_FRAME_BYTES or not (data.startswith(before) and data.endswith(after)):
            return None
        text, padding = data[len(before) : len(data) - len(after)], b""
        if between:
            text, found, padding = text.partition(between)
            if not found or not _is_plain(padding):
                return None
        return TextChunk(data, self, text, padding) if _is_plain(text) else None

    def renamed(self, model: str) -> Parts | None:
        """Return the parts under our name of the model; None: the place of the name is not found quickly."""
        if self._renamed is None or self._renamed[0] != model:
            self._renamed = (model, self._rename(model))
        return self._renamed[1]

    def _rename(self, model: str) -> Parts | None:
        marks = _absent_from(b"".join(self._parts) + model.encode("utf-8", "replace"))
        raw = replace_model(_joined(self._parts, marks), self._body, model)
        if raw is None:
            return None
        before, _, rest = raw.partition(marks[0])
        between, _, after = rest.partition(marks[1]) if self._parts[1] else (b"", b"", rest)
        return before, between, after


def learn_frame(data: bytes, body: dict[str, Any]) -> TextFrame | None:
    """Return the frame of a chunk; None if it is more than text, or its text is not found in its bytes.

    Args:
        data: one line of JSON.
        body: what it was parsed to.
    """
    text = simple_text(body)
    if not text or len(data) > MAX_FRAME_BYTES or usage_of(body) or body["choices"][0].get("finish_reason"):
        return None
    place = _find(data, "content", text)
    if place is None:
        return None
    start, end = place
    parts = data[:start], b"", data[end:]
    if isinstance(padding := body.get(_PADDING), str):
        place = _find(data, _PADDING, padding)
        if place is None or place[0] < end:
            return None
        parts = data[:start], data[end : place[0]], data[place[1] :]
    return TextFrame(body, parts) if _is_exact(parts, body) else None


def _find(data: bytes, name: str, value: str) -> tuple[int, int] | None:
    """Return where the inside of a member's string stands; None if that is not plain, or not found just once."""
    inside = orjson.dumps(value)[1:-1]
    if not _is_plain(inside):
        return None
    for before in (f'"{name}":"', f'"{name}": "'):
        member = before.encode() + inside + b'"'
        if data.count(member) == 1:
            start = data.index(member) + len(before)
            return start, start + len(inside)
    return None


def _is_exact(parts: Parts, body: Mapping[str, Any]) -> bool:
    """Return whether other text in these places is the only difference that it makes to what the chunk parses to."""
    marks = _absent_from(b"".join(parts))
    try:
        changed: dict[str, Any] = orjson.loads(_joined(parts, marks))
    except orjson.JSONDecodeError:
        return False
    if simple_text(changed) != marks[0].decode():
        return False
    choice = changed["choices"][0]
    (choice.get("delta") or choice["message"])["content"] = simple_text(body)
    if parts[1]:
        if changed.get(_PADDING) != marks[1].decode():
            return False
        changed[_PADDING] = body[_PADDING]
    return changed == body


def _joined(parts: Parts, holes: tuple[bytes, bytes]) -> bytes:
    before, between, after = parts
    return b"".join((before, holes[0], between, holes[1] if between else b"", after))


def _absent_from(data: bytes) -> tuple[bytes, bytes]:
    """Return two words that occur neither in `data` nor in each other."""
    numbers = (number for number in range(len(data) + 2) if b"<%d>" % number not in data)
    return b"<%d>" % next(numbers), b"<%d>" % next(numbers)


def _is_plain(text: bytes) -> bool:
    """Return whether bytes are the inside of a JSON string without escapes."""
    if not _PLAIN.fullmatch(text):
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
