"""At which λ another model would be chosen: every answer is checked by asking the rule itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.decision import argmin_with_ties, lambda_thresholds

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
