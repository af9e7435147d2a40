from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from router_core.calibration import (
    LambdaSweep,
    best_within_budget,
    candidate_lambdas,
    cheapest_for_quality,
    quality_interval,
    sweep_lambdas,
)
from router_core.eligibility import eligible
from router_core.errors import InvalidInput, NoEligibleModel
from router_core.pool import Pool
from router_core.scoring import ScoringParams, rank
from router_core.types import Assignment, Capabilities, Price, Requirements
from tests.router_core.makers import a_candidate, a_pool, an_assignment

CENTS = ScoringParams(cost_unit="cents")


def half_and_half() -> LambdaSweep:
    """Build two prompts where the cheap model is nearly as good, two where it is not, at $0.10 or $1.15 per 1,000.

    At a tie of 0.005 the first two go to it from λ = 0.095 ÷ 0.105 = 0.905 on, the others from 0.495 ÷ 0.105 = 4.714.
    """
    pool = a_pool(
        a_candidate("cheap", (0.2, 0.6, 0.5), Price(0.0, 1e-6)),
        a_candidate("dear", (0.1, 0.1, 0.1), Price(0.0, 11.5e-6)),
    )
    return sweep_lambdas(pool, an_assignment(0, 0, 1, 1), np.zeros(4), CENTS)


def by_chance(seed: int, models: int = 4, prompts: int = 300) -> LambdaSweep:
    rng = np.random.default_rng(seed)
    costs = rng.exponential(size=(prompts, models)) * 10.0 ** np.arange(models)
    names = tuple(f"model {number}" for number in range(models))
    return LambdaSweep(names, rng.random((prompts, models)), costs / 100, costs, tie=0.005)


@pytest.mark.parametrize(
    ("lambda_", "quality", "usd_per_1k", "cheap"),
    [(0.9, 0.9, 1.15, 0.0), (0.91, 0.85, 0.625, 0.5), (4.72, 0.6, 0.1, 1.0)],
)
def test_cost_and_quality_of_a_lambda_match_those_computed_by_hand(
    lambda_: float, quality: float, usd_per_1k: float, cheap: float
) -> None:
    point = half_and_half().at(lambda_)
    assert (point.quality, 1e3 * point.usd) == pytest.approx((quality, usd_per_1k))
    assert point.shares == {"cheap": cheap, "dear": 1.0 - cheap}


def test_the_cheapest_for_a_quality_has_the_largest_lambda_that_reaches_it() -> None:
    found = cheapest_for_quality(half_and_half(), 0.94)
    assert (found.lambda_, found.quality) == pytest.approx((4.71, 0.85))
    assert cheapest_for_quality(half_and_half(), 0.96).lambda_ == 0.904
    assert cheapest_for_quality(half_and_half(), 0.0).shares == {"cheap": 1.0, "dear": 0.0}


def test_the_best_within_a_budget_has_the_smallest_lambda_that_keeps_it() -> None:
    found = best_within_budget(half_and_half(), 0.7e-3)
    assert (found.lambda_, 1e3 * found.usd) == pytest.approx((0.905, 0.625))
    assert best_within_budget(half_and_half(), 0.6e-3).lambda_ == 4.72
    assert best_within_budget(half_and_half(), 1.0).lambda_ == 0.0


