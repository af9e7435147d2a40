from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.storage.savings import MAX_GROUPS, OTHERS, savings_report


def a_decision(cost: float | None = 0.25, baseline: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "ended_at": "2026-11-29T10:00:00.000Z",
        "model": "small",
        "key": "k1",
        "tags": [],
        "clusters": [{"id": 1, "name": "rain", "weight": 0.6}, {"id": 2, "name": "code", "weight": 0.4}],
        "candidates": [{"model": "small", "expected_error": 0.3}, {"model": "large", "expected_error": 0.1}],
        "cost_usd": cost,
        "cost_estimated": False,
        "failed_attempts_cost_usd": 0.0,
        "baseline": {"model": "large", "cost_usd": baseline},
        **more,
    }


def test_what_was_saved_is_the_baselines_cost_less_the_cost() -> None:
    total = savings_report([a_decision(), a_decision(cost=0.75, failed_attempts_cost_usd=0.5)])["total"]

    assert (total["cost_usd"], total["baseline_usd"], total["saved_usd"]) == (1.0, 2.0, 1.0)
    assert (total["saved_share"], total["failed_attempts_cost_usd"]) == (0.5, 0.5)
    assert (total["expected_error"], total["baseline_expected_error"]) == (0.3, 0.1)


def test_a_loss_is_not_hidden() -> None:
    assert savings_report([a_decision(cost=3.0)])["total"]["saved_usd"] == -2.0


def test_requests_of_unknown_cost_are_counted_and_in_no_sum() -> None:
    total = savings_report([a_decision(cost=None), a_decision(baseline=None), a_decision()])["total"]

    assert (total["requests"], total["unpriced"], total["compared"]) == (3, 1, 1)
    assert (total["cost_usd"], total["compared_cost_usd"], total["saved_usd"]) == (0.5, 0.25, 0.75)


def test_a_request_without_scores_is_not_judged() -> None:
    total = savings_report([a_decision(candidates=[])])["total"]

    assert (total["judged"], total["expected_error"]) == (0, None)


def test_a_request_counts_in_the_group_of_each_of_its_tags() -> None:
    by = savings_report([a_decision(tags=["a", "b"]), a_decision(key=None)])["by"]

    assert {tag: sums["requests"] for tag, sums in by["tag"].items()} == {"(none)": 1, "a": 1, "b": 1}
    assert set(by["key"]) == {"(none)", "k1"}
    assert list(by["cluster"]) == ["rain"]
    assert list(by["day"]) == ["2026-11-29"]


def test_groups_beyond_the_limit_are_summed_together() -> None:
    found = savings_report(a_decision(key=f"k{number}") for number in range(MAX_GROUPS + 5))["by"]["key"]

    assert len(found) == MAX_GROUPS + 1
    assert found[OTHERS]["requests"] == 5


@given(st.lists(st.floats(0, 10).map(lambda usd: round(usd, 12)), max_size=200))
def test_the_sum_is_exact_whatever_the_order(costs: list[float]) -> None:
    decisions = [a_decision(cost=cost) for cost in costs]
    forward, backward = savings_report(decisions)["total"], savings_report(reversed(decisions))["total"]

    assert forward == backward
    assert round(forward["cost_usd"] * 1e12) == sum(round(cost * 1e12) for cost in costs)
