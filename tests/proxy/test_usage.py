"""Tokens and money: disjoint buckets, unknown is unknown, and nothing lost while Redis is away."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.recording.usage import (
    MOST_QUEUED,
    STREAM,
    TOTALS,
    TokenCounts,
    UsageRecord,
    UsageRecorder,
    cost_usd,
    counts_of,
)
from proxy.state.store import Store, StoreUnavailable
from router_core.types import Price

PRICE = Price(1e-6, 4e-6, cache_read_input_token_cost=1e-7)


def a_record(decision: str = "dec-1", cost: float | None = 0.25, ending: str = "complete") -> UsageRecord:
    return UsageRecord(decision, 1.7e9, "small", None, "scored", ending, 10, 4, 5, None, cost, 1.5, 0.5)


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


async def test_records_and_totals_reach_redis(store: Store) -> None:
    recorder = UsageRecorder(store)
    recorder.record(a_record("dec-1"))
    recorder.record(a_record("dec-2", cost=None, ending="broken"))
    await recorder.flush()
    entries: Any = await store.client.xrange(STREAM)
    totals: Any = await store.client.hgetall(f"{TOTALS}:small")

    assert [json.loads(fields["record"])["decision"] for _, fields in entries] == ["dec-1", "dec-2"]
    assert (totals["requests"], totals["prompt_tokens"], totals["output_tokens"]) == ("2", "20", "10")
    assert (float(totals["cost_usd"]), totals["cost_unknown"], totals["broken"]) == (0.25, "1", "1")


async def test_records_wait_while_redis_is_away() -> None:
    away = Store("redis://127.0.0.1:1/0")
    recorder = UsageRecorder(away)
    recorder.record(a_record())
    with pytest.raises(StoreUnavailable):
        await recorder.flush()

    assert recorder.queued == 1
    await away.close()


async def test_the_queue_is_bounded_and_says_what_it_drops(store: Store) -> None:
    dropped: list[None] = []
    recorder = UsageRecorder(store, lambda: dropped.append(None))
    for _ in range(MOST_QUEUED + 3):
        recorder.record(a_record())

    assert (recorder.queued, len(dropped)) == (MOST_QUEUED, 3)


async def test_figures_that_cannot_be_counted_are_left_out_and_hold_nothing_up(store: Store) -> None:
    await store.client.lpush(f"{TOTALS}:small", "wrong type")
    recorder = UsageRecorder(store)
    recorder.record(a_record())
    await recorder.flush()
    await recorder.flush()

    assert recorder.queued == 0
    assert await store.client.xlen(STREAM) == 1
