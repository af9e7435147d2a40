from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxy.errors import NoEligibleModelError
from proxy.routing.selection import Selection
from proxy.server.reservations import (
    MARGIN_S,
    MAX_PICOUSD,
    ReservationRequest,
    UsageEstimate,
    drop_pricier_fallbacks,
    limit_to_reserved,
    reservation_request,
)
from proxy.settings.schema import Settings
from proxy.storage.client_keys import KeyLimits
from proxy.storage.records import ResolvedProvider, StoredProfile
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from router_core.types import Requirements
from tests.support.makers import a_profile, a_record, snapshot_inputs

MONEY = KeyLimits(usd_per_day=5.0)
SETTINGS = Settings(request_timeout_s=100)
# Picodollars in a millionth of a dollar.
MICRO = 10**6


def a_choice(*order: str, prompt: int = 1000, needs: Requirements | None = None) -> Selection:
    needs = needs or Requirements(prompt_tokens=prompt)
    return Selection("dec-1", order[0], "scored", 0.1, order, None, {}, max_attempts=len(order), requirements=needs)


def reserved(choice: Selection, state: RoutingSnapshot, limits: KeyLimits, **body: Any) -> ReservationRequest:
    return reservation_request(UsageEstimate(choice, body, state, SETTINGS), limits)


@pytest.fixture(scope="module")
def state() -> RoutingSnapshot:
    """Build models. cheap: $1 and $4 per million tokens; dear: ten times that; short: as cheap, at most 500 tokens.

    unpriced; claude, whose cache is expensive to write; qwen, which reasons; voice, with prices of sound; long, with a
    tier above 200,000 tokens; arm, whose own parameters state sizes and a prompt of 400 bytes.
    """
    cheap = {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6}
    infos: dict[str, dict[str, Any]] = {
        "cheap": cheap,
        "dear": {"input_cost_per_token": 1e-5, "output_cost_per_token": 4e-5},
        "short": {**cheap, "max_output_tokens": 500},
        "unpriced": {},
        "claude": {**cheap, "cache_creation_input_token_cost": 4e-6},
        "qwen": {**cheap, "supports_reasoning": True},
        "voice": {**cheap, "input_cost_per_audio_token": 3e-6, "output_cost_per_audio_token": 2e-5},
        "long": {
            **cheap,
            "input_cost_per_token_above_200k_tokens": 2e-6,
            "output_cost_per_token_above_200k_tokens": 6e-6,
        },
        "arm": cheap,
    }
    records = {name: a_record(name, info=info) for name, info in infos.items()}
    for name, provider in (("claude", "anthropic"), ("qwen", "dashscope")):
        resolved = ResolvedProvider("translate", name, provider)
        records[name] = replace(records[name], litellm_params={"model": f"{provider}/{name}"}, resolved=resolved)
    own: dict[str, Any] = {"system": "x" * 384, "n": 2, "extra_body": {"max_tokens": 7000}}
    records["arm"] = a_record("arm", info=cheap, **own)
    profiles = {name: StoredProfile(records[name].fingerprint, a_profile()) for name in ("cheap", "dear")}
    return build_state(StoredState(1, records, profiles, keys_exist=False), snapshot_inputs(), keys_latched=False)


def test_the_requested_length_at_the_price_is_reserved_for_every_answer(state: RoutingSnapshot) -> None:
    request = reserved(a_choice("cheap"), state, MONEY, max_tokens=100, n=3)

    assert (request.id, request.picousd, request.tokens) == ("dec-1", (1000 + 3 * 400) * MICRO, 0)
    assert request.ttl_s == 100 + MARGIN_S


def test_the_most_expensive_of_the_models_that_may_answer_is_reserved(state: RoutingSnapshot) -> None:
    request = reserved(a_choice("cheap", "dear"), state, MONEY, max_tokens=100)

    assert request.picousd == (10_000 + 4000) * MICRO


def test_an_answer_without_a_requested_length_is_reserved_up_to_the_setting_or_the_models_limit(
    state: RoutingSnapshot,
) -> None:
    assert reserved(a_choice("cheap"), state, MONEY).picousd == (1000 + 4 * 4096) * MICRO
    assert reserved(a_choice("short"), state, MONEY).picousd == (1000 + 4 * 500) * MICRO


def test_a_limit_is_reserved_as_it_is_sent_to_the_model(state: RoutingSnapshot) -> None:
    """Not as its bound is known, where it is told more than that."""
    capped = a_choice("short", needs=Requirements(prompt_tokens=1000, max_output_tokens=9000, limit_is_cap=True))

    assert reserved(a_choice("short"), state, MONEY, max_tokens=9000).picousd == (1000 + 4 * 9000) * MICRO
    assert reserved(capped, state, MONEY, max_tokens=9000).picousd == (1000 + 4 * 500) * MICRO


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"max_completion_tokens": 100}, 100),
        ({"max_tokens": 100, "num_predict": 5000}, 5000),
        ({"max_tokens": 100, "generationConfig": {"maxOutputTokens": 5000, "candidateCount": 2}}, 10_000),
        ({"max_tokens": 100, "best_of": 4}, 400),
        ({"max_tokens": 100, "options": {"num_predict": -1}}, 4096),
        ({"max_new_tokens": 1}, 4096),
        ({"max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 2000}}, 2100),
        ({"max_tokens": 100, "reasoning": {"max_tokens": 2000}, "n": 2}, 4200),
        ({"thinking_budget": 2000}, 6096),
        ({"max_tokens": 100, "prediction": {"type": "content", "content": "x" * 400}}, 200),
    ],
)
def test_every_name_of_a_limit_that_an_upstream_could_read_is_reserved(
    state: RoutingSnapshot, body: dict[str, Any], output: int
) -> None:
    assert reserved(a_choice("cheap"), state, MONEY, **body).picousd == (1000 + 4 * output) * MICRO


