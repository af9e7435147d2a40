"""A prices file: LiteLLM's field names, and a message for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from router_core.errors import InvalidOutcomes
from router_core.evaluation.outcomes import read_prices
from router_core.types import Price

FULL = {"input_cost_per_token": 1e-6, "output_cost_per_token": 3e-6}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "prices.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_prices_have_litellms_names_and_other_fields_are_ignored(tmp_path: Path) -> None:
    cached = FULL | {"cache_read_input_token_cost": 1e-7, "mode": "chat"}
    free = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    prices = read_prices(written(tmp_path, {"paid": cached, "free": free}))
    assert prices == {"paid": Price(1e-6, 3e-6, 1e-7), "free": Price(0.0, 0.0)}


@pytest.mark.parametrize(
    ("price", "told"),
    [
        ({"output_cost_per_token": 3e-6}, "lacks input_cost_per_token"),
        (FULL | {"output_cost_per_token": None}, "lacks output_cost_per_token"),
        (FULL | {"input_cost_per_token": "1e-6"}, "input_cost_per_token must be a number, USD per token; got '1e-6'"),
        (FULL | {"input_cost_per_token": False}, "got False"),
        (FULL | {"input_cost_per_token": -1e-6}, "got -1e-06"),
        (FULL | {"output_cost_per_token": float("nan")}, "got nan"),
        (FULL | {"output_cost_per_token": 10**30}, "from 0 to 1e+06"),
        (3e-6, "must be an object"),
    ],
)
def test_an_unusable_price_is_refused_with_its_model(tmp_path: Path, price: object, told: str) -> None:
    path = written(tmp_path, {"fine": FULL, "large": price})
    with pytest.raises(InvalidOutcomes, match=rf"prices\.json: the price of 'large'.*{re.escape(told)}"):
        read_prices(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a":\n1 2}', "is not JSON (Expecting ',' delimiter at line 2, column 3)"),
        (b"[]", "must be a JSON object"),
        (b'{"a": {}, "a": {}}', "is not usable JSON ('a' is stated twice: keep one)"),
        (b"\x1f\x8b\x08", "is not UTF-8"),
    ],
)
def test_a_file_without_prices_is_refused_with_its_name(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(InvalidOutcomes, match=rf"prices\.json: {re.escape(told)}"):
        read_prices(written(tmp_path, content))
    with pytest.raises(InvalidOutcomes, match=r"none\.json: cannot be read"):
        read_prices(tmp_path / "none.json")
