from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.clustering import ClusterMap
from router_core.eligibility import eligible
from router_core.estimators import SHRINKAGE
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.scoring import ScoringParams, rank
from router_core.types import Assignment, Capabilities, Price, Requirements
from tests.support.compiled_kernels import BOTH, kernels_named, using

CLUSTERS = 5
MAP = ClusterMap(np.eye(CLUSTERS, dtype=np.float32), embedder_id="axes", top=3)
SHARES = st.floats(0, 1, allow_subnormal=False)
PRICES = st.floats(1e-8, 1e-4)


@st.composite
def candidates(draw: st.DrawFn, name: str = "model") -> Candidate:
    rows = draw(st.lists(st.tuples(SHARES, st.floats(0.5, 50)), min_size=CLUSTERS, max_size=CLUSTERS))
    labels = np.array([weight for _, weight in rows])
    document: dict[str, Any] = {"map": MAP.id, "errors": [rate for rate, _ in rows], "labels": labels.tolist()}
    document |= {"token_sums": (labels * draw(st.floats(1, 900))).tolist(), "mean_seconds": draw(st.floats(0, 60))}
    window = draw(st.none() | st.integers(1, 3000))
    output = draw(st.none() | st.integers(1, 3000))
    price = Price(draw(PRICES), draw(PRICES), draw(st.none() | PRICES))
    profile = Profile.from_json(document) if draw(st.integers(0, 5)) else None
    able = Capabilities(window, output, tools=draw(st.none() | st.booleans()))
    return Candidate(name, profile, price if draw(st.integers(0, 5)) else None, able)


POOLS = st.lists(candidates(), min_size=1, max_size=7).map(
    lambda found: [Candidate(f"m{at}", one.profile, one.price, one.capabilities) for at, one in enumerate(found)]
)
NEEDS = st.builds(
    Requirements,
    prompt_tokens=st.integers(0, 2000),
    max_output_tokens=st.none() | st.integers(1, 2000),
    answers=st.integers(1, 3),
    max_input_cost_per_token=st.none() | PRICES,
    max_output_cost_per_token=st.none() | PRICES,
    tools=st.booleans(),
)
PLACED = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).flatmap(
    lambda raw: st.permutations(range(CLUSTERS)).map(
        lambda order: Assignment(
            np.array([order[:3]]), (np.array([raw]) / np.sum(raw)).astype(np.float32, casting="unsafe")
        )
    )
)
TERMS = st.builds(
    ScoringParams, lambda_=st.floats(0, 5), latency_weight=st.sampled_from([0.0, 1e-4]), tie=st.just(0.005)
)


def by_hand(pool: Pool, placed: Assignment, needs: Requirements, terms: ScoringParams) -> dict[str, tuple[float, ...]]:
    """Map each model with a profile and a price to error, cost, score, labels, USD and tokens."""
    weights, ids = placed.weights[0].astype(float).tolist(), placed.ids[0].tolist()
    tokens = {}
    for name, candidate in pool.candidates.items():
        row = pool.index[name]
        expected = sum(weight * float(pool.output_tokens[row, at]) for weight, at in zip(weights, ids, strict=True))
        limits = [candidate.capabilities.max_output_tokens, needs.max_output_tokens]
        tokens[name] = needs.answers * min(expected, *(limit for limit in (*limits, 1e18) if limit is not None))
    profiled = [tokens[name] for name, candidate in pool.candidates.items() if candidate.profile]
    mean = sum(profiled) / len(profiled) if profiled else 0.0
    unit = max(needs.prompt_tokens, 1) * 2.5e-6 + mean * 1e-5
    found: dict[str, tuple[float, ...]] = {}
    for name, candidate in pool.candidates.items():
        if candidate.profile is None or candidate.price is None:
            continue
        row, price, profile = pool.index[name], candidate.price, candidate.profile
        error = sum(weight * float(pool.errors[row, at]) for weight, at in zip(weights, ids, strict=True))
        usd = needs.prompt_tokens * price.input_cost_per_token + tokens[name] * price.output_cost_per_token
        seconds = sum(weight * float(profile.seconds()[at]) for weight, at in zip(weights, ids, strict=True))
        cost = (usd + terms.latency_weight * seconds) / unit
        behind = sum(w**2 / (float(profile.labels[at]) + SHRINKAGE) for w, at in zip(weights, ids, strict=True))
        found[name] = (error, cost, error + terms.lambda_ * cost, 1 / behind, usd, tokens[name])
    return found


@pytest.mark.parametrize("name", BOTH)
@given(models=POOLS, needs=NEEDS, placed=PLACED, terms=TERMS)
@settings(max_examples=200, deadline=None)
def test_every_score_is_the_formula(
    name: str, models: list[Candidate], needs: Requirements, placed: Assignment, terms: ScoringParams
) -> None:
    with using(kernels_named(name)):
        pool = Pool.build(models, MAP)
    left = eligible(pool, needs)
    if not len(left.names):
        return
    decision, expected = rank(left, placed, needs, terms), by_hand(pool, placed, needs, terms)
    table, details = decision.table, decision.table.details
    columns = (table.errors, table.costs, table.scores, details.labels, table.costs_usd, details.output_tokens)
    for at, name in enumerate(table.names):
        np.testing.assert_allclose([column[at] for column in columns], expected[name], rtol=1e-9, atol=1e-12)
    order = sorted(range(len(table.names)), key=lambda at: (table.scores[at], table.costs[at], at))
    near = [at for at in range(len(order)) if table.scores[at] <= table.scores.min() + terms.tie]
    chosen = min(near, key=lambda at: (table.costs[at], at))

    assert decision.choice == chosen
    assert decision.ranking == tuple(table.names[at] for at in (chosen, *(at for at in order if at != chosen)))
    assert (decision.ranking[0], len(decision.ranking)) == (decision.chosen, len(order))


@pytest.mark.parametrize("name", BOTH)
@given(model=candidates(), count=st.integers(2, 40), needs=NEEDS, placed=PLACED, terms=TERMS)
@settings(max_examples=60, deadline=None)
def test_equal_models_have_equal_scores_in_any_place(
    name: str, model: Candidate, count: int, needs: Requirements, placed: Assignment, terms: ScoringParams
) -> None:
    with using(kernels_named(name)):
        pool = Pool.build([Candidate(f"m{at:02}", model.profile, model.price) for at in range(count)], MAP)
    left = eligible(pool, needs)
    if not len(left.names):
        return
    decision = rank(left, placed, needs, terms)

    assert len(set(decision.scores.values())) == 1
    assert decision.ranking == pool.names


@given(POOLS, NEEDS, st.booleans(), st.sets(st.sampled_from(["m0", "m1", "m2"])) | st.none())
@settings(max_examples=300, deadline=None)
def test_eligible_models_passed_every_filter(
    models: list[Candidate], needs: Requirements, in_cooldown: bool, allowed: set[str] | None
) -> None:
    pool = Pool.build(models, MAP)
    left = eligible(pool, needs, allowed, cooling_down=["m1"] if in_cooldown else ())
    passed = np.logical_and.reduce(
        [np.ones(len(pool), dtype=bool), *(check.passed for check in left.compute_filters())]
    )

    assert left.rows.tolist() == np.flatnonzero(passed).tolist()
    assert set(left.names) | set(left.reasons) == set(pool.names)
    assert set(left.names).isdisjoint(left.reasons)
