from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from router_core.change_point import MIN_LABELS_AFTER, THRESHOLD, ChangePoint, change_point
from router_core.types import Doubles


def change_in(
    labels: Sequence[float], errors: Sequence[float], expected: Sequence[float] | None = None
) -> ChangePoint | None:
    """Look for a change in hours 100, 101, …"""
    counts, wrong = np.array(labels, dtype=float), np.array(errors, dtype=float)
    return change_point(
        range(100, 100 + len(labels)), counts, wrong, 0.2 * counts if expected is None else np.array(expected)
    )


def test_the_hour_of_a_change_is_found_with_its_direction() -> None:
    worse, better = change_in([20] * 6, [3, 3, 3, 3, 12, 12]), change_in([20] * 6, [12, 12, 12, 3, 3, 3])

    assert worse is not None
    assert (worse.hour, worse.before.labels, worse.after.labels, worse.after.rate) == (104, 80, 40, 0.6)
    assert worse.statistic > THRESHOLD
    assert worse.difference == pytest.approx(0.45)
    assert better is not None
    assert (better.hour, better.is_certain) == (103, True)
    assert better.statistic < -THRESHOLD


def test_the_statistic_is_that_of_the_likelihoods() -> None:
    found = change_in([40, 20], [10, 10])

    def likelihood(wrong: float, of: float) -> float:
        return float(wrong * np.log(wrong / of) + (of - wrong) * np.log((of - wrong) / of))

    assert found is not None
    gain = likelihood(10, 40) + likelihood(10, 20) - likelihood(20, 60)
    assert found.statistic == pytest.approx(np.sqrt(2 * gain))


def test_harder_prompts_are_no_change_of_the_model() -> None:
    errors = [2, 2, 2, 10, 10, 10]
    as_expected = change_in([20] * 6, errors, expected=[2, 2, 2, 10, 10, 10])

    assert as_expected is not None
    assert as_expected.statistic == pytest.approx(0, abs=1e-6)
    unexpected = change_in([20] * 6, errors)
    assert unexpected is not None
    assert unexpected.is_certain


def test_a_small_change_is_not_told_however_certain_it_is() -> None:
    found = change_in([50_000, 50_000], [10_000, 11_000])

    assert found is not None
    assert found.statistic > THRESHOLD
    assert not found.is_certain


@pytest.mark.parametrize("labels", [[], [100], [29, 100], [100, MIN_LABELS_AFTER - 1]])
def test_few_labels_on_a_side_tell_nothing(labels: list[float]) -> None:
    assert change_in(labels, labels) is None


def test_hours_without_an_error_and_hours_of_errors_alone_are_finite() -> None:
    found = change_in([30, 30], [0, 30])

    assert found is not None
    assert np.isfinite(found.statistic)
    assert found.is_certain


def quiet(rng: np.random.Generator, hours: int, rate: float) -> tuple[Doubles, Doubles]:
    counts = rng.poisson(12, hours)
    return counts.astype(float), rng.binomial(counts, rate).astype(float)


def test_quiet_weeks_are_hardly_ever_taken_for_a_change() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(20):
        counts, errors = quiet(rng, 14 * 24, 0.2)
        for now in range(24, 14 * 24, 6):
            found = change_point(range(now), counts[:now], errors[:now], 0.3 * counts[:now])
            alarms += found is not None and found.is_certain
    assert alarms <= 2
