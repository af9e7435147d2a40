"""The classic recipe's numbers, and the others beside them. The pooled recipe has a file of its own."""

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.estimators import ESTIMATORS, LAPLACE, POOLED, RAW, SHRUNK
from tests.router_core.makers import a_map

ERRORS = np.array([[80.0, 220.0, 60.0, 0.0]])
LABELS = np.array([[400.0, 400.0, 400.0, 0.0]])


def test_raw_rates_are_errors_over_labels_and_one_half_where_nothing_was_asked() -> None:
    assert RAW.rates(ERRORS, LABELS, a_map()).tolist() == [[0.20, 0.55, 0.15, 0.5]]


def test_laplace_adds_one_error_and_one_success() -> None:
    assert LAPLACE.rates(ERRORS, LABELS, a_map()).tolist() == [[81 / 402, 221 / 402, 61 / 402, 0.5]]


def test_shrunk_rates_are_shrunk_to_the_models_mean() -> None:
    mean = 360.5 / 1201
    expected = [(80 + 0.5 * mean) / 400.5, (220 + 0.5 * mean) / 400.5, (60 + 0.5 * mean) / 400.5, mean]
    assert SHRUNK.rates(ERRORS, LABELS, a_map())[0] == pytest.approx(expected)


def test_without_labels_every_estimator_gives_one_half() -> None:
    nothing = np.zeros((1, 3))
    for recipe in ESTIMATORS.values():
        assert recipe.rates(nothing, nothing, a_map())[0] == pytest.approx([0.5, 0.5, 0.5])


def test_a_map_of_very_many_clusters_gets_the_shrunk_estimator() -> None:
    large = ClusterMap(np.eye(300, dtype=np.float32), embedder_id="e", top=1)
    sums, labels = np.zeros((2, 300)), np.ones((2, 300))
    assert np.array_equal(POOLED.rates(sums, labels, large), SHRUNK.rates(sums, labels, large))
