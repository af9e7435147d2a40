"""What every stored JSON text is read with: an object, a time, and the one error for what cannot be read. No Redis."""

from __future__ import annotations

import json
from typing import Any

from router_core.errors import InvalidInput

_END_OF_TIME = 1e11


class InvalidRecord(InvalidInput):
    """A stored entry that is not what we write; the message says what is wrong with it."""


def json_object(text: str) -> dict[str, Any]:
    """Raises InvalidRecord."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    return stored


def is_unix_time(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < _END_OF_TIME


def unix_time(value: Any) -> float:
    """Raises InvalidRecord."""
    if not is_unix_time(value):
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}"[:200])
    return float(value)
