"""Intervals over trials: seeded, paired, and silent about trials that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.evaluation.curves import bootstrap_interval, paired_difference

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
