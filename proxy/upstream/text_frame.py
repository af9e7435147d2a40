"""Chunks of a stream that differ in their text alone, recognised without parsing each of them.

Most chunks of a stream are the same bytes around a few characters of text. The first is parsed and checked in full, and
gives the frame. A later event that begins and ends alike, and has the inside of one JSON string in between, is the same
chunk with another text: a JSON parser could find nothing else. Everything else is parsed as ever. Such chunks in a row
are one TextRun.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from proxy.storage.usage import usage_of
from proxy.upstream.payload import JSONPayload, replace_model, simple_text

# Chunks that are longer, and did not come in one piece, are parsed.
MAX_FRAME_BYTES = 4096

# Chunks in a row are taken together, up to so many bytes behind the first.
MAX_AHEAD_BYTES = 16 * 2**10

# OpenAI's random member, which makes all chunks equally long.
_PADDING = "obfuscation"

# The usual way to write an event, before and after its data.
_START, _END = b"data: ", b"\n\n"


# The bytes before the text, between text and padding, and behind. There is no second part without padding.
Parts = tuple[bytes, bytes, bytes]


class TextRun(JSONPayload):
    """Chunks of text alone, without usage and end, one after the other. As a payload it is one chunk with all the text.

    Attributes:
        frame: what they have in common.
        texts: of each chunk, as the inside of a JSON string.
        size: bytes of the text in UTF-8.
    """

    __slots__ = ("_paddings", "_parsed", "frame", "size", "texts")

    def __init__(self, frame: TextFrame, texts: list[bytes], paddings: list[bytes], size: int) -> None:
        """`paddings`: empty if the frame has none."""
        self.raw = None
        self.held = None
        self.frame = frame
        self.texts = texts
        self.size = size
        self._paddings = paddings
        self._parsed: dict[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:  # type: ignore[override]
        if self._parsed is None:
            self._parsed = self._parse(b"".join(self.texts), self._paddings[0] if self._paddings else b"")
        return self._parsed

    def chunks(self) -> list[JSONPayload]:
        """Return the chunks themselves."""
        paddings = self._paddings or [b""] * len(self.texts)
        return [
            JSONPayload(self._parse(*pair), self.frame.encode(*pair)) for pair in zip(self.texts, paddings, strict=True)
        ]

    @property
    def text(self) -> str:
        """Return all the text."""
        return _string(b"".join(self.texts))

    def framed(self, before: bytes, after: bytes) -> bytes:
        """Return each text that is not empty between what a JSON string stands between."""
        texts = [text for text in self.texts if text] if b"" in self.texts else self.texts
        return before + (after + before).join(texts) + after if texts else b""

    def events(self, model: str) -> bytes:
        """Return the chunks as events, under our name of the model."""
        parts = self.frame.renamed.get(model) or self.frame.rename(model)
        if parts is None:
            return b"".join([b"data: %b\n\n" % chunk.with_model(model) for chunk in self.chunks()])
        before, between, after = parts
        if not self._paddings:
            texts = self.texts
            return before + texts[0] + after if len(texts) == 1 else before + (after + before).join(texts) + after
        pieces: list[bytes] = []
        for text, padding in zip(self.texts, self._paddings, strict=True):
            pieces += (before, text, between, padding, after)
        return b"".join(pieces)

    def _parse(self, text: bytes, padding: bytes) -> dict[str, Any]:
        parsed: dict[str, Any] = orjson.loads(self.frame.encode(text, padding))
        return parsed


class TextFrame:
    """What the chunks of one stream have around their text, and around their padding if they have one.

    Attributes:
        body: a chunk of this frame.
        is_plain: they belong to the first of the answers that were asked for, and have no log probabilities.
        start: how an event of this frame begins.
        renamed: by our name of the model, what was found by `rename`.
    """

    __slots__ = ("_ahead", "_bytes", "_end", "_joint", "_parts", "body", "is_plain", "renamed", "start")

    def __init__(self, body: dict[str, Any], parts: Parts) -> None:
        self.body = body
        self._parts = parts
        self.start = _START + parts[0]
        self._end = parts[2] + _END
        self._joint = self._end + self.start
        # How many bytes behind a chunk are searched for others.
        self._ahead = MAX_AHEAD_BYTES // 4
        self._bytes = len(self._joint) + len(parts[1])
        self.renamed: dict[str, Parts] = {}
        choice = body["choices"][0]
        self.is_plain = not (choice.get("index") or choice.get("logprobs"))

    def match(self, piece: bytes, place: int) -> tuple[TextRun | None, int]:
        """Return chunks that stand at a place of a stream's bytes, and where they end; None if there is none.

        Args:
            place: where an event begins.
        """
        start = place + len(self.start)
        stop = piece.find(_END, place)
        if stop < 0 or not (piece.startswith(self.start, place) and piece.endswith(self._parts[2], start, stop)):
            return None, place
        texts = piece[start : stop + len(_END) + self._ahead].split(self._joint)
        last, found, _ = texts[-1].partition(self._end)
        texts[-1:] = [last] if found else []
        if not self._parts[1] and _are_plain(texts):
            self._ahead = min(2 * self._ahead, MAX_AHEAD_BYTES)
            size = sum(map(len, texts))
            return TextRun(self, texts, [], size), place + size + len(texts) * self._bytes
        holes = len(texts)
        texts, paddings = self._read(texts)
        # Where other events are among them, looking far ahead would be done again and again.
        self._ahead = min(2 * self._ahead, MAX_AHEAD_BYTES) if len(texts) == holes else max(self._ahead // 2, 64)
        if not texts:
            return None, place
        text = b"".join(texts)
        place += len(text) + sum(map(len, paddings)) + len(texts) * self._bytes
        return TextRun(self, texts, paddings, len(_string(text).encode())), place

    def _read(self, holes: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return the texts and paddings of what stands between the bytes of this frame, up to anything else."""
        between = self._parts[1]
        texts: list[bytes] = []
        paddings: list[bytes] = []
        for hole in holes:
            inside, others, _ = hole.partition(self._end)
            text, found, padding = inside.partition(between) if between else (inside, b"", b"")
            if found != between or not (_is_inside(text) and _is_inside(padding)):
                break
            texts.append(text)
            if between:
                paddings.append(padding)
            if others:
                break
        return texts, paddings

    def match_data(self, data: bytes) -> TextRun | None:
        """Return the chunk that the data of an event is; None if it does not fit this frame."""
        if len(data) > MAX_FRAME_BYTES or not data.startswith(self._parts[0]) or b"\n" in data:
            return None
        return self.match(b"%b%b%b" % (_START, data, _END), 0)[0]

    def encode(self, text: bytes, padding: bytes) -> bytes:
        """Return the JSON of a chunk, as the upstream writes it."""
        return b"".join((self._parts[0], text, self._parts[1], padding, self._parts[2]))

    def rename(self, model: str) -> Parts | None:
        """Return the parts of an event under our name of the model; None: its place is not found quickly."""
        marks = _absent_from(b"".join(self._parts) + model.encode("utf-8", "replace"))
        raw = replace_model(_joined(self._parts, marks), self.body, model)
        if raw is None:
            return None
        before, _, rest = raw.partition(marks[0])
        between, _, after = rest.partition(marks[1]) if self._parts[1] else (b"", b"", rest)
        self.renamed[model] = _START + before, between, after + _END
        return self.renamed[model]


def learn_frame(data: bytes, body: dict[str, Any], text: str) -> TextFrame | None:
    """Return the frame of a chunk of text; None if it has more, or its text is not found in its bytes.

    Args:
        data: one line of JSON.
        body: what it was parsed to.
        text: all that it says, not empty.
    """
    if len(data) > MAX_FRAME_BYTES or usage_of(body) or body["choices"][0].get("finish_reason"):
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
    if b"\\" in inside:  # there are other ways to write it
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


def _is_inside(text: bytes) -> bool:
    """Return whether bytes are the inside of one JSON string."""
    try:
        _string(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _are_plain(texts: list[bytes]) -> bool:
    """Return whether bytes are the insides of JSON strings, without escapes."""
    joined = b'","'.join(texts)
    if b"\\" in joined or joined.count(b'"') != 2 * len(texts) - 2:
        return False
    try:
        orjson.loads(b'["%b"]' % joined)
    except orjson.JSONDecodeError:
        return False
    return True


def _string(inside: bytes) -> str:
    string: str = orjson.loads(b'"%b"' % inside)
    return string
