"""Read values that Redis holds, which other programs may have written, and warn of the odd ones."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any, Final

import orjson

from router_core.errors import InvalidInput
from router_core.text import plain

# A profile of a map of a thousand clusters has some 200,000.
MAX_CHARS: Final = 4_000_000

MAX_DEPTH: Final = 100

# Beyond it the numbers of Lua and of JSON's readers are no longer exact.
MAX_INTEGER: Final = 2**53 - 1

# Unix seconds. A later time is a mistake.
MAX_UNIX_TIME: Final = math.nextafter(1e11, 0)

# What half characters, infinite numbers and numbers of more than 64 bits are written with.
_RARE = re.compile(r"\\u|\d{19}|[eE]\+?\d{3}", re.ASCII)

_NUMERAL = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)


class InvalidRecord(InvalidInput):
    """A stored entry is not one that we would write; the message says what is wrong with it."""


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object that can be sent on.

    Raises:
        InvalidRecord: it is none, is too long or too deep, or holds what no JSON can be sent with.
    """
    if len(text) > MAX_CHARS:
        raise InvalidRecord(f"has {len(text)} characters; {MAX_CHARS} are read at most")
    try:
        stored = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(stored, MAX_DEPTH):
        raise InvalidRecord(f"is nested deeper than {MAX_DEPTH} levels")
    if _RARE.search(text):
        _check_can_be_sent(stored)
    return stored


def number(value: object, max_value: float = 1e15) -> float | None:
    """Return a number from 0 to `max_value`, given as a number or as text; None if it is something else."""
    if isinstance(value, str) and len(value) < 100 and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= max_value:
        return None
    return float(value)


def whole_number(value: object, max_value: int = MAX_INTEGER) -> int | None:
    """Return a whole number from 0 to `max_value`, given as a number or as text; None if it is something else."""
    found = number(value, max_value)
    return int(found) if found is not None and found.is_integer() else None


def is_unix_time(value: object) -> bool:
    return not isinstance(value, str) and number(value, MAX_UNIX_TIME) is not None


def unix_time(value: Any) -> float:
    """Return a time in Unix seconds, or raise InvalidRecord."""
    if not is_unix_time(value):
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}"[:200])
    return float(value)


def _is_deeper(value: object, levels: int) -> bool:
    """Look level by level: a recursive look would fail on the very values that this finds."""
    level = [value]
    for _ in range(levels):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inner(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _inner(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_can_be_sent(stored: object) -> None:
    """Raise InvalidRecord for what neither an upstream nor an administrator could be sent."""
    try:
        json.dumps(stored, allow_nan=False)
        orjson.dumps(stored)
    except (ValueError, TypeError) as error:
        raise InvalidRecord(f"holds what no JSON can be sent with: {error}") from error


MAX_WARNINGS: Final = 1000

MAX_WARNING_CHARS: Final = 300


class OddValues:
    """Warn of each odd value once, however often it is read, and of MAX_WARNINGS values at most."""

    def __init__(self, log: logging.Logger, prefix: str = "stored entry skipped") -> None:
        self._log = log
        self._prefix = prefix
        self._warned: set[str] = set()

    def warn_once(self, where: str, what: object) -> None:
        warning = plain(f"{where}: {what}", lines=False)[:MAX_WARNING_CHARS]
        if warning not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(warning)
            self._log.warning("%s: %s", self._prefix, warning)
