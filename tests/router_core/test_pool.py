from dataclasses import replace

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.eligibility import eligible
from router_core.estimators import SHRUNK, Efforts, Estimator
from router_core.pool import CachedEstimator
from router_core.profiles import Profile
from router_core.scoring import ScoringParams, rank
from router_core.types import Doubles, Requirements
from tests.router_core.makers import a_candidate, a_map, a_pool, a_profile, an_assignment


def measured(errors: float, labels: float = 4.0) -> Profile:
    document = {"map": a_map().id, "error_sums": [errors] * 3, "labels": [labels] * 3}
    return Profile.from_json(document)


def test_stated_rates_are_served_as_they_are() -> None:
    rates = CachedEstimator(a_map()).rates([a_profile([0.1, 0.9, 0.3], labels=1.0), None, measured(1.0)])
    assert rates[0].tolist() == [0.1, 0.9, 0.3]
    assert np.isnan(rates[1]).all()
    assert rates[2] == pytest.approx([0.26] * 3, abs=0.05)


def test_rates_are_computed_again_only_if_sums_changed() -> None:
    calls = []

    def counted(error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap, _efforts: Efforts = ()) -> Doubles:
        calls.append(len(error_sums))
        return SHRUNK.rates(error_sums, labels, cluster_map)

    rates = CachedEstimator(a_map(), Estimator("counted", hard=False, rates=counted))
    first = rates.rates([measured(1.0), measured(2.0)])
    assert np.array_equal(rates.rates([measured(1.0), None, measured(2.0)])[[0, 2]], first)
    assert calls == [2]
    rates.rates([measured(1.0), measured(3.0)])
    assert calls == [2, 2]


def test_a_pool_with_other_errors_ranks_by_these() -> None:
    pool = a_pool(a_candidate("a", (0.1, 0.1, 0.1)), a_candidate("b", (0.9, 0.9, 0.9)))
    changed = replace(pool, errors=pool.errors[::-1].copy())
    chosen = [
        rank(eligible(each, Requirements()), an_assignment(0), Requirements(), ScoringParams()).chosen
        for each in (pool, changed)
    ]
    assert chosen == ["a", "b"]
