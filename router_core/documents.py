"""Bounds of the documents that are read whole: bytes, levels, values. One place for all files that users bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 1_000_000
MAX_MANIFEST_BYTES = 4_000_000
MAX_PROFILE_BYTES = 16_000_000
MAX_PRICES_BYTES = 20_000_000
MAX_SET_BYTES = 256_000_000
MAX_ARRAYS_BYTES = 512_000_000
MAX_LINE_BYTES = 16_000_000
MAX_DEPTH = 64
MAX_VALUES = 1_000_000
"""Of JSON. One model's entry in a price map has about 30."""
MAX_NODES = 100_000
"""Of YAML, with each alias counted as what it stands for."""


class DocumentTooLarge(ValueError):
    """A document beyond a bound; the message says which."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read the whole file. Raises OSError, and DocumentTooLarge before more than the bound is in memory."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DocumentTooLarge(f"is larger than {max_bytes:,} bytes")
    return content


def parse_json(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON within the bounds. Raises ValueError; `hook` is json's object_pairs_hook."""
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise DocumentTooLarge(f"is nested deeper than {MAX_DEPTH} levels") from None
    check_bounds(value)
    return value


def check_bounds(value: Any) -> None:
    """Raises DocumentTooLarge where the parsed JSON has too many levels or values."""
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
