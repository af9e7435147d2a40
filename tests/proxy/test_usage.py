"""Tokens and money: disjoint buckets, and unknown is unknown."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from proxy.recording.usage import TokenCounts, UsageRecord, cost_usd, counts_of
from router_core.types import Price

PRICE = Price(1e-6, 4e-6, cache_read_input_token_cost=1e-7)


def test_cached_tokens_are_paid_once() -> None:
    counts = counts_of(
        {
            "prompt_tokens": 1000,
            "completion_tokens": 100,
            "prompt_tokens_details": {"cached_tokens": 800},
            "completion_tokens_details": {"reasoning_tokens": 60},
        }
    )

    assert counts == TokenCounts(1000, 800, 100, 60)
    assert cost_usd(counts, PRICE) == pytest.approx(200e-6 + 80e-6 + 400e-6)


@pytest.mark.parametrize(
    "usage", [None, "x", {}, {"prompt_tokens": -1}, {"prompt_tokens": "3", "completion_tokens": 2}]
)
def test_what_was_not_reported_costs_unknown_not_nothing(usage: Any) -> None:
    assert counts_of(usage).prompt_tokens is None
    assert cost_usd(counts_of(usage), PRICE) is None
    assert cost_usd(TokenCounts(1, 0, 1, 0), None) is None


@pytest.mark.parametrize("cost", [None, 0.0, 1.25e-7, 9_000.000_000_000_001, 1e13])
def test_a_record_is_plain_json_of_all_its_fields(cost: float | None) -> None:
    """Processes of an earlier version may read it. A cost of 1e13 is more picodollars than 64 bits hold."""
    record = UsageRecord("dec-1", 1.7e9 + 0.1, "größe", "k", "scored", "complete", 10, None, 5, None, cost, 1.5, 0.5)
    assert json.loads(record.to_json()) == {**asdict(record), "cost_picousd": record.cost_picousd}
