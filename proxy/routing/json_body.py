from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Never

import orjson

from proxy.errors import BadRequest
from proxy.json_text import MAX_DEPTH, MAX_VALUES, JSONTooLarge, reject_large
from proxy.routing.requirements import PARTS, SCALAR_BYTES, TEXTS, ContentSummary, attachment_capability, is_binary
from router_core.text import text_bytes
from router_core.types import frozen


def parse_strict(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object of UTF-8, finite numbers, whole characters and no key twice.

    It may have MAX_DEPTH levels and MAX_VALUES values.

    Raises:
        BadRequest: saying what is wrong, and where.
    """
    try:
        reject_large(raw)
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except JSONTooLarge as error:
        raise BadRequest(f"the body {error}") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: some parsers take the first, others the last, and others would be checked than used."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRequest(f"the body gives the key {twice[:60]!r} twice in one object", param=twice[:60])
    return made


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


def _check_values(document: dict[str, Any]) -> None:
    """Refuse what parses but cannot be written again: infinite numbers, half characters, too deep nesting."""
    level: list[Any] = [document]
    seen = 0
    for _ in range(MAX_DEPTH):
        seen += len(level)
        inner: list[Any] = []
        for value in level:
            if seen + len(inner) > MAX_VALUES:
                raise BadRequest(f"the body holds more than {MAX_VALUES} values")
            if isinstance(value, dict):
                inner.extend(value.keys())
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            else:
                _check_scalar(value)
        if not inner:
            return
        level = inner
    raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_scalar(value: Any) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"the body holds half a character (lone surrogate {value[error.start]!a})") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRequest("the body holds a number too large to be represented")


# How a model reads a value: not at all, as it is, as a message or within one, as a part of a message.
_UNREAD, _SCHEMA, _CHAT, _PART = range(4)

_MODES = {"messages": _CHAT, "tools": _SCHEMA, "functions": _SCHEMA, "response_format": _SCHEMA}

# A float beyond it may have been a whole number, for which orjson has no more than 64 bits.
_MAX_FLOAT_INTEGER = 2.0**63

_ESCAPED_COLON = re.compile(rb"\\u003[aA]")

# Bytes of a body whose texts are joined to be counted.
_MAX_JOINED_BYTES = 2**20


@frozen
class ParsedBody:
    document: dict[str, Any]
    contents: ContentSummary
    """Of messages and schemas together."""


def parse_fast(raw: bytes) -> ParsedBody | None:
    """Parse a JSON object with orjson; None if something may be wrong with it, which `parse_strict` has to decide.

    Of a key given twice orjson keeps the last. Colons show that: each belongs to a key or stands in a text. If no text
    has one that is written as an escape, `raw` has as many colons as the result has keys and colons in texts, and more
    if something was dropped.
    """
    try:
        reject_large(raw)
        document = orjson.loads(raw)
    except (JSONTooLarge, orjson.JSONDecodeError):
        return None
    if type(document) is not dict:
        return None
    contents = summarize_plain(document, raw) or summarize_any(document, raw)
    return None if contents is None else ParsedBody(document, contents)


def summarize_any(document: dict[str, Any], raw: bytes) -> ContentSummary | None:
    """Count what a document holds. None: something may be wrong with it."""
    scan = _BodyScanner()
    if not scan.scan(document) or (b"\\" in raw and _ESCAPED_COLON.search(raw)):
        return None
    size, colons = _size_and_colons(scan.read, len(raw))
    colons += _size_and_colons(scan.unread, len(raw))[1]
    if _colons(raw) != scan.keys + colons:
        return None
    return ContentSummary(size + SCALAR_BYTES * scan.scalars, scan.attachments, scan.needs)


def _colons(raw: bytes) -> int:
    return len(raw) - len(raw.replace(b":", b""))  # faster than count(), which takes byte by byte


# A longer body may hold more values than are allowed.
MAX_PLAIN_BYTES = MAX_VALUES

# Who speaks in messages that answer no tool.
_SPEAKERS = frozenset({"assistant", "developer", "system", "user"})


def summarize_plain(document: dict[str, Any], raw: bytes) -> ContentSummary | None:
    """Count a plain chat in one pass: messages of a role and one text each, and no lists or objects beside them.

    Returns:
        As `summarize_any`. None: it is no plain chat, or something may be wrong with it.
    """
    messages = document.get("messages")
    if type(messages) is not list or len(raw) > MAX_PLAIN_BYTES or b"\\u003" in raw:
        return None
    read: list[str] = []
    unread = list(document)
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return None
        role, text = message.get("role"), message.get("content")
        if type(text) is not str or type(role) is not str or role not in _SPEAKERS:
            return None
        read += ("role", "content", role, text)
    for value in document.values():
        kind = type(value)
        if kind is str:
            unread.append(value)
        elif kind is dict or (kind is list and value is not messages) or (kind is float and not _is_exact(value)):
            return None
    together = "".join(read)
    colons = together.count(":") + "".join(unread).count(":") + len(document) + 2 * len(messages)
    if _colons(raw) != colons:
        return None
    return ContentSummary(text_bytes(together), plain_messages=True)


def _size_and_colons(texts: Sequence[str], size: int) -> tuple[int, int]:
    """Return how many bytes of UTF-8 and how many colons there are."""
    if size > _MAX_JOINED_BYTES:
        return sum(map(text_bytes, texts)), sum(text.count(":") for text in texts)
    together = "".join(texts)
    return text_bytes(together), together.count(":")


class _BodyScanner:
    """Count what a parsed document holds, level by level, and by how a model reads it."""

    __slots__ = ("_inner", "_items", "attachments", "exact", "keys", "needs", "read", "scalars", "unread")

    def __init__(self) -> None:
        self.keys = self.scalars = self.attachments = self._items = 0
        self.needs: dict[str, str] = {}
        # Texts that a model reads, names of fields among them.
        self.read: list[str] = []
        self.unread: list[str] = []
        # Every number is what it was written as.
        self.exact = True
        self._inner: tuple[list[Any], ...] = ([], [], [], [])

    def scan(self, document: dict[str, Any]) -> bool:
        """Return whether it has few enough levels and values, and its numbers are what they were written as."""
        self.keys = len(document)
        self.unread.extend(document)
        for name, value in document.items():
            mode = _MODES.get(name, _UNREAD)
            self._held((value,), self.read if mode else self.unread, mode)
        for _ in range(MAX_DEPTH - 2):
            level, self._inner = self._inner, ([], [], [], [])
            if not any(level) or self._values > MAX_VALUES:
                break
            for mode, values in enumerate(level):
                if values:
                    self._messages(values, mode) if mode >= _CHAT else self._plain(values, mode)
        return self.exact and self._values <= MAX_VALUES and not any(self._inner)

    @property
    def _values(self) -> int:
        """Return how many there are so far, as `parse_strict` counts them: a key is one too."""
        return 1 + 2 * self.keys + self._items

    def _plain(self, values: Iterable[Any], mode: int) -> None:
        into = self.read if mode else self.unread
        for value in values:
            if type(value) is dict:
                self.keys += len(value)
                into.extend(value)
                self._held(value.values(), into, mode)
            else:
                self._items += len(value)
                self._held(value, into, mode)

    def _held(self, values: Iterable[Any], into: list[str], mode: int) -> None:
        inner = self._inner[mode]
        for value in values:
            kind = type(value)
            if kind is str:
                into.append(value)
            elif kind is dict or kind is list:
                inner.append(value)
            elif value is not None:
                self._scalar(value, mode)

    def _messages(self, values: Iterable[Any], mode: int) -> None:
        for value in values:
            if type(value) is list:
                self._items += len(value)
                self._held(value, self.read, mode)
            elif mode == _PART and (capability := attachment_capability(value)) is not None:
                self.attachments += 1
                self.needs.setdefault(capability, value["type"])
                self._plain((value,), _UNREAD)
            else:
                self.keys += len(value)
                self.read.extend(value)
                self._fields(value)

    def _fields(self, value: dict[str, Any]) -> None:
        read, inner = self.read, self._inner
        for name, held in value.items():
            kind = type(held)
            if kind is str:
                if name in TEXTS or not is_binary(name, held):
                    read.append(held)
                else:
                    self.attachments += 1
                    self.unread.append(held)
            elif kind is list:
                inner[_PART if name in PARTS else _CHAT].append(held)
            elif kind is dict:
                inner[_CHAT].append(held)
            elif held is not None:
                self._scalar(held, _CHAT)

    def _scalar(self, value: Any, mode: int) -> None:
        if mode:
            self.scalars += 1
        if type(value) is float and not _is_exact(value):
            self.exact = False


def _is_exact(value: float) -> bool:
    return -_MAX_FLOAT_INTEGER < value < _MAX_FLOAT_INTEGER
