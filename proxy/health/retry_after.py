"""How long an upstream asks to be left alone: `retry-after-ms`, else `retry-after` in seconds or as an HTTP date."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*", re.ASCII)
_LONGEST_VALUE = 100
"""Characters. A number or a date is shorter; what is longer is not read."""


def stated_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds, above 0 and not capped; None where nothing usable is stated.

    Args:
        now: Unix seconds; a date is that far away from it.
    """
    stated = {name.lower(): value for name, value in headers.items() if len(value) <= _LONGEST_VALUE}
    for wait in (_number(stated.get("retry-after-ms"), 1e-3), _number(stated.get("retry-after"), 1.0)):
        if wait is not None:
            return wait if wait > 0 else None
    return _until_date(stated.get("retry-after"), now)


def _number(text: str | None, unit: float) -> float | None:
    return float(text) * unit if text is not None and _NUMBER.fullmatch(text) else None


def _until_date(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    try:
        wait = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return wait if wait > 0 else None
