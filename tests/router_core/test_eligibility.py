from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.eligibility import eligible, output_limit
from router_core.errors import MapMismatch
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.types import CAPABILITY_NAMES, FREE, Capabilities, Price, Requirements
from tests.router_core.makers import a_candidate, a_map, a_pool


def capable(name: str, **capabilities: Any) -> Candidate:
    return a_candidate(name, capabilities=Capabilities(**capabilities))


def test_a_model_without_a_price_is_not_free() -> None:
    left = eligible(a_pool(a_candidate("priced"), a_candidate("unpriced", price=None)), Requirements())
    assert left.names == ("priced",)
    assert "price" in left.reasons["unpriced"]


def test_unprofiled_and_cooling_models_are_left_out_with_their_own_reason() -> None:
    pool = a_pool(a_candidate("new", errors=None), a_candidate("down"), a_candidate("up"))
    left = eligible(pool, Requirements(), cooling_down={"down", "stranger"})
    assert left.names == ("up",)
    assert left.reasons == {"new": "not profiled on this cluster map", "down": "resting after failures"}


def test_an_excluded_model_is_left_out_of_every_choice_with_its_reason() -> None:
    pool = a_pool(replace(a_candidate("away"), excluded="on leave"), a_candidate("up"))
    assert [pool.names[row] for row in pool.routable_rows] == ["up"]
    for found in (eligible(pool, Requirements()), eligible(pool, Requirements(), ["away", "up"])):
        assert found.names == ("up",)
        assert (found.reasons, found.why_ruled_out(9)) == ({"away": "on leave"}, {"away": "on leave"})
    assert eligible(pool, Requirements(), require_profile=False).names == ("up",)
    assert pool.best_on_average() == "up"


def test_an_allow_list_leaves_only_its_models_and_ignores_unknown_names() -> None:
    left = eligible(a_pool(a_candidate("a"), a_candidate("b")), Requirements(), allowed=["b", "stranger"])
    assert left.names == ("b",)


def test_a_prompt_longer_than_the_window_rules_the_model_out() -> None:
    left = eligible(
        a_pool(capable("small", max_input_tokens=1000), a_candidate("unlimited")), Requirements(prompt_tokens=1001)
    )
    assert left.names == ("unlimited",)
    assert "1001" in left.reasons["small"]


def test_a_limit_above_the_models_output_limit_rules_it_out() -> None:
    short = capable("short", max_output_tokens=100)
    assert eligible(a_pool(short), Requirements(max_output_tokens=101)).names == ()
    assert eligible(a_pool(short), Requirements(max_output_tokens=100)).names == ("short",)


def test_a_cap_rules_no_model_out_and_is_lowered_to_each_models_limit() -> None:
    pool = a_pool(
        capable("short", max_output_tokens=100), capable("long", max_output_tokens=9000), a_candidate("unknown")
    )
    needs = Requirements(max_output_tokens=8000, limit_is_cap=True)

    assert eligible(pool, needs).names == ("long", "short", "unknown")
    assert [output_limit(pool, pool.index[name], needs) for name in ("short", "long", "unknown")] == [100, 8000, 8000]


def test_a_limit_that_is_no_cap_is_sent_as_stated() -> None:
    pool = a_pool(capable("short", max_output_tokens=100))

    assert output_limit(pool, 0, Requirements(max_output_tokens=8000)) == 8000
    assert output_limit(pool, 0, Requirements(limit_is_cap=True)) is None


@pytest.mark.parametrize(
    ("prompt", "cap"),
    [
        (100, 32_000 - 100 - 356),  # the prompt once more, and what a template may add
        (20_000, 6000),  # half of what is left
        (31_900, None),  # less than answers usually are
    ],
)
def test_a_cap_leaves_room_for_a_prompt_longer_than_estimated(prompt: int, cap: int) -> None:
    pool = a_pool(capable("model", max_input_tokens=32_000))
    needs = Requirements(prompt_tokens=prompt, max_output_tokens=64_000, limit_is_cap=True)
    left = eligible(pool, needs)

    assert left.names == (() if cap is None else ("model",))
    assert cap is not None or "31900 prompt tokens and an answer" in left.reasons["model"]
    assert cap is None or output_limit(pool, 0, needs) == cap


@pytest.mark.parametrize(("output", "shared"), [(None, True), (1000, True), (2000, True), (999, False)])
def test_prompt_and_answer_share_one_window_unless_the_answer_has_a_smaller_limit(
    output: int | None, shared: bool
) -> None:
    pool = a_pool(capable("model", max_input_tokens=1000, max_output_tokens=output))
    assert eligible(pool, Requirements(prompt_tokens=600, max_output_tokens=400)).names == ("model",)
    both = eligible(pool, Requirements(prompt_tokens=600, max_output_tokens=401))
    assert both.names == (() if shared else ("model",))
    assert not shared or both.reasons["model"] == "context window below about 600 prompt tokens and 401 of an answer"


def test_a_model_of_unknown_window_takes_any_prompt_and_answer() -> None:
    assert eligible(a_pool(a_candidate("model")), Requirements(prompt_tokens=10**9, max_output_tokens=10**9)).names


