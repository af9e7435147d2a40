"""Which conversations stay with their model, and when a session is worth staying for. Figures are by hand.

One question of 1,000 tokens, answers of 50 tokens that cost nothing, λ = 0.1: read afresh, "warm" costs $0.01 and
"cold" $0.004; each token that "warm" has in its cache costs it $9e-6 less, so 667 of them make it the cheaper one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.errors import NoEligibleModelError
from proxy.routing.affinity import NO_AFFINITY, Affinity
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.selection import Selection, apply_affinity, select_model, selection_to_json
from proxy.routing.selection_context import SelectionContext
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.records import StoredProfile
from proxy.storage.sessions import LastTurn
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from router_core.types import Floats
from tests.support.makers import a_profile, a_record, snapshot_inputs

# With the names of its fields 4,000 bytes.
THOUSAND_TOKENS = "word " * 797
PRICES: dict[str, dict[str, Any]] = {
    "cold": {"input_cost_per_token": 4e-6, "output_cost_per_token": 0.0},
    "warm": {"input_cost_per_token": 1e-5, "output_cost_per_token": 0.0, "cache_read_input_token_cost": 1e-6},
    "plain": {"input_cost_per_token": 2e-5, "output_cost_per_token": 0.0},
    "unmeasured": {"input_cost_per_token": 4e-6, "output_cost_per_token": 0.0},
}


class Corner:
    """Embed every text in the first corner; "broken" cannot be read."""

    id = "corners"
    dimension = 4

    def embed(self, texts: Sequence[str]) -> Floats:
        if texts == ["broken"]:
            raise ValueError("no such text")
        return np.tile(np.eye(4, dtype=np.float32)[0], (len(texts), 1))


def a_state(**info: dict[str, Any]) -> RoutingSnapshot:
    records = {name: a_record(name, info={**price, **info.get(name, {})}) for name, price in PRICES.items()}
    profiles = {
        name: StoredProfile(record.fingerprint, a_profile([0.2] * 4))
        for name, record in records.items()
        if name != "unmeasured"
    }
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, snapshot_inputs(), keys_latched=False)


async def chosen(
    affinity: Affinity,
    model: str = "auto",
    *,
    text: str = THOUSAND_TOKENS,
    key: ClientKey | None = None,
    state: RoutingSnapshot | None = None,
    settings: dict[str, Any] | None = None,
    body: dict[str, Any] | None = None,
    explain: bool = False,
    housekeeping: bool = False,
    **options: Any,
) -> Selection:
    content = {"messages": [{"role": "user", "content": text}], **(body or {})}
    request = ChatRequest(content, model, False, False, RoutingOptions(**options), housekeeping=housekeeping)
    found = Settings.model_validate({"data_dir": Path("/nowhere"), **(settings or {})})
    ctx = SelectionContext("dec-1", request, key, state or a_state(), found, affinity=affinity)
    return await select_model(ctx, ClusterAssigner(Corner(), 1.0), explain=explain)


LOOP = Affinity(producer="plain")
REASONING = Affinity(producer="plain", has_reasoning=True)


async def test_a_tool_loop_stays_with_its_producer_and_may_fall_back() -> None:
    choice = await chosen(LOOP)
    assert (choice.model, choice.reason, choice.candidates) == ("plain", "sticky", ("plain", "cold", "warm"))
    assert (await chosen(LOOP, fallbacks=False)).candidates == ("plain",)
    assert (await chosen(LOOP, settings={"fallback_attempts": 2})).max_attempts == 2


async def test_reasoning_that_others_did_not_sign_goes_to_nobody_else_unless_asked() -> None:
    assert (await chosen(REASONING)).candidates == ("plain",)
    assert (await chosen(REASONING, fallbacks=True)).candidates == ("plain", "cold", "warm")


@pytest.mark.parametrize("name", ["auto", "uniroute/best", "uniroute/cheap"])
async def test_it_stays_whichever_way_was_asked_for(name: str) -> None:
    assert (await chosen(LOOP, name)).model == "plain"


async def test_a_named_model_wins_over_affinity() -> None:
    choice = await chosen(LOOP, "cold")
    assert (choice.model, choice.reason) == ("cold", "pinned")


async def test_it_stays_even_where_the_prompt_cannot_be_looked_at() -> None:
    choice = await chosen(LOOP, text="broken")
    assert (choice.model, choice.reason, choice.degraded_reason is not None) == ("plain", "sticky", True)


async def test_a_producer_that_is_not_profiled_may_continue() -> None:
    loop = Affinity(producer="unmeasured")
    assert (await chosen(loop)).model == "unmeasured"
    assert (await chosen(loop, max_cost_usd=1.0)).model == "cold"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"models": ("warm", "cold")}, "not among the models"),
        ({"key": ClientKey("k", "n", "d", 0.0, ("warm", "cold"))}, "ruled out"),
        ({"state": a_state(plain={"max_input_tokens": 10})}, "context window"),
        ({"state": a_state(plain={"supports_function_calling": False}), "body": {"tools": [{}]}}, "call tools"),
        ({"max_cost_usd": 0.015}, "max_cost_usd"),
    ],
    ids=["request", "key", "window", "tools", "price"],
)
async def test_a_producer_that_may_not_answer_is_left_with_a_reason(options: dict[str, Any], why: str) -> None:
    choice = await chosen(LOOP, **options)
    assert (choice.model, choice.reason, choice.lost_affinity) == ("cold", "scored", "plain")
    assert why in choice.ineligible["plain"]


async def test_a_producer_that_could_be_scored_and_was_not_is_left_whatever_the_reason() -> None:
    request = ChatRequest({"messages": []}, "auto", stream=False, include_usage=False, options=RoutingOptions())
    settings = Settings.model_validate({"data_dir": Path("/nowhere")})
    ctx = SelectionContext("dec-1", request, None, a_state(), settings, affinity=LOOP)
    routed = await chosen(NO_AFFINITY, models=("warm", "cold"))
    assert apply_affinity(ctx, routed).lost_affinity == "plain"


async def test_a_producer_that_is_gone_is_left() -> None:
    choice = await chosen(Affinity(producer="removed"), explain=True)
    assert (choice.model, choice.lost_affinity) == ("cold", "removed")
    assert {"model": "removed", "why": "not registered any more"} in selection_to_json(choice)["ineligible"]


async def test_an_unknown_producer_changes_nothing() -> None:
    choice = await chosen(Affinity(has_reasoning=True))
    assert (choice.model, choice.reason, choice.lost_affinity) == ("cold", "scored", None)


def session(tokens: int | None, *, model: str = "warm", age_s: float = 10.0) -> Affinity:
    return Affinity(session="digest", last_turn=LastTurn(model, tokens, age_s))


@pytest.mark.parametrize(("tokens", "model", "reason"), [(660, "cold", "scored"), (670, "warm", "sticky")])
async def test_a_session_stays_where_what_is_cached_makes_it_the_cheaper_one(
    tokens: int, model: str, reason: str
) -> None:
    choice = await chosen(session(tokens))
    assert (choice.model, choice.reason) == (model, reason)


async def test_the_decision_shows_the_cached_price() -> None:
    """800 of 1,000 tokens: 200 × $1e-5 + 800 × $1e-6; the reference is 1,000 × $2.5e-6 + 50 × $1e-5 = $0.003."""
    candidates = {
        row["model"]: row for row in selection_to_json(await chosen(session(800), explain=True))["candidates"]
    }
    assert candidates["warm"]["expected_cost_usd"] == pytest.approx(0.0028)
    assert candidates["warm"]["score"] == pytest.approx(0.2 + 0.1 * 0.0028 / 0.003)
    assert candidates["cold"]["expected_cost_usd"] == pytest.approx(0.004)
    assert candidates["warm"]["flips_at_lambda"] == 0.1
    assert candidates["cold"]["flips_at_lambda"] is None  # as good, and dearer now


async def test_no_more_can_be_cached_than_there_is() -> None:
    decision = selection_to_json(await chosen(session(10**9), explain=True))
    assert decision["candidates"][0]["expected_cost_usd"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "affinity",
    [session(None), session(900, age_s=301.0), session(900, model="plain"), session(900, model="removed")],
    ids=["tokens unknown", "cache gone cold", "no cached price", "removed"],
)
async def test_without_a_warm_cache_a_session_is_routed_like_any_other(affinity: Affinity) -> None:
    choice = await chosen(affinity)
    assert (choice.model, choice.reason) == ("cold", "scored")


async def test_what_would_have_been_chosen_anyway_is_scored() -> None:
    assert (await chosen(session(900), models=("warm", "plain"))).reason == "scored"
    assert (await chosen(session(900), models=("warm",))).reason == "only_candidate"


async def test_a_session_may_come_under_the_price_cap_by_its_cache_alone() -> None:
    choice = await chosen(session(900), models=("warm", "plain"), max_cost_usd=0.005)
    assert (choice.model, choice.reason) == ("warm", "only_candidate")
    with pytest.raises(NoEligibleModelError):
        await chosen(session(None), models=("warm", "plain"), max_cost_usd=0.005)


async def test_off_and_on_are_what_they_say() -> None:
    off, on = {"sticky_sessions": "off"}, {"sticky_sessions": "on"}
    assert (await chosen(session(900), settings=off)).model == "cold"
    stuck = await chosen(session(None, model="plain", age_s=3000.0), settings=on)
    assert (stuck.model, stuck.reason, stuck.candidates) == ("plain", "sticky", ("plain", "cold", "warm"))
    assert (await chosen(session(1, model="plain"), settings=on, models=("cold", "warm"))).model == "cold"
    assert (await chosen(replace(LOOP, last_turn=LastTurn("warm", 1, 0.0)), settings=on)).model == "plain"


@pytest.mark.parametrize(("written", "read"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yamls_on_and_off_are_read_as_written(written: Any, read: str) -> None:
    assert Settings.model_validate({"sticky_sessions": written}).sticky_sessions == read


async def test_housekeeping_follows_no_session_and_is_where_the_cache_makes_it_cheapest() -> None:
    on = {"sticky_sessions": "on"}
    stuck = await chosen(session(None, model="plain"), settings=on, housekeeping=True)
    cached = await chosen(session(900), housekeeping=True)

    assert (stuck.model, stuck.reason) == ("cold", "housekeeping")
    assert (cached.model, cached.reason) == ("warm", "housekeeping")


async def test_housekeeping_that_carries_reasoning_goes_to_its_producer() -> None:
    choice = await chosen(REASONING, housekeeping=True)

    assert (choice.model, choice.reason, choice.candidates) == ("plain", "sticky", ("plain",))
