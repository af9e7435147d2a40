"""Trials taken together: undefined ones are left out, and told."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.evaluation.curves import BUDGETS, Baselines, Curve
from router_core.evaluation.study import summarize, trial_metrics

ANCHORS = Baselines(cheapest=1.0, best=5.0, dearest=9.0, best_quality=0.8)
BEST_IS_CHEAPEST = Baselines(cheapest=1.0, best=1.0, dearest=9.0, best_quality=0.8)


def a_line(top: float) -> Curve:
    """Of slope, from the best single model's cost to the cheapest's."""
    return Curve(np.array([5.0, 1.0]), np.array([top, 0.4]))


def test_the_mean_curve_has_the_mean_area() -> None:
    found = summarize([trial_metrics(a_line(0.8), ANCHORS), trial_metrics(a_line(0.6), ANCHORS)], seed=0)
    assert found.area.mean == pytest.approx((0.6 + 0.5) / 2)
    assert found.curve.qualities.mean() == pytest.approx(found.area.mean)
    assert found.curve.qualities[[0, -1]] == pytest.approx([0.7, 0.4])


def test_costs_of_the_mean_curve_are_relative_to_the_best_single_models() -> None:
    costs = summarize([trial_metrics(a_line(0.8), ANCHORS)], seed=0).curve.costs
    assert (costs[0], costs[-1], costs.size) == (1.0, pytest.approx(0.2), BUDGETS)
    assert (np.diff(costs) < 0).all()


def test_a_trial_without_an_area_does_not_count_for_it() -> None:
    found = summarize([trial_metrics(a_line(0.8), ANCHORS), trial_metrics(a_line(0.2), BEST_IS_CHEAPEST)], seed=0)
    assert (found.area.mean, found.area.trials) == pytest.approx((0.6, 1))
    assert (found.peak.mean, found.peak.trials) == pytest.approx(((0.8 + 0.4) / 2, 2))
    assert found.curve.qualities[0] == pytest.approx(0.8)


def test_a_figure_that_no_trial_defines_is_nan() -> None:
    found = summarize([trial_metrics(a_line(0.2), BEST_IS_CHEAPEST)], seed=0)
    assert np.isnan([found.area.mean, found.area.low, found.area.high]).all()
    assert found.area.trials == 0
    assert np.isnan(found.curve.costs).all()
    assert np.isnan(found.curve.qualities).all()


def test_quality_that_is_not_reached_has_no_qnc_and_is_counted() -> None:
    found = summarize([trial_metrics(a_line(0.8), ANCHORS), trial_metrics(a_line(0.6), ANCHORS)], seed=0)
    assert (found.reached, found.qnc.trials, found.qnc.mean) == pytest.approx((0.5, 1, 1.0))


def test_free_quality_is_reached_although_its_qnc_is_undefined() -> None:
    free = Baselines(cheapest=0.0, best=0.0, dearest=9.0, best_quality=0.8)
    found = summarize([trial_metrics(a_line(0.8), free), trial_metrics(a_line(0.6), free)], seed=0)
    assert (found.reached, found.qnc.trials) == (0.5, 0)


def test_an_interval_holds_its_mean() -> None:
    area = summarize([trial_metrics(a_line(top), ANCHORS) for top in (0.5, 0.6, 0.7, 0.8)], seed=0).area
    assert area.low < area.mean < area.high
