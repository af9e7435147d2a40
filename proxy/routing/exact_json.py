"""A JSON object read by a parser that says exactly what is wrong with it. quick_json is several times faster."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Never

from proxy.errors import BadRequest
from proxy.safety.json_shape import MAX_DEPTH, MAX_VALUES, TooMuchJson, refuse_many


def exact_object(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers, whole characters, no key twice, MAX_DEPTH levels and MAX_VALUES values.

    Raises:
        BadRequest: saying what is wrong, and where.
    """
    try:
        refuse_many(raw)
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except TooMuchJson as error:
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
    """Of a key given twice some parsers take the first, others the last: what is checked might not be what is used."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRequest(f"the body gives the key {twice[:60]!r} twice in one object", param=twice[:60])
    return made


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


def _check_values(document: dict[str, Any]) -> None:
    """What parses but cannot be written again: infinite numbers, half characters, nests that exhaust the stack."""
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
