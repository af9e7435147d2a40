"""OpenRouter's `provider` object, as far as it has a meaning here. Its other fields are dropped with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import BadRequest

PER_MILLION = 1e6
_CAPS = ("prompt", "completion")
_FREE_HERE = ("request", "image", "audio")
"""OpenRouter's other caps: nothing is billed by them here, so none can be exceeded."""
_PRICE = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_SHOWN = 60


@dataclass(frozen=True)
class Provider:
    """None: not stated."""

    only: tuple[str, ...] | None = None
    """Names of models: the only candidates."""
    ignore: tuple[str, ...] = ()
    """Names of models that are none."""
    max_input_cost_per_token: float | None = None
    """USD. Models whose price is above it are ruled out."""
    max_output_cost_per_token: float | None = None
    allow_fallbacks: bool | None = None


NO_PROVIDER = Provider()


def read_provider(body: Mapping[str, Any]) -> Provider:
    """Raises BadRequest naming the field."""
    stated = body.get("provider")
    if stated is None:
        return NO_PROVIDER
    if not isinstance(stated, dict):
        raise BadRequest("`provider` must be an object", param="provider")
    prompt, completion = _max_price(stated.get("max_price"))
    return Provider(
        only=_names(stated, "only"),
        ignore=_names(stated, "ignore") or (),
        max_input_cost_per_token=prompt,
        max_output_cost_per_token=completion,
        allow_fallbacks=_optional_flag(stated, "allow_fallbacks"),
    )


def _names(stated: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    value = stated.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise BadRequest(f"`provider.{field}` must be a list of model names", param=f"provider.{field}")
    return tuple(dict.fromkeys(value))


def _optional_flag(stated: Mapping[str, Any], field: str) -> bool | None:
    value = stated.get(field)
    if not isinstance(value, bool | None):
        raise BadRequest(f"`provider.{field}` must be true or false", param=f"provider.{field}")
    return value


def _max_price(stated: Any) -> tuple[float | None, float | None]:
    if stated is None:
        return None, None
    if not isinstance(stated, dict):
        raise BadRequest(
            "`provider.max_price` must be an object: {prompt, completion} in USD per million tokens",
            param="provider.max_price",
        )
    for name in stated:
        if name not in _CAPS + _FREE_HERE:  # a cap that is misspelt would be a cap that is not kept
            raise BadRequest(
                f"`provider.max_price.{name[:_SHOWN]}` is not a price; known are {', '.join(_CAPS)}",
                param="provider.max_price",
            )
    prompt, completion = (_per_token(stated.get(name), f"provider.max_price.{name}") for name in _CAPS)
    return prompt, completion


def _per_token(value: Any, param: str) -> float | None:
    """USD per million tokens, a number or its text, to USD per token."""
    if value is None:
        return None
    number = _number(value)
    if not (math.isfinite(number) and number >= 0):
        shown = repr(value)[:_SHOWN]
        raise BadRequest(
            f"`{param}` must be USD per million tokens, a finite number, 0 or more; got {shown}", param=param
        )
    return number / PER_MILLION


def _number(value: Any) -> float:
    """NaN where it is none."""
    if isinstance(value, str):
        return float(value) if len(value) <= _SHOWN and _PRICE.fullmatch(value) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
