"""What every stored text is read with: objects, numbers, times, and the one error for what cannot be read. No Redis."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

import orjson

from router_core.errors import InvalidInput

MAX_CHARS: Final = 4_000_000
"""A profile of a map of a thousand clusters has some 200,000."""
MAX_DEPTH: Final = 100
MAX_WHOLE: Final = 2**53 - 1
"""Beyond, the numbers of Lua and of JSON's readers are no longer exact."""
LAST_TIME: Final = math.nextafter(1e11, 0)
"""Unix seconds: what is later is a mistake."""
_RARE = re.compile(r"\\u|\d{19}|[eE]\+?\d{3}", re.ASCII)
"""What half characters, infinite numbers and those of more than 64 bits are written with."""
_NUMERAL = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)


class InvalidRecord(InvalidInput):
    """A stored entry that is not what we write; the message says what is wrong with it."""


def json_object(text: str) -> dict[str, Any]:
    """Raises InvalidRecord."""
    if len(text) > MAX_CHARS:
        raise InvalidRecord(f"has {len(text)} characters; {MAX_CHARS} are read at most")
    try:
        stored = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(stored, MAX_DEPTH):
        raise InvalidRecord(f"is nested deeper than {MAX_DEPTH} levels")
    if _RARE.search(text):
        _check_can_be_sent(stored)
    return stored


def number(value: object, most: float = 1e15) -> float | None:
    """A number from 0 to `most`, stated as such or as text. None: it is nothing of the kind."""
    if isinstance(value, str) and len(value) < 100 and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        return None
    return float(value)


def whole_number(value: object, most: int = MAX_WHOLE) -> int | None:
    """A whole number from 0 to `most`, stated as such or as text. None: it is nothing of the kind."""
    found = number(value, most)
    return int(found) if found is not None and found.is_integer() else None


def is_unix_time(value: object) -> bool:
    return not isinstance(value, str) and number(value, LAST_TIME) is not None


def unix_time(value: Any) -> float:
    """Raises InvalidRecord."""
    if not is_unix_time(value):
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}"[:200])
    return float(value)


def _is_deeper(value: object, levels: int) -> bool:
    """Level by level, for recursion is what deep values are feared for."""
    level = [value]
    for _ in range(levels):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inner(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _inner(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_can_be_sent(stored: object) -> None:
    """Raises InvalidRecord: no upstream and no administrator could be sent it."""
    try:
        json.dumps(stored, allow_nan=False)
        orjson.dumps(stored)
    except (ValueError, TypeError) as error:
        raise InvalidRecord(f"holds what no JSON can be sent with: {error}") from error
