import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.decision import lambda_thresholds, mix_deviations, wilson_interval
from router_core.eligibility import eligible
from router_core.estimators import SHRINKAGE
from router_core.kernels import argmin_with_ties
from router_core.scoring import ScoringParams, rank
from router_core.types import Assignment, Requirements
from tests.router_core.makers import a_candidate, a_pool, a_profile, an_assignment, priced_pool


def test_the_ranking_is_by_score() -> None:
    pool = priced_pool({"c": (0.3, 0.0), "a": (0.1, 0.0), "b": (0.2, 0.0)})
    assert rank(eligible(pool, Requirements()), an_assignment(0), Requirements(), ScoringParams()).ranking == (
        "a",
        "b",
        "c",
    )


def test_clusters_are_named_heaviest_first() -> None:
    between = Assignment(np.array([[2, 0]]), np.array([[0.7, 0.3]], dtype=np.float32))
    decision = rank(eligible(a_pool(a_candidate()), Requirements()), between, Requirements(), ScoringParams())
    assert [(cluster, name) for cluster, name, _ in decision.clusters] == [(2, "c"), (0, "a")]


def test_few_labels_make_a_wide_interval() -> None:
    few, many = a_profile((0.2,) * 3, labels=2.0), a_profile((0.2,) * 3, labels=2000.0)
    candidate = a_candidate()
    pool = a_pool(type(candidate)("few", few, candidate.price), type(candidate)("many", many, candidate.price))
    rows = {
        c.model: c
        for c in rank(eligible(pool, Requirements()), an_assignment(0), Requirements(), ScoringParams()).candidates
    }
    assert rows["few"].error_high - rows["few"].error_low > 0.5
    assert rows["many"].error_high - rows["many"].error_low < 0.05
    assert all(row.error_low <= row.expected_error <= row.error_high for row in rows.values())


def test_the_interval_is_wilsons_by_hand() -> None:
    """15 errors of 50 at z = 1.645: the published formula by hand."""
    low, high = wilson_interval(np.array([0.3]), np.array([50.0]))
    assert (low[0], high[0]) == (pytest.approx(0.2060, abs=5e-4), pytest.approx(0.4144, abs=5e-4))


def test_without_labels_the_interval_is_everything() -> None:
    low, high = wilson_interval(np.array([0.5]), np.array([0.0]))
    assert (low[0], high[0]) == pytest.approx((0.0, 1.0), abs=1e-3)


LINES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=8)


def test_two_models_swap_where_their_scores_are_within_the_tie() -> None:
    """0.1 + λ·1 against 0.3: equal at 0.2, and the cheaper wins from 0.195 on."""
    flips = lambda_thresholds(np.array([0.1, 0.3]), np.array([1.0, 0.0]), 0.1, tie=0.005)
    assert flips == pytest.approx([0.1, 0.195])


def test_the_threshold_of_the_choice_is_the_lambda_in_use() -> None:
    flips = lambda_thresholds(np.array([0.1, 0.3]), np.array([1.0, 0.0]), 0.7, tie=0.005)
    assert flips[1] == 0.7
    assert flips[0] == pytest.approx(0.195, abs=1e-6)


def test_a_worse_and_more_expensive_model_has_no_threshold() -> None:
    flips = lambda_thresholds(np.array([0.1, 0.5]), np.array([0.0, 1.0]), 0.1, tie=0.005)
    assert math.isnan(flips[1])


@given(LINES, st.floats(0, 10))
def test_at_each_threshold_the_model_is_chosen(lines: list[tuple[float, float]], lambda_: float) -> None:
    errors, costs = np.array([e for e, _ in lines]), np.array([c for _, c in lines])
    for row, flip in enumerate(lambda_thresholds(errors, costs, lambda_, tie=0.005)):
        if not math.isnan(flip):
            assert argmin_with_ties(errors + flip * costs, costs, 0.005) == row


@given(LINES, st.floats(0, 10), st.floats(0, 10))
def test_every_model_that_some_lambda_chooses_has_a_threshold(
    lines: list[tuple[float, float]], lambda_: float, other: float
) -> None:
    """Costs on a grid, so that no crossing lies closer to another than rounding can tell."""
    errors = np.round([e for e, _ in lines], 2)
    costs = np.round([c for _, c in lines], 1)
    chosen = argmin_with_ties(errors + other * costs, costs, 0.005)
    flip = lambda_thresholds(errors, costs, lambda_, tie=0.005)[chosen]
    assert abs(flip - lambda_) <= abs(other - lambda_) + 1e-6


def test_no_threshold_is_above_the_largest_lambda() -> None:
    flips = lambda_thresholds(np.array([0.5, 0.2, 0.1]), np.array([0.0, 1e-300, 5.0]), 0.1, 1e-12)

    assert np.isnan(flips[0])  # the cheapest, by so little that λ would have to be beyond all bounds
    assert flips[1:] == pytest.approx([0.1, 0.02], rel=1e-6)


def test_a_mix_is_worth_no_more_labels_than_the_model_has() -> None:
    labels = np.full((1, 4), 1.0 + SHRINKAGE)
    even, single = (
        float(mix_deviations(np.array([weights]), np.full((1, 4), 0.5), labels)[0])
        for weights in ([0.25] * 4, [1.0, 0.0, 0.0, 0.0])
    )

    assert even == pytest.approx(np.sqrt(0.25 / (4 + 1)))  # not of 6, as 4 × 1.5 labels would be
    assert single == pytest.approx(np.sqrt(0.25 / (1.5 + 1)))


def test_a_mix_deviates_by_its_share_and_a_model_without_labels_by_all() -> None:
    labels = np.array([[SHRINKAGE] * 2, [100 + SHRINKAGE] * 2])
    weights = np.array([[0.25, 0.25], [0.0, 0.0]])
    found = mix_deviations(weights, np.full((2, 2), 0.5), labels)

    assert found.tolist() == [0.25, 0.0]
