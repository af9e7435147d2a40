"""Read the files that users bring: bounded in size, parsed once, and typed with errors that name the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from router_core.errors import InvalidValidationSet
from router_core.text import closest_name

MAX_CONFIG_BYTES = 1_000_000
MAX_MANIFEST_BYTES = 4_000_000
MAX_PROFILE_BYTES = 16_000_000
MAX_PRICES_BYTES = 20_000_000
MAX_SET_BYTES = 256_000_000
MAX_ARRAYS_BYTES = 512_000_000
MAX_LINE_BYTES = 16_000_000
MAX_DEPTH = 64
# Values of a JSON document. One model's entry in a price map has about 30.
MAX_VALUES = 1_000_000
# Nodes of a YAML document, with each alias counted as what it stands for.
MAX_NODES = 100_000


class DocumentTooLarge(ValueError):
    """A document beyond a bound; the message says which."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read the whole file, never holding more than `max_bytes` + 1 of it.

    Raises:
        OSError: it cannot be read.
        DocumentTooLarge: it is larger than `max_bytes`.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DocumentTooLarge(f"is larger than {max_bytes:,} bytes")
    return content


def parse_json(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON within the bounds.

    Args:
        hook: json's `object_pairs_hook`.

    Raises:
        ValueError: it is not JSON, or (DocumentTooLarge) beyond a bound.
    """
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise DocumentTooLarge(f"is nested deeper than {MAX_DEPTH} levels") from None
    check_bounds(value)
    return value


def check_bounds(value: Any) -> None:
    """Raise DocumentTooLarge if the parsed JSON has too many levels or values."""
    level, seen = [value], 0
    for _ in range(MAX_DEPTH):
        seen += len(level)
        if seen > MAX_VALUES:
            raise DocumentTooLarge(f"holds more than {MAX_VALUES:,} values")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner.extend(each.values())
            elif isinstance(each, list):
                inner.extend(each)
        if not inner:
            return
        level = inner
    raise DocumentTooLarge(f"is nested deeper than {MAX_DEPTH} levels")


JsonObject = dict[str, object]


def nearest_hint(word: str, known: Collection[str]) -> str:
    """Return "; did you mean 'answer'?", or the list of what is known if nothing is near."""
    closest = closest_name(word, known)
    return f"; did you mean {closest!r}?" if closest else f"; known: {', '.join(sorted(known))}"


def short_repr(value: object) -> str:
    """Return the repr of `value`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


class Fields:
    """Read one JSON object. Every getter raises InvalidValidationSet with the field, the value and the fix."""

    def __init__(self, values: Mapping[str, object], known: Collection[str], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix
        for key in values:
            if key not in known:
                raise InvalidValidationSet(f"unknown field {prefix + key!r}{nearest_hint(key, known)}")

    def error(self, key: str, expected: str) -> InvalidValidationSet:
        if key not in self.values:
            return InvalidValidationSet(f"field {self.prefix + key!r} is missing: add {expected}")
        return InvalidValidationSet(
            f"field {self.prefix + key!r} must be {expected}, but it is {short_repr(self.values[key])}"
        )

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a string that is not empty")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else None

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, "a finite number, such as 42 or 3.5")
        return value

    def whole_number(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"a whole number from {low} to {high}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of strings, empty if the field is absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise self.error(key, "a list of strings that are not empty")
        return tuple(value)

    def span(self, key: str) -> tuple[int, int] | None:
        """Read [low, high], both included; None if the field is absent."""
        if not self.has(key):
            return None
        match self.values[key]:
            case [int(low), int(high)] if 0 <= low <= high:
                return low, high
        raise self.error(key, "two whole numbers [low, high] with 0 <= low <= high")

    def mapping(self, key: str) -> JsonObject:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "a JSON object")
        return value
