"""How far an expectation may be off."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.calibration import quality_interval, sweep_lambdas
from router_core.pool import Pool
from router_core.types import Price
from tests.router_core.makers import a_candidate, a_pool, an_assignment

PROMPTS = an_assignment(0, 0)


def two_models(cheap: float, dear: float) -> Pool:
    """A label weight of 100.5 behind each rate, the shrinkage included."""
    return a_pool(
        a_candidate("cheap", (cheap,) * 3, Price(0.0, 1e-6)), a_candidate("dear", (dear,) * 3, Price(0.0, 1e-5))
    )


def interval(pool: Pool, lambda_: float) -> tuple[float, float] | None:
    expected = sweep_lambdas(pool, PROMPTS, np.zeros(2))
    return quality_interval(expected, expected.at(lambda_), pool, PROMPTS)


def test_the_best_single_model_has_a_certain_relative_quality() -> None:
    assert interval(two_models(0.5, 0.2), 0.0) == pytest.approx((1.0, 1.0))


def test_the_quality_interval_includes_the_doubt_of_both_models() -> None:
    """0.5 ÷ 0.8 of the best; variances 0.25 ÷ 101.5 of the one rate and 0.16 ÷ 101.5 of the other."""
    deviation = np.sqrt(0.25 / 101.5 + 0.625**2 * 0.16 / 101.5) / 0.8
    expected = (0.625 - 1.645 * deviation, 0.625 + 1.645 * deviation)
    assert interval(two_models(0.5, 0.2), 1e3) == pytest.approx(expected)


def test_there_is_no_quality_interval_if_every_model_is_always_wrong() -> None:
    assert interval(two_models(1.0, 1.0), 0.0) is None


def test_more_labels_narrow_the_quality_interval() -> None:
    few, many = (
        a_pool(
            a_candidate("cheap", (0.5,) * 3, Price(0.0, 1e-6)),
            a_candidate("dear", (0.2,) * 3, Price(0.0, 1e-5)),
        )
        for _ in range(2)
    )
    many.label_weights[:] = 1e4
    low, high = interval(few, 1e3) or (0.0, 0.0)
    assert (interval(many, 1e3) or (0.0,))[0] > low
    assert (interval(many, 1e3) or (0.0, 9.0))[1] < high
