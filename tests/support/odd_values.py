from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (None, True, 0, 1.5, 2**70, "", "x", [], {}, [None], [{}], [["x"]], {"x": ["x"]})


def with_one_odd_value(value: Any) -> Iterator[Any]:
    """Yield a value with each of its parts, at any depth, replaced by each odd one."""
    yield from ODD
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from ({**value, name: each} for each in with_one_odd_value(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], each, *value[place + 1 :]] for each in with_one_odd_value(inner))
