"""The efforts of a model as candidates: bounded by the caller, allowed with their model, and in one circuit with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxy.errors import BadRequest, Forbidden, NoEligibleModelError
from proxy.routing.affinity import Affinity
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.requirements import effort_bound, with_effort
from proxy.routing.selection import Selection, select_model
from proxy.routing.selection_context import SelectionContext
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.records import StoredProfile
from proxy.storage.sessions import LastTurn
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from proxy.storage.variants import variants_of
from tests.support.makers import PRICED, a_profile, a_record, snapshot_inputs
from tests.support.selections import LONG, Corners, chosen

ERRORS = {"thinker@low": 0.3, "thinker@medium": 0.2, "thinker@high": 0.1, "other": 0.25}
AT_ANY_PRICE = {"lambda": 0}
UNMEASURED: dict[str, float] = {}


def a_state(errors: dict[str, float] | None = None) -> RoutingSnapshot:
    """Build a model with three efforts, the better the more it thinks, and another one."""
    thinker = a_record("thinker", info={**PRICED, "effort": ["low", "medium", "high"]})
    records = {"thinker": thinker, "other": a_record("other", info={**PRICED, "supports_reasoning": True})}
    known = {**records, **{each.name: each for each in variants_of(thinker, None)}}
    profiles = {
        name: StoredProfile(known[name].fingerprint, a_profile([error] * 4))
        for name, error in (ERRORS if errors is None else errors).items()
    }
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, snapshot_inputs(), keys_latched=False)


async def choice(model: str = "auto", **more: Any) -> Selection:
    return await chosen(model, state=a_state(), settings=AT_ANY_PRICE, **more)


async def continued(affinity: Affinity, **more: Any) -> Selection:
    body = {"messages": [{"role": "user", "content": LONG}], **more.pop("body", {})}
    request = ChatRequest(body, "auto", False, False, RoutingOptions())
    stated = {"data_dir": Path("/nowhere"), **AT_ANY_PRICE, **more.pop("settings", {})}
    settings = Settings.model_validate(stated)
    ctx = SelectionContext("dec-1", request, None, a_state(), settings, affinity=affinity, **more)
    return await select_model(ctx, ClusterAssigner(Corners(), 1.0))


@pytest.mark.parametrize(
    ("stated", "tokens"),
    [
        ({}, None),
        ({"reasoning_effort": None}, None),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "low"}, 4095),
        ({"reasoning_effort": "of my own"}, None),
        ({"reasoning": {"effort": "medium"}}, 16383),
        ({"reasoning": {"enabled": False}}, 0),
        ({"reasoning": {"max_tokens": 3000}}, 3000),
        ({"reasoning": {"enabled": True}}, None),
        ({"thinking": {"type": "disabled"}}, 0),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, 5000),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}, "reasoning_effort": "low"}, 4095),
        ({"enable_thinking": False}, 0),
        ({"thinking_budget": 700}, 700),
        ({"thinking_budget": 0}, 0),
        ({"thinking_budget": -1}, None),
        ({"reasoning": {"max_tokens": 0}}, 0),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, 0),
    ],
)
def test_what_a_body_says_of_thinking_is_read_as_a_bound_of_tokens(stated: Any, tokens: int | None) -> None:
    assert effort_bound({"model": "auto", **stated}) == tokens


@pytest.mark.parametrize(
    ("stated", "effort", "sent"),
    [
        ({"reasoning_effort": "high", "thinking": {"type": "enabled"}}, "low", {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": "high"}}, "low", {"reasoning_effort": "low"}),
        (
            {"reasoning": {"effort": "high", "exclude": True}},
            "low",
            {"reasoning": {"exclude": True, "effort": "low"}},
        ),
        ({"temperature": 0.2}, 4096, {"thinking": {"type": "enabled", "budget_tokens": 4096}}),
        (
            {"max_tokens": 3000},
            4096,
            {"max_tokens": 3000, "thinking": {"type": "enabled", "budget_tokens": 1500}},
        ),
        ({"max_tokens": 500}, 4096, {"max_tokens": 500, "thinking": {"type": "disabled"}}),
        ({"tool_choice": "required"}, 4096, {"tool_choice": "required", "thinking": {"type": "disabled"}}),
    ],
)
def test_the_chosen_effort_is_sent_in_place_of_the_bound(stated: Any, effort: Any, sent: Any) -> None:
    assert with_effort({"model": "auto", **stated}, effort) == {"model": "auto", **sent}


@pytest.mark.parametrize(
    ("carried", "thinks"),
    [({}, False), ({"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]}, True)],
)
def test_no_budget_is_sent_where_a_call_comes_back_without_its_thinking(carried: dict[str, Any], thinks: bool) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": None, "tool_calls": [call], **carried},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    ended = [*turns, {"role": "assistant", "content": "It is x."}, turns[0]]
    asked = [with_effort({"messages": each}, 4096)["thinking"] for each in (turns, [*turns, turns[0]], ended)]
    assert [each["type"] == "enabled" for each in asked] == [thinks, thinks, True]


async def test_without_a_bound_every_effort_is_a_candidate_and_the_model_itself_is_none() -> None:
    selection = await choice()
    assert (selection.model, selection.effort) == ("thinker@high", "high")
    assert set(selection.candidates) == set(ERRORS)
    assert dict(selection.ineligible) == {}


async def test_efforts_above_the_callers_own_are_no_candidates_and_no_fallbacks() -> None:
    selection = await choice(body={"reasoning_effort": "medium"})
    assert set(selection.candidates) == set(ERRORS) - {"thinker@high"}


@pytest.mark.parametrize("stated", ["none", "minimal"])
async def test_a_bound_below_all_leaves_the_smallest(stated: str) -> None:
    selection = await choice("thinker", body={"reasoning_effort": stated})
    assert tuple(selection.candidates) == ("thinker@low",)


@pytest.mark.parametrize(
    ("stated", "param"),
    [
        ({"reasoning_effort": "LOW"}, "reasoning_effort"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"reasoning": {"effort": "ultra"}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": "2048"}}, "reasoning.max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1.5}}, "thinking.budget_tokens"),
        ({"thinking_budget": True}, "thinking_budget"),
    ],
)
async def test_an_effort_that_is_not_known_is_refused_where_another_would_be_sent_in_its_place(
    stated: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        await choice("thinker", body=stated)
    assert refused.value.param == param
    assert (await choice("other", body=stated)).model == "other"


@pytest.mark.parametrize("stated", [None, "", "auto", "default"])
async def test_an_effort_that_is_left_to_the_model_is_no_bound(stated: str | None) -> None:
    assert set((await choice("thinker", body={"reasoning_effort": stated})).candidates) == set(ERRORS) - {"other"}


async def test_a_list_of_efforts_above_the_callers_own_is_the_callers_error() -> None:
    with pytest.raises(NoEligibleModelError, match="thinks more than the effort that the request states"):
        await choice(body={"reasoning_effort": "low"}, models=("thinker@high",))


async def test_a_model_that_is_named_answers_by_its_efforts_alone_unless_fallbacks_are_wanted() -> None:
    assert set((await choice("thinker")).candidates) == set(ERRORS) - {"other"}
    selection = await choice("thinker", fallbacks=True)
    assert selection.candidates[0] == "thinker@high"
    assert selection.candidates[-1] == "other"


async def test_a_model_of_which_no_effort_is_measured_is_asked_as_it_is() -> None:
    selection = await chosen("thinker", state=a_state(UNMEASURED))
    assert (selection.model, selection.reason, selection.effort) == ("thinker", "pinned", None)
    selection = await chosen("auto", state=a_state(UNMEASURED), settings={"default_model": "thinker"})
    assert (selection.model, selection.reason) == ("thinker", "degraded")


async def test_a_named_effort_goes_no_further_than_the_bound() -> None:
    selection = await choice("thinker@high", body={"reasoning_effort": "low"})
    assert (selection.model, selection.reason) == ("thinker@low", "pinned")


async def test_a_key_for_a_model_opens_its_efforts_and_one_for_an_effort_that_alone() -> None:
    whole = ClientKey("k1", "whole", "d", 0.0, ("thinker",))
    assert set((await choice(key=whole)).candidates) == set(ERRORS) - {"other"}
    one = ClientKey("k2", "one", "d", 0.0, ("thinker@low",))
    assert tuple((await choice(key=one)).candidates) == ("thinker@low",)
    with pytest.raises(Forbidden):
        await choice("thinker@high", key=one)
    highest = ClientKey("k3", "highest", "d", 0.0, ("thinker@high",))
    with pytest.raises(Forbidden, match="thinker@low"):
        await choice("thinker@high", key=highest, body={"reasoning_effort": "low"})


async def test_a_preset_of_a_model_means_its_efforts() -> None:
    settings = {"presets": {"thoughtful": {"models": ["thinker"], "lambda": 0}}}
    assert (await chosen("uniroute/thoughtful", state=a_state(), settings=settings)).model == "thinker@high"


async def test_the_efforts_of_a_model_rest_together() -> None:
    selection = await continued(Affinity(), cooling_down={"thinker": 5.0})
    assert tuple(selection.candidates) == ("other",)
    assert set(selection.ineligible) == set(ERRORS) - {"other"}


async def test_a_conversation_stays_with_its_model_when_the_caller_asks_for_less_effort() -> None:
    reasoned = Affinity(has_reasoning=True, producer="thinker@high")
    assert (await continued(reasoned)).model == "thinker@high"
    less = await continued(reasoned, body={"reasoning_effort": "low"})
    assert (less.model, less.reason, less.lost_affinity) == ("thinker@low", "sticky", None)


@pytest.mark.parametrize(
    "producer", ["thinker", "thinker@max"], ids=["before its efforts were measured", "an effort less"]
)
@pytest.mark.parametrize(("stated", "model"), [({}, "thinker@high"), ({"reasoning_effort": "low"}, "thinker@low")])
async def test_a_conversation_stays_with_its_model_when_its_efforts_have_changed(
    producer: str, stated: dict[str, Any], model: str
) -> None:
    for resting in ({}, {"thinker": 5.0}):
        selection = await continued(Affinity(producer=producer), body=stated, cooling_down=resting)
        assert (selection.model, selection.reason, selection.lost_affinity) == (model, "sticky", None)
    session = await continued(
        Affinity(last_turn=LastTurn(producer, 10, 1.0)), body=stated, settings={"sticky_sessions": "on"}
    )
    assert (session.model, session.reason) == (model, "sticky")


async def test_a_conversation_stays_with_its_model_when_that_has_no_efforts_any_more() -> None:
    selection = await continued(Affinity(producer="other@high"))
    assert (selection.model, selection.reason, selection.lost_affinity) == ("other", "sticky", None)


async def test_a_session_stays_with_its_model_when_the_caller_asks_for_less_effort() -> None:
    session = Affinity(last_turn=LastTurn("thinker@high", 10, 1.0))
    less = await continued(session, body={"reasoning_effort": "low"}, settings={"sticky_sessions": "on"})
    assert (less.model, less.reason) == ("thinker@low", "sticky")
