"""One curve from expected errors and costs, by hand; and that it is the rule that is served."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.decision import argmin_with_ties
from router_core.evaluation.trials import POINTS, HeldOut, cost_weights, deferral_curve
from router_core.scoring import TIE_TOLERANCE
from router_core.types import Doubles

CHEAP, DEAR = 1.0, 3.0


def held_out(scores: Doubles, cents: Doubles) -> HeldOut:
    return HeldOut(np.zeros((len(scores), 1), dtype=np.float32), scores, cents, np.zeros(len(scores)))


def of_two(*errors: tuple[float, float]) -> tuple[Doubles, Doubles]:
    """Of a cheap and a dear model: (t, 2) errors and costs."""
    return np.array(errors), np.full((len(errors), 2), (CHEAP, DEAR))


def test_a_curve_runs_from_the_best_models_to_the_cheapest() -> None:
    """The second prompt is worth the dear model up to λ = 0.1, the first up to 0.4; the third never is."""
    errors, cents = of_two((0.9, 0.1), (0.3, 0.1), (0.1, 0.8))
    curve = deferral_curve(errors, cents, held_out(1.0 - errors, cents))
    assert (curve.costs[0], curve.qualities[0]) == pytest.approx((7 / 3, 0.9))
    assert (curve.costs[-1], curve.qualities[-1]) == pytest.approx((1.0, 1.7 / 3))
    assert sorted(set(curve.costs.round(9).tolist())) == pytest.approx([1.0, 5 / 3, 7 / 3])


def test_expectations_decide_and_true_costs_are_billed() -> None:
    errors, cents = of_two((0.9, 0.1))
    curve = deferral_curve(errors, cents, held_out(np.array([[0.25, 0.5]]), np.array([[20.0, 10.0]])))
    assert (curve.costs[0], curve.qualities[0]) == (10.0, 0.5)
    assert (curve.costs[-1], curve.qualities[-1]) == (20.0, 0.25)


def test_near_equals_go_to_the_cheaper_model_at_any_cost_weight() -> None:
    errors, cents = of_two((0.1 + TIE_TOLERANCE / 2, 0.1))
    assert set(deferral_curve(errors, cents, held_out(errors, cents)).costs) == {CHEAP}


def test_cost_weights_lie_where_models_overtake_each_other() -> None:
    weights = cost_weights(*of_two((0.9, 0.1), (0.3, 0.1), (0.1, 0.8)))
    assert (weights[0], weights[1], weights[-1], len(weights)) == (
        0.0,
        pytest.approx(0.1),
        pytest.approx(0.4),
        POINTS + 1,
    )
    assert (np.diff(weights) >= 0).all()


def test_prices_next_to_nothing_give_finite_cost_weights() -> None:
    weights = cost_weights(np.array([[0.5, 0.1], [0.5, 0.1]]), np.array([[1e-320, 2e-320], [1.0, 2.0]]))
    assert weights.max() == pytest.approx(0.4)


def test_without_a_better_expensive_model_there_is_one_cost_weight() -> None:
    assert cost_weights(*of_two((0.1, 0.8), (0.1, 0.1))).tolist() == [0.0]
    assert cost_weights(np.array([[0.9, 0.1]]), np.array([[2.0, 2.0]])).tolist() == [0.0]


@given(seed=st.integers(0, 10_000), models=st.integers(2, 5))
def test_each_point_is_the_served_rule_prompt_by_prompt(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    errors, cents, scores = rng.random((4, models)), rng.random((4, models)), rng.random((4, models))
    curve = deferral_curve(errors, cents, held_out(scores, cents))
    for at, weight in enumerate(cost_weights(errors, cents)):
        chosen = [argmin_with_ties(errors[row] + weight * cents[row], cents[row], TIE_TOLERANCE) for row in range(4)]
        assert curve.qualities[at] == pytest.approx(np.mean([scores[row, choice] for row, choice in enumerate(chosen)]))
        assert curve.costs[at] == pytest.approx(np.mean([cents[row, choice] for row, choice in enumerate(chosen)]))
    assert curve.costs[-1] == pytest.approx(cents.min(axis=1).mean())
