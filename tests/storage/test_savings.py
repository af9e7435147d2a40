from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.storage.savings import (
    MAX_GROUPS,
    OTHERS,
    MeasuredLabels,
    SavingsReport,
    coverage_in_words,
    quality_in_words,
)
from router_core.decision import Z_90
from router_core.estimators import SHRINKAGE

MAP = "map-1"
# Twenty labels in each of four clusters.
EVIDENCE = {name: MeasuredLabels(MAP, (20.0,) * 4) for name in ("small", "large")}
NOTHING_SPENT: dict[str, Any] = {"days": {}, "profiling": {"usd": 0.0, "jobs": 0, "unpriced": 0, "by_model": {}}}


def savings_report(
    decisions: Iterable[Mapping[str, Any]], evidence: Any, spending: Any = None, bias: Any = None
) -> dict[str, Any]:
    report = SavingsReport(bias)
    for decision in decisions:
        report.add(decision)
    return report.to_json(evidence, spending)


def total_of(decisions: Iterable[Mapping[str, Any]], evidence: Any = EVIDENCE, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = savings_report(decisions, evidence, **more)["total"]
    return found


def a_decision(cost: float | None = 0.25, baseline: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "ended_at": "2026-11-29T10:00:00.000Z",
        "map": MAP,
        "score": None,
        "usage": {"prompt_tokens": 10, "cached_tokens": None, "output_tokens": 5},
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
    total = total_of([a_decision(), a_decision(cost=0.75, failed_attempts_cost_usd=0.5)])

    assert (total["cost_usd"], total["baseline_usd"], total["saved_usd"]) == (1.0, 2.0, 1.0)
    assert (total["saved_share"], total["failed_attempts_cost_usd"]) == (0.5, 0.5)
    assert (total["expected_error"], total["baseline_expected_error"]) == (0.3, 0.1)


def test_a_loss_is_not_hidden() -> None:
    assert total_of([a_decision(cost=3.0)])["saved_usd"] == -2.0


def test_requests_of_unknown_cost_are_counted_and_in_no_sum() -> None:
    total = total_of([a_decision(cost=None), a_decision(baseline=None), a_decision()])

    assert (total["requests"], total["unpriced"], total["compared"]) == (3, 1, 1)
    assert (total["cost_usd"], total["compared_cost_usd"], total["saved_usd"]) == (0.5, 0.25, 0.75)


def test_a_request_without_scores_is_not_judged() -> None:
    total = total_of([a_decision(candidates=[])])

    assert (total["judged"], total["expected_error"]) == (0, None)


def test_a_request_counts_in_the_group_of_each_of_its_tags() -> None:
    by = savings_report([a_decision(tags=["a", "b"]), a_decision(key=None)], EVIDENCE)["by"]

    assert {tag: sums["requests"] for tag, sums in by["tag"].items()} == {"(none)": 1, "a": 1, "b": 1}
    assert set(by["key"]) == {"(none)", "k1"}
    assert list(by["cluster"]) == ["rain"]
    assert list(by["day"]) == ["2026-11-29"]


def test_groups_beyond_the_limit_are_summed_together() -> None:
    found = savings_report((a_decision(key=f"k{n}") for n in range(MAX_GROUPS + 5)), EVIDENCE)["by"]["key"]

    assert len(found) == MAX_GROUPS + 1
    assert found[OTHERS]["requests"] == 5


@given(st.lists(st.floats(0, 10).map(lambda usd: round(usd, 12)), max_size=200))
def test_the_sum_is_exact_whatever_the_order(costs: list[float]) -> None:
    decisions = [a_decision(cost=cost) for cost in costs]
    forward, backward = total_of(decisions), total_of(reversed(decisions))

    assert forward == backward
    assert round(forward["cost_usd"] * 1e12) == sum(round(cost * 1e12) for cost in costs)


def test_bounds_are_those_of_the_labels_and_do_not_shrink_with_the_number_of_requests() -> None:
    one, many = total_of([a_decision()]), total_of([a_decision()] * 500)
    # shares of 0.6 and 0.4 of two clusters of 20 labels, the shrinkage included
    worth = 1 / ((0.6**2 + 0.4**2) / (20 + SHRINKAGE))
    deviation = np.sqrt(0.3 * 0.7 / (worth + 1))

    assert one["expected_error_high"] - 0.3 == pytest.approx(Z_90 * deviation)
    assert 0.3 - one["expected_error_low"] == pytest.approx(Z_90 * deviation)
    for name in ("expected_error_low", "expected_error_high", "error_difference_low", "baseline_expected_error_high"):
        assert many[name] == pytest.approx(one[name])


def test_the_difference_to_the_baseline_has_the_doubt_of_both_models() -> None:
    total = total_of([a_decision()])
    worth = 1 / ((0.6**2 + 0.4**2) / (20 + SHRINKAGE))
    deviation = np.sqrt((0.3 * 0.7 + 0.1 * 0.9) / (worth + 1))

    assert total["error_difference"] == pytest.approx(0.2)
    assert total["error_difference_high"] - 0.2 == pytest.approx(Z_90 * deviation)


def test_a_request_that_the_baseline_answers_is_no_difference_and_no_doubt() -> None:
    total = total_of([a_decision(model="large")])

    assert [total[f"error_difference{bound}"] for bound in ("", "_low", "_high")] == [0, 0, 0]
    assert total["expected_error_low"] < 0.1 < total["expected_error_high"]


def test_doubts_of_several_models_add_up() -> None:
    both = total_of([a_decision(), a_decision(model="large")])
    alone = [total_of([a_decision(model=name)])["expected_error_high"] for name in ("small", "large")]

    assert both["expected_error_high"] - 0.2 == pytest.approx(sum(alone) / 2 - 0.2)


def test_a_profile_that_is_not_known_any_more_counts_as_one_without_labels() -> None:
    gone, other_map = total_of([a_decision()], {}), total_of([a_decision(map="map-2")])

    for total in (gone, other_map):
        assert (total["expected_error_low"], total["expected_error_high"]) == (0, 1)


def test_a_prompt_without_clusters_has_the_doubt_of_the_whole_profile() -> None:
    total = total_of([a_decision(clusters=[])])
    assert total["expected_error_high"] - 0.3 == pytest.approx(Z_90 * np.sqrt(0.21 / 81), rel=0.01)


def test_feedback_stands_beside_what_was_expected_of_the_same_answers() -> None:
    total = total_of([a_decision(score=1.0), a_decision(score=0.0), a_decision(score=1.0, model="large"), a_decision()])

    assert (total["scored"], total["observed_error"]) == (3, pytest.approx(1 / 3))
    assert total["scored_expected"] == pytest.approx((0.3 + 0.3 + 0.1) / 3)
    assert total["observed_error_low"] < 1 / 3 < total["observed_error_high"]
    assert total_of([a_decision()])["observed_error"] is None


def test_what_measuring_cost_is_taken_off_what_was_saved() -> None:
    spent = {**NOTHING_SPENT, "profiling": {**NOTHING_SPENT["profiling"], "usd": 1.0}}

    assert total_of([a_decision()], spending=spent)["net_saved_usd"] == -0.25
    assert total_of([a_decision()])["net_saved_usd"] is None


def test_cached_tokens_are_counted() -> None:
    usage = {"prompt_tokens": 100, "cached_tokens": 60, "output_tokens": 7}
    total = total_of([a_decision(usage=usage), a_decision()])
    assert (total["prompt_tokens"], total["cached_tokens"], total["output_tokens"]) == (110, 60, 12)


@pytest.mark.parametrize(
    ("routed", "labels", "words"),
    [
        (0.3, 2000.0, "get 20.0 more wrong than the baseline (18.5 more to 21.5 more)"),
        (0.3, 2000.0, "it is the price of what was saved"),
        (0.02, 2000.0, "it is better"),
        (0.12, 5.0, "the labels do not tell the two apart"),
    ],
)
def test_whether_quality_held_is_said_in_words(routed: float, labels: float, words: str) -> None:
    rows = [{"model": "small", "expected_error": routed}, {"model": "large", "expected_error": 0.1}]
    evidence = {name: MeasuredLabels(MAP, (labels,) * 4) for name in EVIDENCE}
    assert words in quality_in_words(total_of([a_decision(candidates=rows)], evidence))


def test_without_expected_errors_nothing_is_said_of_quality() -> None:
    assert "Of no request" in quality_in_words(total_of([a_decision(candidates=[])]))


def test_the_report_says_of_which_part_of_all_spending_it_is() -> None:
    def covered(usd: float) -> str:
        days = {"2026-11-29": {"requests": 1, "cost_usd": usd, "cost_unknown": 0}}
        return coverage_in_words(savings_report([a_decision()], EVIDENCE, {**NOTHING_SPENT, "days": days}))

    assert "of which these have 25.0%" in covered(1.0)
    assert "these are all of them" in covered(0.25)
    assert "2026-11-29 10:00 to 2026-11-29 10:00" in covered(0.25)
    assert "No decision" in coverage_in_words(savings_report([], EVIDENCE, NOTHING_SPENT))
