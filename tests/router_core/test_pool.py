from dataclasses import replace

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.decision import ScoredCandidate
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


def of_tools(errors: float, tool_errors: float, labels: float = 8.0) -> Profile:
    """Make a profile whose prompts with tools, one in eight, went wrong so often."""
    sums, counts = [errors * labels] * 3, [labels] * 3
    tools = {"tool_error_sums": [tool_errors] * 3, "tool_labels": [1.0] * 3}
    return Profile.from_json({"map": a_map().id, "error_sums": sums, "labels": counts, **tools})


def chosen_for(requirements: Requirements, profiles: dict[str, Profile], latency_weight: float = 0.0) -> str:
    pool = a_pool(*(replace(a_candidate(name, (0.0,) * 3), profile=profile) for name, profile in profiles.items()))
    params = ScoringParams(lambda_=0.0, latency_weight=latency_weight)
    return rank(eligible(pool, requirements), an_assignment(0), requirements, params).chosen


def test_a_model_that_calls_tools_badly_is_avoided_by_requests_with_tools_alone() -> None:
    profiles = {"chats": of_tools(0.2, 1.0), "calls": of_tools(0.3, 0.0)}
    assert chosen_for(Requirements(), profiles) == "chats"
    assert chosen_for(Requirements(tools=True), profiles) == "calls"


def test_a_latency_weight_and_tools_count_together() -> None:
    profiles = {"chats": of_tools(0.2, 1.0), "calls": of_tools(0.3, 0.0)}
    assert chosen_for(Requirements(tools=True), profiles, latency_weight=1.0) == "calls"


def test_profiles_without_labels_of_tools_are_scored_alike_with_tools_and_without() -> None:
    pool = a_pool(a_candidate("a", (0.1, 0.1, 0.1)), a_candidate("b", (0.9, 0.9, 0.9)))
    scorers = [pool.plan.scorer(10, weighs_seconds=False, with_tools=tools) for tools in (False, True)]
    assert scorers[0] is scorers[1]


def test_a_model_without_labels_of_tools_takes_what_the_others_have_in_common() -> None:
    pool = a_pool(
        *(replace(a_candidate(name, (0.0,) * 3), profile=of_tools(0.2, 0.9)) for name in ("a", "b")),
        replace(a_candidate("c", (0.0,) * 3), profile=measured(1.0, 8.0)),
    )
    excess = dict(zip(pool.names, pool.tool_excess.tolist(), strict=True))
    assert excess["a"] == excess["b"] == pytest.approx(excess["c"], abs=0.05)
    assert excess["c"] > 0.1


def test_a_pool_with_other_errors_ranks_by_these() -> None:
    pool = a_pool(a_candidate("a", (0.1, 0.1, 0.1)), a_candidate("b", (0.9, 0.9, 0.9)))
    changed = replace(pool, errors=pool.errors[::-1].copy())
    chosen = [
        rank(eligible(each, Requirements()), an_assignment(0), Requirements(), ScoringParams()).chosen
        for each in (pool, changed)
    ]
    assert chosen == ["a", "b"]


def test_a_decision_shows_what_tools_add_to_each_expected_error() -> None:
    profiles = {"chats": of_tools(0.2, 1.0), "calls": of_tools(0.3, 0.0)}
    pool = a_pool(*(replace(a_candidate(name, (0.0,) * 3), profile=profile) for name, profile in profiles.items()))

    def shown_for(needs: Requirements) -> dict[str, ScoredCandidate]:
        decision = rank(eligible(pool, needs), an_assignment(0), needs, ScoringParams())
        return {row.model: row for row in decision.candidates}

    shown = {tools: shown_for(Requirements(tools=tools)) for tools in (True, False)}
    assert {row.by_tools for row in shown[False].values()} == {0.0}
    assert shown[True]["chats"].by_tools > 0 > shown[True]["calls"].by_tools
    for name, row in shown[True].items():
        assert row.expected_error - row.by_tools == pytest.approx(shown[False][name].expected_error)
