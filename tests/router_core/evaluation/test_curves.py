from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.evaluation.curves import (
    BUDGETS,
    Baselines,
    Curve,
    area,
    bootstrap_interval,
    curve_metrics,
    least_cost,
    paired_difference,
    paper_area,
    quality_within,
)


def a_curve(*points: tuple[float, float]) -> Curve:
    """Build (cost, quality) pairs in order of λ."""
    costs, qualities = zip(*points, strict=True)
    return Curve(np.array(costs, dtype=float), np.array(qualities, dtype=float))


CURVE = a_curve((3.0, 0.9), (2.0, 0.8), (1.0, 0.4))
# The third point costs more than the second: at a higher λ.
NOISY = a_curve((3.0, 0.9), (2.0, 0.6), (2.5, 0.8), (1.0, 0.4))


def within(curve: Curve, *budgets: float) -> list[float]:
    return [round(float(quality), 9) for quality in quality_within(curve, np.array(budgets))]


def literally(curve: Curve, budget: float) -> float:
    """Apply the definition, one point after the other."""
    points = list(zip(curve.costs.tolist(), curve.qualities.tolist(), strict=True))
    for number, (cost, quality) in enumerate(points):
        if cost <= budget * (1 + 1e-12):
            if number == 0:
                return float(quality)
            dearer, other = points[number - 1]
            share = min(max((dearer - budget) / (dearer - cost), 0.0), 1.0)
            return float(other + share * (quality - other))
    return float(points[-1][1])


def test_a_budget_buys_the_first_point_within_it_mixed_with_the_one_before() -> None:
    assert within(CURVE, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0) == [0.9, 0.9, 0.85, 0.8, 0.6, 0.4]


def test_a_budget_below_the_curve_gets_its_last_point() -> None:
    assert within(CURVE, 0.5, 0.0) == [0.4, 0.4]


def test_a_later_point_that_costs_more_is_never_bought() -> None:
    assert within(NOISY, 2.5, 2.0) == [0.75, 0.6]
    assert within(NOISY, 1.75) == [0.6]  # half of (2.5, 0.8), half of (1.0, 0.4)


def test_a_budget_equal_to_a_cost_up_to_rounding_buys_it() -> None:
    """0.1 + 0.2 is a little more than 0.3; else the budget would go to a mixture of the two points after it."""
    assert within(a_curve((0.1 + 0.2, 1.0), (5.0, 0.0), (0.1, 0.0)), 0.3) == [1.0]


def test_area_is_the_mean_over_the_budgets() -> None:
    """Between 1 and 3: the trapezoids 0.6 and 0.85, equally wide; the kink lies between two budgets."""
    assert area(CURVE, 1.0, 3.0) == pytest.approx((0.6 + 0.85) / 2, abs=1e-3)
    straight = a_curve((3.0, 0.8), (1.0, 0.4))
    assert area(straight, 1.0, 3.0) == pytest.approx(0.6)
    assert area(straight, 3.0, 5.0) == pytest.approx(0.8)


def test_area_is_undefined_where_the_best_model_is_the_cheapest() -> None:
    assert np.isnan(area(CURVE, 1.0, 1.0))
    assert np.isnan(area(CURVE, 2.0, 1.0))


def test_the_papers_area_is_the_integral_over_relative_cost() -> None:
    """Dearest 4: from 1/4 to 1/2 at 0.6 on average, to 3/4 at 0.85, to 1 at 0.9."""
    assert paper_area(CURVE, 1.0, 4.0) == pytest.approx((0.6 + 0.85 + 0.9) / 4)
    assert paper_area(CURVE, 1.0, 4.0, 0.5) == pytest.approx(0.6 / 4)
    assert np.isnan(paper_area(CURVE, 2.0, 4.0, 0.5))