def test_a_price_above_the_requests_limit_rules_a_model_out() -> None:
    pool = a_pool(a_candidate("cheap", price=Price(1e-6, 2e-6)), a_candidate("dear", price=Price(1e-5, 2e-6)))
    assert eligible(pool, Requirements(max_output_cost_per_token=2e-6)).names == ("cheap", "dear")
    left = eligible(pool, Requirements(max_input_cost_per_token=2e-6))
    assert left.names == ("cheap",)
    assert left.reasons == {"dear": "input price above 2 USD per million tokens"}


def test_a_price_equal_to_the_limit_is_within_it_up_to_rounding() -> None:
    assert 0.019 / 1e6 < 1.9e-8
    pool = a_pool(a_candidate("model", price=Price(1.9e-8, 0.0)))
    assert eligible(pool, Requirements(max_input_cost_per_token=0.019 / 1e6)).names == ("model",)


@pytest.mark.parametrize("ability", CAPABILITY_NAMES)
def test_a_model_known_to_lack_a_capability_is_not_eligible(ability: str) -> None:
    pool = a_pool(capable("unable", **{ability: False}))
    assert eligible(pool, Requirements(**{ability: True})).names == ()
    assert eligible(pool, Requirements()).names == ("unable",)


@pytest.mark.parametrize("ability", CAPABILITY_NAMES)
def test_an_unknown_capability_is_trusted_only_if_no_model_is_known_to_have_it(ability: str) -> None:
    unknown, known = a_candidate("unknown"), capable("able", **{ability: True})
    assert eligible(a_pool(unknown), Requirements(**{ability: True})).names == ("unknown",)
    left = eligible(a_pool(unknown, known), Requirements(**{ability: True}))
    assert left.names == ("able",)
    assert left.reasons == {"unknown": f"not known to {CAPABILITY_NAMES[ability]}"}


def test_a_capable_model_that_is_ruled_out_does_not_rule_out_unknown_ones() -> None:
    able = a_candidate("able", price=None, capabilities=Capabilities(vision=True))
    assert eligible(a_pool(a_candidate("unknown"), able), Requirements(vision=True)).names == ("unknown",)


def test_an_ineligible_model_does_not_rule_out_models_of_unknown_capability() -> None:
    pool = a_pool(capable("blind", tools=True, vision=False), capable("sees", vision=True))
    assert eligible(pool, Requirements(tools=True, vision=True)).names == ("sees",)


def test_all_reasons_of_the_first_failed_stage_are_reported() -> None:
    blind = capable("blind", tools=False, vision=False, max_input_tokens=10)
    unpriced = a_candidate("unpriced", price=None, capabilities=Capabilities(tools=False))
    why = eligible(a_pool(blind, unpriced), Requirements(tools=True, vision=True, prompt_tokens=11)).reasons
    assert why["blind"] == "context window below about 11 prompt tokens, cannot call tools, cannot read images"
    assert why["unpriced"] == "no price is known; state one, or free: true"


KNOWN = st.sampled_from([True, False, None])
CAPABILITIES = st.builds(
    Capabilities,
    max_input_tokens=st.sampled_from([None, 100, 1000]),
    max_output_tokens=st.sampled_from([None, 50, 1000]),
    **dict.fromkeys(CAPABILITY_NAMES, KNOWN),
)
NEEDS = st.builds(
    Requirements,
    prompt_tokens=st.integers(0, 1200),
    max_output_tokens=st.sampled_from([None, 10, 60]),
    max_input_cost_per_token=st.sampled_from([None, 0.0]),
    **dict.fromkeys(CAPABILITY_NAMES, st.booleans()),
)
ONE_MORE = st.sampled_from(
    [*({ability: True} for ability in CAPABILITY_NAMES), {"max_input_cost_per_token": 0.0}, {"prompt_tokens": 1300}]
)


@settings(deadline=None)
@given(st.lists(CAPABILITIES, max_size=6), NEEDS, ONE_MORE)
def test_one_more_requirement_adds_only_models_of_unknown_capability(
    capabilities: list[Capabilities], needs: Requirements, more: dict[str, Any]
) -> None:
    pool = a_pool(*(a_candidate(f"m{place}", capabilities=each) for place, each in enumerate(capabilities)))
    before, after = eligible(pool, needs), eligible(pool, replace(needs, **more))

    assert set(after.names) <= set(before.names) or not set(after.names) & set(before.names)
    returned = set(after.names) - set(before.names)
    assert all(before.reasons[name].startswith("not known to") for name in returned)


@settings(deadline=None)
@given(st.lists(CAPABILITIES, max_size=6), NEEDS)
def test_every_model_is_eligible_or_has_a_reason(capabilities: list[Capabilities], needs: Requirements) -> None:
    pool = a_pool(*(a_candidate(f"m{place}", capabilities=each) for place, each in enumerate(capabilities)))
    left = eligible(pool, needs)

    assert sorted([*left.names, *left.reasons]) == list(pool.names)
    assert left.names or not any("not known to" in reason for reason in left.reasons.values())


def test_a_profile_of_another_map_is_refused_when_the_pool_is_built() -> None:
    foreign = Profile.from_json({"map": "elsewhere", "errors": [0.1] * 3, "labels": [1.0] * 3})
    candidate = a_candidate("model")
    stranger = type(candidate)("stranger", foreign, FREE)
    with pytest.raises(MapMismatch, match=r"stranger.*elsewhere"):
        Pool.build([candidate, stranger], a_map())
