from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.eligibility import eligible
from router_core.errors import NoEligibleModel
from router_core.scoring import ScoringParams, rank, rank_by_cost, rank_by_mean
from router_core.types import FREE, Assignment, Price, Requirements
from tests.router_core.makers import a_candidate, a_pool, an_assignment, priced_pool

NO_NEEDS = Requirements(prompt_tokens=0)


def test_the_choice_is_the_smallest_error_plus_lambda_times_cost() -> None:
    """100 tokens at $10 per million cost exactly the reference price: c = 1."""
    left = eligible(priced_pool({"dear": (0.1, 10.0), "cheap": (0.3, 0.0)}), NO_NEEDS)
    chosen, score, scores = rank(left, an_assignment(0), NO_NEEDS, ScoringParams(lambda_=0.1))
    assert chosen == "dear"
    assert score == pytest.approx(0.2, abs=1e-3)
    assert scores == pytest.approx({"dear": 0.2, "cheap": 0.3}, abs=1e-3)
    assert rank(left, an_assignment(0), NO_NEEDS, ScoringParams(lambda_=0.21)).chosen == "cheap"


def test_each_prompt_is_scored_by_its_own_clusters() -> None:
    left = eligible(a_pool(a_candidate("maths", (0.0, 1.0, 1.0)), a_candidate("code", (1.0, 0.0, 1.0))), NO_NEEDS)
    assert rank(left, an_assignment(0), NO_NEEDS, ScoringParams()).chosen == "maths"
    assert rank(left, an_assignment(1), NO_NEEDS, ScoringParams()).chosen == "code"
    between = Assignment(np.array([[0, 1]]), np.array([[0.4, 0.6]], dtype=np.float32))
    assert rank(left, between, NO_NEEDS, ScoringParams()).scores == pytest.approx({"maths": 0.6, "code": 0.4}, abs=1e-6)


def test_among_near_equals_the_cheapest_is_chosen_then_the_first_by_name() -> None:
    pool = priced_pool({"best": (0.100, 5.0), "near": (0.104, 1.0), "alike": (0.104, 1.0), "far": (0.106, 0.0)})
    decision = rank(eligible(pool, NO_NEEDS), an_assignment(0), NO_NEEDS, ScoringParams(lambda_=0.0))
    assert decision.chosen == "alike"


def test_one_lambda_means_the_same_for_short_and_long_prompts() -> None:
    """Costs are relative to the reference price of the same tokens."""
    pool = a_pool(a_candidate("half", price=Price(1.25e-6, 5e-6)))
    costs = []
    for tokens in (10, 50_000):
        needs = Requirements(prompt_tokens=tokens)
        costs.append(rank(eligible(pool, needs), an_assignment(0), needs, ScoringParams()).candidates[0].cost)
    assert costs == pytest.approx([0.5, 0.5])


def test_in_cents_the_cost_is_the_price() -> None:
    needs = Requirements(prompt_tokens=10_000)
    left = eligible(a_pool(a_candidate("model", price=Price(2e-6, 0.0))), needs)
    candidate = rank(left, an_assignment(0), needs, ScoringParams(cost_unit="cents")).candidates[0]
    assert candidate.expected_cost_usd == pytest.approx(0.02)
    assert candidate.cost == pytest.approx(2.0)


def test_the_requests_own_limit_caps_what_an_answer_can_cost_and_n_multiplies_it() -> None:
    pool = a_pool(a_candidate("model", price=Price(0.0, 1e-6), tokens=100))

    def usd(needs: Requirements) -> float:
        return rank(eligible(pool, needs), an_assignment(0), needs, ScoringParams()).candidates[0].expected_cost_usd

    assert usd(Requirements()) == pytest.approx(1e-4)
    assert usd(Requirements(max_output_tokens=10)) == pytest.approx(1e-5)
    assert usd(Requirements(max_output_tokens=10, answers=3)) == pytest.approx(3e-5)