def test_the_papers_area_of_a_noisy_curve_jumps_where_its_budget_does() -> None:
    """Dearest 3. Below 2 the mixture is of 2.5 and 1: from 0.4 up to 0.4 + 2/3·0.4, then on from 0.6 to 0.9."""
    assert paper_area(NOISY, 1.0, 3.0) == pytest.approx((0.4 + 0.4 / 3 + 0.75) / 3)


def test_the_least_cost_may_lie_between_two_points() -> None:
    assert least_cost(CURVE, 0.6) == pytest.approx(1.5)
    assert least_cost(CURVE, 0.9) == pytest.approx(3.0)
    assert least_cost(CURVE, 0.1) == pytest.approx(1.0)
    assert np.isnan(least_cost(CURVE, 0.91))


def test_a_quality_equal_up_to_rounding_is_reached() -> None:
    assert least_cost(a_curve((2.0, 0.3), (1.0, 0.0)), 0.1 + 0.2) == 2.0


def test_the_least_cost_is_the_cheapest_of_several_crossings() -> None:
    curve = a_curve((3.0, 0.9), (2.0, 0.5), (2.5, 0.9), (1.0, 0.4))
    assert least_cost(curve, 0.7) == pytest.approx(1.0 + 1.5 * 0.6)


def test_the_metrics_of_a_curve_match_those_computed_by_hand() -> None:
    found = curve_metrics(CURVE, Baselines(cheapest=1.0, best=2.5, most_expensive=4.0, best_quality=0.8))
    assert [found.qnc, found.cost_save, found.peak, found.perf_gain] == pytest.approx([0.8, 0.2, 0.9, 0.125])
    assert found.area == pytest.approx((2 * 0.6 + 0.825) / 3, abs=1e-3)
    assert [found.paper_area, found.paper_area_half] == pytest.approx([2.35 / 4, 0.15])


def test_undefined_metrics_are_nan_without_a_warning() -> None:
    never = curve_metrics(CURVE, Baselines(cheapest=1.0, best=1.0, most_expensive=1.0, best_quality=0.95))
    undefined = (never.area, never.paper_area, never.paper_area_half, never.qnc, never.cost_save)
    assert np.isnan(undefined).all()
    assert never.perf_gain == pytest.approx(0.9 / 0.95 - 1)
    free = curve_metrics(CURVE, Baselines(cheapest=0.0, best=0.0, most_expensive=0.0, best_quality=0.0))
    assert np.isnan([value for value in astuple(free) if value != free.peak]).all()


def test_a_curve_needs_a_quality_for_every_cost_and_at_least_one_point() -> None:
    with pytest.raises(ValueError, match="as many costs as qualities"):
        Curve(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="as many costs as qualities"):
        Curve(np.empty(0), np.empty(0))


COSTS = st.integers(0, 20).map(lambda n: n / 4)
QUALITIES = st.integers(0, 20).map(lambda n: n / 20)
POINTS = st.lists(st.tuples(COSTS, QUALITIES), min_size=1, max_size=12)


@given(POINTS, st.lists(st.floats(0, 6), min_size=1, max_size=8))
def test_many_budgets_at_once_give_what_each_gives_alone(
    points: Sequence[tuple[float, float]], budgets: list[float]
) -> None:
    curve = a_curve(*points)
    expected = [literally(curve, budget) for budget in budgets]
    assert quality_within(curve, np.array(budgets)) == pytest.approx(expected, abs=1e-9)


@given(POINTS, COSTS, QUALITIES)
def test_a_point_that_is_no_cheaper_than_an_earlier_one_lets_the_budget_buy_nothing_more(
    points: Sequence[tuple[float, float]], more: float, quality: float
) -> None:
    """However good it is: appended at a higher λ, it costs what has been within the budget before."""
    cheapest = min(cost for cost, _ in points)
    noisy = a_curve(*points, (cheapest + more, quality))
    budgets = np.linspace(cheapest, 6, 50)
    np.testing.assert_array_equal(quality_within(noisy, budgets), quality_within(a_curve(*points), budgets))