def test_an_impossible_goal_is_refused_with_what_is_possible() -> None:
    with pytest.raises(
        InvalidInput, match=r"reach 1\.2 of the best single model's quality; the most within reach is 1$"
    ):
        cheapest_for_quality(half_and_half(), 1.2)
    with pytest.raises(InvalidInput, match=r"as \$0\.05 per 1,000 requests; the least possible is \$0\.1$"):
        best_within_budget(half_and_half(), 0.05e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_lambda_keeps_its_promise_as_it_is_written(seed: int) -> None:
    expected = by_chance(seed)
    reaching, within = cheapest_for_quality(expected, 1.2), best_within_budget(expected, 0.05)
    assert [expected.at(float(f"{found.lambda_:.3g}")) for found in (reaching, within)] == [reaching, within]
    assert reaching.quality >= 1.2 * expected.best_single().quality
    assert within.usd <= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_no_lambda_a_little_further_meets_the_goal(seed: int) -> None:
    expected = by_chance(seed)
    further = expected.at(1.05 * cheapest_for_quality(expected, 1.2).lambda_)
    assert further.quality < 1.2 * expected.best_single().quality
    assert expected.at(0.95 * best_within_budget(expected, 0.05).lambda_).usd > 0.05


def test_the_last_lambda_sends_every_prompt_to_its_cheapest_model() -> None:
    expected = by_chance(0)
    weights = candidate_lambdas(expected)
    assert expected.at(weights[-1]).usd == pytest.approx(expected.usd.min(axis=1).mean())
    assert (weights[0], weights == sorted(set(weights))) == (0.0, True)


def test_the_highest_quality_that_a_refusal_names_can_be_reached() -> None:
    expected = by_chance(1)
    with pytest.raises(InvalidInput) as refused:
        cheapest_for_quality(expected, 9.0)
    assert (
        cheapest_for_quality(expected, float(str(refused.value).split()[-1])).quality > expected.best_single().quality
    )


def test_of_equally_good_models_the_cheaper_is_the_best_single_one() -> None:
    pool = a_pool(a_candidate("a", (0.5,) * 3, Price(0.0, 2e-6)), a_candidate("b", (0.5,) * 3, Price(0.0, 1e-6)))
    assert sweep_lambdas(pool, an_assignment(0, 1), np.zeros(2)).best_single().model == "b"


def test_models_of_one_price_have_only_one_lambda() -> None:
    pool = a_pool(a_candidate("a", (0.5,) * 3), a_candidate("b", (0.1,) * 3))
    expected = sweep_lambdas(pool, an_assignment(0, 1), np.zeros(2))
    assert candidate_lambdas(expected) == [0.0]
    assert cheapest_for_quality(expected, 1.0).shares == {"b": 1.0, "a": 0.0}


@pytest.mark.parametrize(
    "terms",
    [
        CENTS,
        ScoringParams(),
        ScoringParams(reference=Price(1e-6, 2e-6)),
        ScoringParams(latency_weight=1e-4),
        ScoringParams(CENTS.lambda_, 1e-4, None, "cents"),
    ],
)
def test_prompts_are_routed_at_once_as_one_by_one(terms: ScoringParams) -> None:
    pool = a_pool(
        a_candidate("cheap", (0.2, 0.6, 0.5), Price(1e-7, 1e-6), tokens=300.0),
        a_candidate("dear", (0.1, 0.1, 0.3), Price(1e-5, 3e-5), seconds=4.0),
        a_candidate("terse", (0.3, 0.2, 0.1), Price(2e-6, 2e-5), capabilities=Capabilities(max_output_tokens=20)),
        a_candidate("unpriced", (0.0, 0.0, 0.0), None, tokens=900.0),
        a_candidate("unmeasured", None, Price(0.0, 1e-9)),
    )
    assignment = Assignment(
        np.array([[0, 1], [1, 2], [2, 0]]), np.array([[0.7, 0.3], [0.9, 0.1], [0.5, 0.5]], np.float32)
    )
    tokens = (10, 200, 3000)
    expected = sweep_lambdas(pool, assignment, np.array(tokens, dtype=np.float64), terms)
    for lambda_ in (0.0, 0.1, 0.5, 3.0):
        decisions = [
            rank(
                eligible(pool, needs := Requirements(prompt_tokens=count)),
                Assignment(assignment.ids[[row]], assignment.weights[[row]]),
                needs,
                ScoringParams(lambda_, terms.latency_weight, None, terms.cost_unit, terms.reference),
            )
            for row, count in enumerate(tokens)
        ]
        point = expected.at(lambda_)
        chosen = Counter(decision.chosen for decision in decisions)
        assert dict(point.shares) == pytest.approx({name: chosen[name] / 3 for name in ("cheap", "dear", "terse")})
        usd = [decision.table.costs_usd[decision.choice] for decision in decisions]
        assert point.usd == pytest.approx(np.mean(usd))


def test_a_sweep_needs_a_prompt_and_a_routable_model() -> None:
    with pytest.raises(InvalidInput, match="no prompt"):
        sweep_lambdas(a_pool(a_candidate()), an_assignment(), np.zeros(0))
    with pytest.raises(NoEligibleModel, match="both a profile and a price"):
        sweep_lambdas(a_pool(a_candidate(price=None)), an_assignment(0), np.zeros(1))


PROMPTS = an_assignment(0, 0)


def two_models(cheap: float, expensive: float) -> Pool:
    """Build two models with a label weight of 100.5 behind each rate, the shrinkage included."""
    return a_pool(
        a_candidate("cheap", (cheap,) * 3, Price(0.0, 1e-6)), a_candidate("dear", (expensive,) * 3, Price(0.0, 1e-5))
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