def test_latency_weight_prices_a_second_of_waiting() -> None:
    pool = a_pool(a_candidate("slow", (0.1,) * 3, seconds=9.0), a_candidate("fast", (0.2,) * 3, seconds=1.0))
    left = eligible(pool, NO_NEEDS)
    assert rank(left, an_assignment(0), NO_NEEDS, ScoringParams()).chosen == "slow"
    assert rank(left, an_assignment(0), NO_NEEDS, ScoringParams(latency_weight=1e-3)).chosen == "fast"


def test_a_model_of_unmeasured_length_takes_the_mean_of_the_others() -> None:
    price = Price(0.0, 1e-6)
    pool = a_pool(a_candidate("known", price=price, tokens=40), a_candidate("unknown", price=price, tokens=None))
    usd = {
        c.model: c.expected_cost_usd
        for c in rank(eligible(pool, Requirements()), an_assignment(0), Requirements(), ScoringParams()).candidates
    }
    assert usd["unknown"] == pytest.approx(usd["known"])


def test_max_cost_usd_rules_out_by_expected_cost_with_a_reason() -> None:
    left = eligible(priced_pool({"dear": (0.1, 1000.0), "cheap": (0.9, 1.0)}), NO_NEEDS)
    decision = rank(left, an_assignment(0), NO_NEEDS, ScoringParams(lambda_=0.0, max_cost_usd=0.001))
    assert decision.chosen == "cheap"
    assert "max_cost_usd=0.001" in decision.ineligible["dear"]
    with pytest.raises(NoEligibleModel, match="cheapest"):
        rank(left, an_assignment(0), NO_NEEDS, ScoringParams(max_cost_usd=1e-9))


CACHING = Price(1e-5, 0.0, cache_read_input_token_cost=1e-6)


def test_cached_tokens_have_the_cached_price_for_their_model_only() -> None:
    needs = Requirements(prompt_tokens=1000)
    left = eligible(a_pool(a_candidate("warm", price=CACHING), a_candidate("cold", price=CACHING)), needs)

    def usd(terms: ScoringParams) -> dict[str, float]:
        return {row.model: row.expected_cost_usd for row in rank(left, an_assignment(0), needs, terms).candidates}

    assert usd(ScoringParams(cached=("warm", 800))) == pytest.approx({"warm": 0.0028, "cold": 0.01})
    assert usd(ScoringParams(cached=("warm", 5000))) == pytest.approx({"warm": 0.001, "cold": 0.01})
    assert (
        usd(ScoringParams(cached=("nobody", 800)))
        == usd(ScoringParams())
        == pytest.approx({"warm": 0.01, "cold": 0.01})
    )


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e-4), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(0, 20_000),
    st.floats(0, 5),
)
def test_thresholds_of_a_half_cached_prompt_make_the_model_the_choice(
    models: list[tuple[float, float, float]], cached: int, lambda_: float
) -> None:
    """A model's prices: input, and the share of it that a cached token costs."""
    needs = Requirements(prompt_tokens=10_000)
    candidates = [
        a_candidate(str(place), (error,) * 3, Price(price, price, price * share))
        for place, (error, price, share) in enumerate(models)
    ]
    terms = ScoringParams(lambda_=lambda_, cached=("0", cached))
    left = eligible(a_pool(*candidates), needs)
    for row in rank(left, an_assignment(0), needs, terms).candidates:
        if row.flips_at_lambda is not None:
            flipped = replace(terms, lambda_=row.flips_at_lambda)
            assert rank(left, an_assignment(0), needs, flipped).chosen == row.model


