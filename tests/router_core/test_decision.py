"""What a decision tells about itself."""

import numpy as np
import pytest

from router_core.decision import wilson_interval
from router_core.eligibility import eligible
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
