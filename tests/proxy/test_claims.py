"""What is set aside for a request: the most that it may cost, and the tokens that it may take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxy.errors import NothingAble
from proxy.limits.claims import MARGIN_S, MOST_PICOUSD, claim_of, no_dearer, within_claim
from proxy.routing.choosing import Choice
from proxy.settings import Settings
from proxy.state.key_limits import KeyLimits
from proxy.state.records import StoredProfile
from proxy.state.snapshot import RoutingState, build_state
from proxy.state.stored import Stored
from router_core.types import Needs
from tests.support.makers import a_profile, a_record, surroundings

MONEY = KeyLimits(usd_per_day=5.0)
SETTINGS = Settings(request_timeout_s=100)
MICRO = 10**6
"""Picodollars in a millionth of a dollar."""


def a_choice(*order: str, prompt: int = 1000, most: int | None = None, answers: int = 1) -> Choice:
    needs = Needs(prompt_tokens=prompt, max_output_tokens=most, answers=answers)
    return Choice("dec-1", order[0], "scored", 0.1, order, None, {}, attempts=len(order), needs=needs)


@pytest.fixture(scope="module")
def state() -> RoutingState:
    """cheap: $1 and $4 per million tokens; dear: ten times that; short: as cheap, at most 500 tokens; unpriced."""
    infos: dict[str, dict[str, Any]] = {
        "cheap": {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6},
        "dear": {"input_cost_per_token": 1e-5, "output_cost_per_token": 4e-5},
        "short": {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6, "max_output_tokens": 500},
        "unpriced": {},
    }
    records = {name: a_record(name, info=info) for name, info in infos.items()}
    profiles = {name: StoredProfile(records[name].fingerprint, a_profile()) for name in ("cheap", "dear")}
    return build_state(Stored(1, records, profiles, keys_exist=False), surroundings(), keys_latched=False)


def test_the_stated_length_at_the_price_is_set_aside_for_every_answer(state: RoutingState) -> None:
    claim = claim_of(a_choice("cheap", most=100, answers=3), state, SETTINGS, MONEY)

    assert (claim.id, claim.picousd, claim.tokens) == ("dec-1", (1000 + 3 * 400) * MICRO, 0)
    assert claim.lives_s == 100 + MARGIN_S


def test_it_is_the_dearest_of_those_that_may_be_asked(state: RoutingState) -> None:
    claim = claim_of(a_choice("cheap", "dear", most=100), state, SETTINGS, MONEY)

    assert claim.picousd == (10_000 + 4000) * MICRO


def test_an_answer_of_no_stated_length_is_set_aside_up_to_the_setting_or_the_models_own_bound(
    state: RoutingState,
) -> None:
    assert claim_of(a_choice("cheap"), state, SETTINGS, MONEY).picousd == (1000 + 4 * 4096) * MICRO
    assert claim_of(a_choice("short"), state, SETTINGS, MONEY).picousd == (1000 + 4 * 500) * MICRO
    assert claim_of(a_choice("short", most=9000), state, SETTINGS, MONEY).picousd == (1000 + 4 * 500) * MICRO


def test_a_model_of_unknown_price_is_not_asked_for_a_key_with_a_spend_limit(state: RoutingState) -> None:
    with pytest.raises(NothingAble, match="no price of the model 'unpriced'"):
        claim_of(a_choice("unpriced"), state, SETTINGS, MONEY)

    assert claim_of(a_choice("unpriced"), state, SETTINGS, KeyLimits(requests_per_minute=1)).picousd == 0


def test_tokens_are_prompt_and_answers_as_stated_or_as_long_as_usual(state: RoutingState) -> None:
    limits = KeyLimits(tokens_per_minute=100_000)

    assert claim_of(a_choice("cheap", most=100, answers=2), state, SETTINGS, limits).tokens == 1200
    assert claim_of(a_choice("cheap", answers=2), state, SETTINGS, limits).tokens == 1000 + 2 * 50


def test_only_what_was_stated_can_be_too_large_for_a_limit_of_tokens(state: RoutingState) -> None:
    limits = KeyLimits(tokens_per_minute=1020)

    assert claim_of(a_choice("cheap"), state, SETTINGS, limits).tokens == 1020
    assert claim_of(a_choice("cheap", most=100), state, SETTINGS, limits).tokens == 1100
    assert claim_of(a_choice("cheap", prompt=2000), state, SETTINGS, limits).tokens == 2000


def test_a_claim_beyond_all_measure_fits_a_counter(state: RoutingState) -> None:
    claim = claim_of(a_choice("cheap", most=10**15), state, SETTINGS, MONEY)

    assert claim.picousd == MOST_PICOUSD


def test_where_money_is_limited_nobody_is_asked_for_whom_none_is_set_aside() -> None:
    choice = replace(a_choice("cheap", "short", "dear"), attempts=2)
    assert within_claim(choice, MONEY).order == ("cheap", "short")
    assert within_claim(choice, KeyLimits(requests_per_minute=5)).order == ("cheap", "short", "dear")


def test_dearer_models_can_be_left_out_of_those_to_fall_back_on(state: RoutingState) -> None:
    assert no_dearer(a_choice("cheap", "dear", "short", most=100), state, SETTINGS).order == ("cheap", "short")
    assert no_dearer(a_choice("dear", "cheap", most=100), state, SETTINGS).order == ("dear", "cheap")