def test_a_doubt_of_a_model_is_added_to_its_errors_and_to_those_of_worse_ones() -> None:
    """By hand: half of the 80 % that "b" gets right are 0.4."""
    left = eligible(priced_pool({"a": (0.1, 0.0), "b": (0.2, 0.0), "c": (0.3, 0.0), "d": (0.7, 0.0)}), NO_NEEDS)
    decision = rank(left, an_assignment(0), NO_NEEDS, ScoringParams(doubts=(("b", 0.5), ("nobody", 0.9))))
    found = {row.model: (row.expected_error, row.added) for row in decision.candidates}
    assert found == {
        "a": (pytest.approx(0.1), 0),
        "b": (pytest.approx(0.6), pytest.approx(0.4)),
        "c": (pytest.approx(0.7), pytest.approx(0.4)),
        "d": (1, pytest.approx(0.3)),
    }


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6),
    st.floats(0, 5),
)
def test_a_doubt_never_makes_a_worse_model_the_better_one(models: list[tuple[float, float]], lambda_: float) -> None:
    errors = {str(place): error for place, (error, _) in enumerate(models)}
    doubts = tuple((str(place), doubt) for place, (_, doubt) in enumerate(models))
    left = eligible(a_pool(*(a_candidate(name, (error,) * 3) for name, error in errors.items())), NO_NEEDS)
    without, found = (
        {row.model: row for row in rank(left, an_assignment(0), NO_NEEDS, terms).candidates}
        for terms in (ScoringParams(lambda_=lambda_), ScoringParams(lambda_=lambda_, doubts=doubts))
    )

    assert all(without[name].expected_error <= row.expected_error <= 1 for name, row in found.items())
    assert all(row.error_low <= row.expected_error <= row.error_high for row in found.values())
    assert all(
        found[one].expected_error <= found[other].expected_error + 1e-9
        for one in found
        for other in found
        if without[one].expected_error < without[other].expected_error
    )


def test_no_eligible_model_is_an_error_with_every_reason() -> None:
    left = eligible(a_pool(a_candidate("a", price=None), a_candidate("b", errors=None)), NO_NEEDS)
    with pytest.raises(NoEligibleModel) as caught:
        rank(left, an_assignment(0), NO_NEEDS, ScoringParams())
    assert set(caught.value.reasons) == {"a", "b"}


def test_ranking_by_mean_ignores_cost() -> None:
    left = eligible(priced_pool({"dear": (0.1, 100.0), "cheap": (0.3, 0.0)}), NO_NEEDS)
    decision = rank_by_mean(left, NO_NEEDS, ScoringParams(lambda_=10.0))
    assert (decision.chosen, decision.clusters) == ("dear", ())


def test_ranking_by_cost_ignores_errors() -> None:
    left = eligible(priced_pool({"dear": (0.0, 100.0), "cheap": (1.0, 1.0)}), NO_NEEDS)
    decision = rank_by_cost(left, an_assignment(0), NO_NEEDS, ScoringParams())
    assert decision.ranking == ("cheap", "dear")


def test_free_models_are_compared_by_errors() -> None:
    left = eligible(a_pool(a_candidate("good", (0.1,) * 3, FREE), a_candidate("bad", (0.4,) * 3, FREE)), NO_NEEDS)
    assert rank(left, an_assignment(0), NO_NEEDS, ScoringParams(lambda_=100.0)).ranking == ("good", "bad")


def test_a_long_prompt_is_expected_at_the_price_of_its_tier() -> None:
    """$2 against $3 per million tokens, but above 200,000 of them $4."""
    tiered = Price.from_fields(
        {"input_cost_per_token": 2e-6, "output_cost_per_token": 0.0, "input_cost_per_token_above_200k_tokens": 4e-6}
    )
    pool = a_pool(a_candidate("tiered", price=tiered), a_candidate("flat", price=Price(3e-6, 0.0)))
    for tokens, cheapest, usd in ((200_000, "tiered", 0.4), (200_001, "flat", 0.600003)):
        needs = Requirements(prompt_tokens=tokens)
        decision = rank(eligible(pool, needs), an_assignment(0), needs, ScoringParams())
        assert decision.chosen == cheapest
        assert decision.candidates[0].expected_cost_usd == pytest.approx(usd)


def test_a_price_limit_is_compared_with_the_tier_of_the_prompt() -> None:
    tiered = Price.from_fields(
        {"input_cost_per_token": 2e-6, "output_cost_per_token": 0.0, "input_cost_per_token_above_200k_tokens": 4e-6}
    )
    pool = a_pool(a_candidate("tiered", price=tiered))
    left = [
        list(eligible(pool, Requirements(prompt_tokens=tokens, max_input_cost_per_token=3e-6)).names)
        for tokens in (200_000, 200_001)
    ]
    assert left == [["tiered"], []]
