"""A prices file: what each model of an outcomes file costs. Looks no price up."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_core.documents import MAX_PRICES_BYTES, DocumentTooLarge, read_bounded
from router_core.errors import InvalidOutcomes, InvalidPrice
from router_core.evaluation.outcome_rows import json_object
from router_core.types import Price, price_field
from router_core.validation.fields import shown

_NEEDED = ("input_cost_per_token", "output_cost_per_token")


def read_prices(path: Path) -> dict[str, Price]:
    """`{"model-a": {"input_cost_per_token": 1e-6, "output_cost_per_token": 3e-6}}`; other fields are passed over.

    Raises:
        InvalidOutcomes: naming the file, and the model whose price cannot be used.
    """
    try:
        content = read_bounded(path, MAX_PRICES_BYTES)
        document = json_object(content.removeprefix(codecs.BOM_UTF8).decode(), str(path))
    except OSError as error:
        raise InvalidOutcomes(f"{path}: cannot be read ({error.strerror or error})") from None
    except DocumentTooLarge as error:
        raise InvalidOutcomes(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise InvalidOutcomes(f"{path}: is not UTF-8 text; a prices file is a JSON object of models") from None
    return {model: _price(stated, f"{path}: the price of {shown(model)}") for model, stated in document.items()}


def _price(stated: Any, where: str) -> Price:
    if not isinstance(stated, Mapping):
        raise InvalidOutcomes(f"{where} must be an object with {' and '.join(_NEEDED)}; got {shown(stated)}")
    costs = {name: cost for name, cost in stated.items() if cost is not None and price_field(name)}
    for name in _NEEDED:
        if name not in costs:
            raise InvalidOutcomes(f"{where} lacks {name}: add it in USD per token, 0 if it is free")
    for name, cost in costs.items():
        if isinstance(cost, bool) or not isinstance(cost, int | float):
            raise InvalidOutcomes(f"{where}: {name} must be a number, USD per token; got {shown(cost)}")
    try:
        return Price.of(costs)
    except InvalidPrice as error:
        raise InvalidOutcomes(f"{where}: {error}") from None