def test_reasoning_within_the_limit_is_not_reserved_twice(state: RoutingSnapshot) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}

    assert reserved(a_choice("claude"), state, MONEY, max_tokens=3000, thinking=thinking).picousd == 4 * 4000 * MICRO
    assert reserved(a_choice("claude"), state, MONEY, max_tokens=100, thinking=thinking).picousd == 4 * 3100 * MICRO


def test_reasoning_beyond_the_limit_is_reserved_as_an_answer_without_a_requested_length(
    state: RoutingSnapshot,
) -> None:
    assert reserved(a_choice("qwen"), state, MONEY, max_tokens=100).picousd == (1000 + 4 * 4196) * MICRO


def test_a_models_own_parameters_are_reserved_as_they_are_sent(state: RoutingSnapshot) -> None:
    assert reserved(a_choice("arm"), state, MONEY, messages=[]).picousd == (1000 + 100 + 4 * 2 * 7000) * MICRO
    assert reserved(a_choice("arm"), state, MONEY, messages=[], max_tokens=10, n=1).picousd == (1100 + 40) * MICRO


def test_a_prompt_is_reserved_at_the_price_of_writing_it_to_a_cache(state: RoutingSnapshot) -> None:
    assert reserved(a_choice("claude"), state, MONEY, max_tokens=1).picousd == (4 * 1000 + 4) * MICRO


def test_requested_audio_is_reserved_at_its_own_price(state: RoutingSnapshot) -> None:
    spoken = Requirements(prompt_tokens=1000, audio_input=True, audio_output=True)

    assert reserved(a_choice("voice", needs=spoken), state, MONEY, max_tokens=100).picousd == (3000 + 2000) * MICRO
    assert reserved(a_choice("voice"), state, MONEY, max_tokens=100).picousd == (1000 + 400) * MICRO


def test_a_long_prompt_is_reserved_at_the_price_of_its_tier(state: RoutingSnapshot) -> None:
    request = reserved(a_choice("long", prompt=300_000), state, MONEY, max_tokens=100)

    assert request.picousd == (600_000 + 600) * MICRO


def test_a_key_with_a_spend_limit_gets_no_model_of_unknown_price(state: RoutingSnapshot) -> None:
    with pytest.raises(NoEligibleModelError, match="no price of the model 'unpriced'"):
        reserved(a_choice("unpriced"), state, MONEY)

    assert reserved(a_choice("unpriced"), state, KeyLimits(requests_per_minute=1)).picousd == 0


def test_tokens_are_prompt_and_answers_of_the_requested_or_usual_length(state: RoutingSnapshot) -> None:
    limits = KeyLimits(tokens_per_minute=100_000)

    assert reserved(a_choice("cheap"), state, limits, max_tokens=100, n=2).tokens == 1200
    assert reserved(a_choice("cheap"), state, limits, n=2).tokens == 1000 + 2 * 50
    assert reserved(a_choice("cheap"), state, limits, max_tokens=1, num_predict=5000).tokens == 6000
    assert reserved(a_choice("cheap"), state, limits, max_tokens=1, thinking={"budget_tokens": 5000}).tokens == 6001


def test_only_a_requested_length_can_be_too_large_for_a_token_limit(state: RoutingSnapshot) -> None:
    limits = KeyLimits(tokens_per_minute=1020)

    assert reserved(a_choice("cheap"), state, limits).tokens == 1020
    assert reserved(a_choice("cheap"), state, limits, max_tokens=100).tokens == 1100
    assert reserved(a_choice("cheap", prompt=2000), state, limits).tokens == 2000


def test_an_impossible_reservation_fits_a_counter(state: RoutingSnapshot) -> None:
    request = reserved(a_choice("dear"), state, MONEY, max_tokens=10**400, n=128)

    assert request.picousd == MAX_PICOUSD or request.picousd == 128 * 4 * 10 * 10**9 * MICRO + 10_000 * MICRO


def test_if_money_is_limited_no_model_is_tried_without_a_reservation() -> None:
    choice = replace(a_choice("cheap", "short", "dear"), max_attempts=2)
    assert limit_to_reserved(choice, MONEY).candidates == ("cheap", "short")
    assert limit_to_reserved(choice, KeyLimits(requests_per_minute=5)).candidates == ("cheap", "short", "dear")


def test_pricier_fallbacks_can_be_dropped(state: RoutingSnapshot) -> None:
    body = {"max_tokens": 100}

    assert drop_pricier_fallbacks(
        UsageEstimate(a_choice("cheap", "dear", "short"), body, state, SETTINGS)
    ).candidates == (
        "cheap",
        "short",
    )
    assert drop_pricier_fallbacks(UsageEstimate(a_choice("dear", "cheap"), body, state, SETTINGS)).candidates == (
        "dear",
        "cheap",
    )
