"""Which conversations stay with their model, and when a session is worth staying for. Figures are by hand.

One question of 1,000 tokens, answers of 50 tokens that cost nothing, λ = 0.1: read afresh, "warm" costs $0.01 and
"cold" $0.004; each token that "warm" has in its cache costs it $9e-6 less, so 667 of them make it the cheaper one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from proxy.routing.selection_context import EMPTY, SelectionContext
from proxy.routing.trajectory import Trajectory
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
    housekeeping: str | None = None,
    cooling_down: Mapping[str, float] = EMPTY,
    not_ready: Collection[str] = (),
    **options: Any,
) -> Selection:
    content = {"messages": [{"role": "user", "content": text}], **(body or {})}
    request = ChatRequest(content, model, False, False, RoutingOptions(**options), housekeeping=housekeeping)
    found = Settings.model_validate({"data_dir": Path("/nowhere"), **(settings or {})})
    ctx = SelectionContext(
        "dec-1",
        request,
        key,
        state or a_state(),
        found,
        affinity=affinity,
        cooling_down=cooling_down,
        not_ready=not_ready,
    )
    return await select_model(ctx, ClusterAssigner(Corner(), 1.0), explain=explain)


LOOP = Affinity(producer="plain")
REASONING = Affinity(producer="plain", has_reasoning=True)


@pytest.mark.parametrize("affinity", [LOOP, REASONING], ids=["tool loop", "reasoning"])
async def test_what_a_model_has_begun_goes_to_no_other_unless_asked(affinity: Affinity) -> None:
    choice = await chosen(affinity)
    assert (choice.model, choice.reason, choice.candidates) == ("plain", "sticky", ("plain",))
    assert (await chosen(affinity, fallbacks=False)).candidates == ("plain",)
    asked = await chosen(affinity, fallbacks=True, settings={"fallback_attempts": 2})
    assert (asked.candidates, asked.max_attempts) == (("plain", "cold", "warm"), 2)


@pytest.mark.parametrize("affinity", [LOOP, REASONING], ids=["tool loop", "reasoning"])
@pytest.mark.parametrize("why", ["cooling_down", "not_ready"])
async def test_what_a_model_has_begun_waits_for_it_while_it_rests(affinity: Affinity, why: str) -> None:
    resting: dict[str, Any] = {why: {"plain": 5.0, "warm": 5.0}}
    choice = await chosen(affinity, **resting)
    assert (choice.model, choice.candidates, choice.lost_affinity) == ("plain", ("plain",), None)
    assert set(choice.ineligible) >= {"warm"}


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
    stuck = await chosen(session(None, model="plain"), settings=on, housekeeping="title")
    cached = await chosen(session(900), housekeeping="title")

    assert (stuck.model, stuck.reason) == ("cold", "housekeeping")
    assert (cached.model, cached.reason) == ("warm", "housekeeping")


async def test_housekeeping_that_carries_reasoning_goes_to_its_producer() -> None:
    choice = await chosen(REASONING, housekeeping="title")

    assert (choice.model, choice.reason, choice.candidates) == ("plain", "sticky", ("plain",))


STUCK = Trajectory(stuck=0.8, failed=0.9, turns=5)


def stuck_with(**models: float) -> Affinity:
    return Affinity(trajectory=STUCK, stuck=tuple(models.items()))


async def candidates(affinity: Affinity, **more: Any) -> dict[str, dict[str, Any]]:
    choice = await chosen(affinity, explain=True, **more)
    return {row["model"]: row for row in selection_to_json(choice, affinity.trajectory)["candidates"]}


def better_but_dearer(error: float = 0.1) -> RoutingSnapshot:
    """Build "cold" at 20 % errors, "warm" at more, and "plain", at five times the price of "cold", at fewer."""
    records = {name: a_record(name, info=price) for name, price in PRICES.items() if name != "unmeasured"}
    errors = {"cold": 0.2, "warm": 0.3, "plain": error}
    profiles = {
        name: StoredProfile(record.fingerprint, a_profile([errors[name]] * 4)) for name, record in records.items()
    }
    return build_state(
        StoredState(version=1, models=records, profiles=profiles, keys_exist=False),
        snapshot_inputs(),
        keys_latched=False,
    )


async def test_a_stuck_model_is_expected_to_err_more_and_so_are_models_that_err_more_anyway() -> None:
    """By hand: 0.75 · 0.4 = 0.3 of the 80 % that "cold" gets right are 0.24 more errors."""
    rows = await candidates(stuck_with(cold=0.4), state=better_but_dearer())
    added = {name: row["trajectory_error"] for name, row in rows.items()}
    assert added == {"cold": pytest.approx(0.24), "warm": pytest.approx(0.24), "plain": 0}
    assert rows["cold"]["expected_error"] == pytest.approx(0.44)
    assert rows["cold"]["score"] == pytest.approx(0.44 + 0.1 * 0.004 / 0.003)
    assert rows["cold"]["error_low"] < 0.44 < rows["cold"]["error_high"]


async def test_a_run_that_is_stuck_goes_on_with_a_better_model_if_lambda_allows_it() -> None:
    """Of the costs "plain" has 6.67 and "cold" 1.33: at λ = 0.1 the difference is 0.533, at 0.05 half of that."""
    state = better_but_dearer()
    assert (await chosen(stuck_with(cold=0.4), state=state, lambda_=0.05)).model == "plain"
    assert (await chosen(NO_AFFINITY, state=state, lambda_=0.05)).model == "cold"
    assert (await chosen(stuck_with(cold=0.4), state=state, lambda_=0.1)).model == "cold"
    assert (await chosen(stuck_with(cold=0.2), state=state, lambda_=0.05)).model == "cold"


async def test_it_never_goes_on_with_a_model_that_errs_more() -> None:
    state = better_but_dearer(error=0.15)
    assert (await chosen(NO_AFFINITY, state=state, lambda_=0.001)).model == "plain"
    assert (await chosen(stuck_with(plain=0.9), state=state, lambda_=0.001)).model == "plain"


async def test_of_several_stuck_models_each_has_its_term_and_a_worse_one_the_largest() -> None:
    """By hand: 0.75 · 0.5 · 0.9 = 0.3375 for "plain", and more than the 0.75 · 0.1 · 0.8 of "cold" for all."""
    rows = await candidates(stuck_with(plain=0.5, cold=0.1, removed=0.9), state=better_but_dearer())
    assert [row["trajectory_error"] for row in rows.values()] == [pytest.approx(0.3375)] * 3


async def test_the_weight_scales_the_term_and_a_cached_prompt_still_counts() -> None:
    none = await candidates(stuck_with(cold=0.4), settings={"trajectory_weight": 0})
    assert {row["trajectory_error"] for row in none.values()} == {0}
    on_warm = replace(session(900), stuck=(("warm", 0.01),))
    assert (await chosen(on_warm)).model == "warm"


async def test_the_decision_shows_how_the_run_went() -> None:
    shown = selection_to_json(await chosen(stuck_with(cold=0.4)), STUCK)
    assert shown["trajectory"] == {"stuck": 0.8, "failed": 0.9, "repeated": 0.0, "reverted": 0.0, "turns": 5}
    assert selection_to_json(await chosen(NO_AFFINITY))["trajectory"] is None