@given(POINTS, st.floats(0.01, 3), st.floats(0.01, 3))
def test_the_exact_integral_agrees_with_many_budgets(
    points: Sequence[tuple[float, float]], low: float, width: float
) -> None:
    curve = a_curve(*points)
    middles = low + width * (np.arange(20_000) + 0.5) / 20_000
    summed = quality_within(curve, middles).mean() * width / (low + width)
    assert paper_area(curve, low, low + width) == pytest.approx(float(summed), abs=2e-3)


@given(POINTS, QUALITIES)
def test_the_least_cost_is_on_the_joined_points_and_nothing_cheaper_is(
    points: Sequence[tuple[float, float]], quality: float
) -> None:
    curve = a_curve(*points)
    steps = np.linspace(0, len(points) - 1, (len(points) - 1) * 20 + 1)
    costs, qualities = (np.interp(steps, np.arange(len(points)), line) for line in (curve.costs, curve.qualities))
    reaching = costs[qualities >= quality - 1e-9]
    least = least_cost(curve, quality)
    assert np.isnan(least) == (curve.qualities.max() < quality)
    assert not reaching.size or least <= reaching.min() + 1e-6


@given(POINTS)
def test_area_lies_between_the_worst_and_the_best_quality(points: Sequence[tuple[float, float]]) -> None:
    curve = a_curve(*points)
    assert curve.qualities.min() - 1e-9 <= area(curve, 0.5, 4.0) <= curve.qualities.max() + 1e-9
    assert BUDGETS == 200


NOISE = np.random.default_rng(7).normal(size=400)


def test_the_interval_is_about_two_standard_errors_to_each_side() -> None:
    low, high = bootstrap_interval(NOISE, seed=0, draws=20_000)
    error = NOISE.std() / np.sqrt(NOISE.size)
    assert (low, high) == pytest.approx((NOISE.mean() - 1.96 * error, NOISE.mean() + 1.96 * error), abs=0.005)


def test_a_higher_level_is_wider() -> None:
    low, high = bootstrap_interval(NOISE, seed=0, level=0.99)
    inner_low, inner_high = bootstrap_interval(NOISE, seed=0, level=0.5)
    assert low < inner_low < inner_high < high


def test_the_same_seed_gives_the_same_interval() -> None:
    assert bootstrap_interval(NOISE[:20], seed=3) == bootstrap_interval(NOISE[:20], seed=3)
    assert bootstrap_interval(NOISE[:20], seed=3) != bootstrap_interval(NOISE[:20], seed=4)


def test_undefined_trials_are_left_out_and_with_none_left_the_interval_is_undefined() -> None:
    holes = np.array([1.0, np.nan, 3.0, np.nan])
    assert bootstrap_interval(holes, seed=0) == bootstrap_interval(np.array([1.0, 3.0]), seed=0) == (1.0, 3.0)
    assert np.isnan(bootstrap_interval(np.full(3, np.nan), seed=0)).all()
    assert np.isnan(bootstrap_interval(np.empty(0), seed=0)).all()


def test_a_paired_difference_cancels_what_is_common_to_both() -> None:
    """Trials differ by 100, methods by 1 in every one of them."""
    trials = np.arange(0.0, 1000.0, 100.0)
    difference = paired_difference(trials + 1.0, trials, seed=0)
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_a_trial_without_both_values_is_left_out() -> None:
    difference = paired_difference(np.array([2.0, np.nan, 9.0]), np.array([1.0, 1.0, np.nan]), seed=0)
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)
    nothing = paired_difference(np.array([np.nan]), np.array([1.0]), seed=0)
    assert np.isnan([nothing.mean, nothing.low, nothing.high]).all()


def test_pairing_needs_the_same_trials() -> None:
    with pytest.raises(ValueError, match="the same trials"):
        paired_difference(np.ones(3), np.ones(1), seed=0)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_the_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(np.array(values), seed=seed, draws=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
