"""The classic recipe's numbers, and the two others beside them."""

import numpy as np
import pytest

from router_core.recipes import LAPLACE, RAW, SHRUNK

ERRORS = np.array([80.0, 220.0, 60.0, 0.0])
LABELS = np.array([400.0, 400.0, 400.0, 0.0])


def test_raw_rates_are_errors_over_labels_and_one_half_where_nothing_was_asked() -> None:
    assert RAW.error_rates(ERRORS, LABELS).tolist() == [0.20, 0.55, 0.15, 0.5]


def test_laplace_adds_one_error_and_one_success() -> None:
    assert LAPLACE.error_rates(ERRORS, LABELS).tolist() == [81 / 402, 221 / 402, 61 / 402, 0.5]


def test_shrunk_rates_lean_on_the_models_own_mean() -> None:
    mean = 360.5 / 1201
    expected = [(80 + 0.5 * mean) / 400.5, (220 + 0.5 * mean) / 400.5, (60 + 0.5 * mean) / 400.5, mean]
    assert SHRUNK.error_rates(ERRORS, LABELS) == pytest.approx(expected)


def test_without_any_label_every_recipe_says_one_half() -> None:
    nothing = np.zeros(3)
    for recipe in (RAW, LAPLACE, SHRUNK):
        assert recipe.error_rates(nothing, nothing).tolist() == [0.5, 0.5, 0.5]
