"""How long an upstream asks to be left alone: `retry-after-ms`, else `retry-after` in seconds or as an HTTP date."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

NAMES = ("retry-after", "retry-after-ms")
_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*", re.ASCII)
LONGEST_WAIT_S = 3600.0
"""What is asked for beyond it is taken for an hour, in whatever form: nobody plans further by a header."""
_LONGEST_VALUE = 100
"""Characters. A number or a date is shorter; what is longer is not read."""


def stated_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds, above 0 and no more than LONGEST_WAIT_S; None where nothing usable is stated.

    Args:
        now: Unix seconds; a date is that far away from it.
    """
    stated = {name.lower(): value for name, value in headers.items() if len(value) <= _LONGEST_VALUE}
    for wait in (_number(stated.get("retry-after-ms"), 1e-3), _number(stated.get("retry-after"), 1.0)):
        if wait is not None:
            return min(wait, LONGEST_WAIT_S) if wait > 0 else None
    until = _until_date(stated.get("retry-after"), now)
    return None if until is None else min(until, LONGEST_WAIT_S)


def told_wait(headers: Mapping[str, str], now: float) -> dict[str, str]:
    """Put into the headers for a client, in lower case, the wait that counts here too, in place of the upstream's: in
    whole seconds, and in milliseconds where those were stated; none where nothing usable was."""
    told = {name.lower(): text for name, text in headers.items()}
    stated = {name for name in NAMES if told.pop(name, None) is not None}
    wait = stated_wait_s(headers, now) if stated else None
    if wait is not None:
        told["retry-after"] = str(math.ceil(wait))
        if "retry-after-ms" in stated:
            told["retry-after-ms"] = str(math.ceil(wait * 1000))
    return told


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
