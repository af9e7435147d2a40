"""A paused model takes no traffic that was not sent to it by name, and by name it says that it is paused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.errors import ModelPaused, NotProfiled
from proxy.routing.affinity import Affinity
from proxy.storage.client_keys import ClientKey
from proxy.storage.controls import Pause
from proxy.storage.records import StoredProfile
from proxy.storage.sessions import LastTurn
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from tests.routing.test_apply_affinity import chosen as continued
from tests.support.makers import a_profile, a_record, snapshot_inputs
from tests.support.selections import chosen

PRICED = {"input_cost_per_token": 1e-7, "output_cost_per_token": 1e-7}
# Mean error; None: not measured.
ERRORS = {"best": 0.1, "middle": 0.2, "worst": 0.3, "unmeasured": None}
PRICES = {"best": 5e-5, "middle": 1e-6, "worst": 1e-7, "unmeasured": 1e-7}
RESUMES = 'PATCH /admin/models/best with {"paused": false} lets it go on'


def paused(*names: str, **errors: float | None) -> RoutingSnapshot:
    """Build the models above, some of them paused."""
    known = {**ERRORS, **errors}
    records = {
        name: a_record(name, info={"input_cost_per_token": price, "output_cost_per_token": price})
        for name, price in PRICES.items()
    }
    profiles = {
        name: StoredProfile(records[name].fingerprint, a_profile([error] * 4))
        for name, error in known.items()
        if error is not None
    }
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    pauses = {name: Pause(1.0, "root") for name in names}
    return build_state(replace(stored, paused=pauses), snapshot_inputs(), keys_latched=False)


@pytest.mark.parametrize(
    ("model", "without", "instead"),
    [("uniroute/best", "best", "middle"), ("uniroute/cheap", "worst", "middle"), ("auto", "middle", "worst")],
)
async def test_no_way_of_routing_chooses_it(model: str, without: str, instead: str) -> None:
    assert (await chosen(model, state=paused())).model == without
    choice = await chosen(model, state=paused(without))
    assert choice.model == instead
    assert without not in choice.candidates
    assert choice.ineligible[without] == (
        f'paused; PATCH /admin/models/{without} with {{"paused": false}} lets it go on'
    )


async def test_it_is_no_default_model_and_no_baseline_and_no_fallback() -> None:
    new = paused("unmeasured", **dict.fromkeys(ERRORS))
    with pytest.raises(NotProfiled, match="unmeasured: paused; PATCH"):
        await chosen(state=new, settings={"default_model": "unmeasured"})
    degraded = await chosen(text="broken", state=paused("best"), settings={"default_model": "best"})
    assert (degraded.reason, degraded.model) == ("degraded", "middle")
    assert paused("best").pool.best_on_average() == "middle"
    pinned = await chosen("worst", state=paused("best"), fallbacks=True)
    assert pinned.candidates == ("worst", "middle")


async def test_asked_by_its_name_it_says_that_it_is_paused_and_what_ends_that() -> None:
    with pytest.raises(ModelPaused) as refused:
        await chosen("best", state=paused("best"))
    assert refused.value.message == f"the model 'best' is paused; {RESUMES}"
    assert refused.value.headers == {"x-should-retry": "false"}
    with pytest.raises(ModelPaused):
        await chosen("best", state=paused("best"), explain=True)
    with pytest.raises(ModelPaused):
        await chosen("best", state=paused("best"), fallbacks=False)


async def test_asked_by_its_name_with_fallbacks_the_best_of_the_others_answers() -> None:
    choice = await chosen("best", state=paused("best"), fallbacks=True)
    assert (choice.model, choice.reason) == ("middle", "fallback")
    assert choice.candidates == ("middle", "worst")
    assert (await chosen("best", state=paused("best"), fallbacks=True, lambda_=1000.0)).model == "worst"
    key = ClientKey("k", "n", "d", 0.0, ("best",))
    with pytest.raises(ModelPaused, match="'best'"):
        await chosen("best", state=paused("best"), fallbacks=True, key=key)


async def test_an_error_says_so_if_all_models_are_paused() -> None:
    with pytest.raises(ModelPaused, match=r"every model that this request may use is paused \(best: paused; PATCH"):
        await chosen(state=paused(*PRICES))
    with pytest.raises(ModelPaused, match=r"every measured model .* is paused .*unmeasured: not profiled"):
        await chosen(state=paused("best", "middle", "worst"))
    with pytest.raises(ModelPaused, match="every model"):
        await chosen(state=paused("best"), models=("best",))
    with pytest.raises(NotProfiled):
        await chosen(state=paused("best"), models=("unmeasured",))


async def test_a_refusal_names_no_paused_model_that_the_key_may_not_use() -> None:
    key = ClientKey("k", "n", "d", 0.0, ("middle",))
    with pytest.raises(ModelPaused) as refused:
        await chosen(state=paused(*PRICES), key=key)
    assert "middle: paused" in refused.value.message
    assert "best" not in refused.value.message


def shared(*names: str) -> RoutingSnapshot:
    """Build the models of the conversations' tests, some of them paused."""
    cached = {"cache_read_input_token_cost": 1e-9}
    records = {name: a_record(name, info={**PRICED, **cached}) for name in ("cold", "warm", "plain", "unmeasured")}
    profiles = {
        name: StoredProfile(record.fingerprint, a_profile([0.2] * 4))
        for name, record in records.items()
        if name != "unmeasured"
    }
    pauses = {name: Pause(1.0) for name in names}
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False, paused=pauses)
    return build_state(stored, snapshot_inputs(), keys_latched=False)


@pytest.mark.parametrize("reasoning", [False, True])
async def test_a_conversation_moves_away_from_it_as_from_a_model_that_rests(reasoning: bool) -> None:
    loop = Affinity(producer="plain", has_reasoning=reasoning)
    moved = await continued(loop, state=shared("plain"))
    assert (moved.lost_affinity, moved.reason) == ("plain", "scored")
    assert moved.model != "plain"
    assert moved.ineligible["plain"].startswith("paused")
    kept = await continued(loop, state=shared())
    assert (kept.model, kept.reason) == ("plain", "sticky")
    unmeasured = await continued(Affinity(producer="unmeasured"), state=shared("unmeasured"))
    assert unmeasured.lost_affinity == "unmeasured"


async def test_a_session_leaves_it_too() -> None:
    session = Affinity(session="s", last_turn=LastTurn("warm", 900, 1.0))
    for mode in ("auto", "on"):
        settings = {"sticky_sessions": mode}
        assert (await continued(session, state=shared(), settings=settings)).model == "warm"
        assert (await continued(session, state=shared("warm"), settings=settings)).model != "warm"
