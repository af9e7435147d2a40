"""Who is chosen, why, in which order, and what happens when there is no time to look."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.errors import Forbidden, NothingAble, TooLong, Unavailable, UnknownName
from proxy.routing.assigning import Assigner, RoutingLate
from proxy.routing.choosing import Choice, choose
from proxy.routing.explaining import to_json
from proxy.routing.options import Options
from proxy.routing.request import ChatRequest
from proxy.settings import Settings
from proxy.state.records import ClientKey, StoredProfile
from proxy.state.snapshot import RoutingState, build_state
from proxy.state.stored import Stored
from router_core.types import Floats
from tests.support.makers import a_profile, a_record, surroundings

LONG = "A question that is long enough to be read without the turns before it, that is."
LIMITED = ClientKey("k1", "limited", "digest", 0.0, ("dear",))


class Corners:
    """Every text lies in the first corner. `hold` keeps it from answering."""

    id = "corners"
    dimension = 4

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()

    def embed(self, texts: Sequence[str]) -> Floats:
        self.free.wait(5)
        if texts == ["broken"]:
            raise ValueError("no such text")
        return np.tile(np.eye(4, dtype=np.float32)[0], (len(texts), 1))


def a_state(**abilities: Any) -> RoutingState:
    """cheap: 30 % errors at a five-hundredth of the price; dear: 10 %; unmeasured: neither."""
    prices = {"cheap": 1e-7, "dear": 5e-5, "unmeasured": 1e-7}
    records = {
        name: a_record(
            name, info={"input_cost_per_token": price, "output_cost_per_token": price, **abilities.get(name, {})}
        )
        for name, price in prices.items()
    }
    errors = {"cheap": 0.3, "dear": 0.1}
    profiles = {
        name: StoredProfile(records[name].fingerprint, a_profile([error] * 4)) for name, error in errors.items()
    }
    stored = Stored(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, surroundings(), keys_latched=False)


async def chosen(
    model: str = "auto",
    text: str = LONG,
    *,
    key: ClientKey | None = None,
    state: RoutingState | None = None,
    assigner: Assigner | None = None,
    settings: dict[str, Any] | None = None,
    explain: bool = False,
    body: dict[str, Any] | None = None,
    **options: Any,
) -> Choice:
    content = {"messages": [{"role": "user", "content": text}], **(body or {})}
    request = ChatRequest(content, model, False, False, Options(**options))
    found = Settings.model_validate({"data_dir": Path("/nowhere"), **(settings or {})})
    return await choose(request, key, state or a_state(), found, assigner or Assigner(Corners(), 1.0), explain=explain)


async def test_lambda_decides_between_errors_and_price() -> None:
    usual, best = await chosen(), await chosen(lambda_=0.0)

    assert (usual.model, usual.order, usual.reason) == ("cheap", ("cheap", "dear"), "scored")
    assert (best.model, best.order) == ("dear", ("dear", "cheap"))


@pytest.mark.parametrize(
    ("name", "model"), [("uniroute/best", "dear"), ("uniroute/cheap", "cheap"), ("uniroute/auto", "cheap")]
)
async def test_the_aliases_choose_as_they_say(name: str, model: str) -> None:
    assert (await chosen(name, lambda_=0.1)).model == model


async def test_a_route_name_is_routed_and_an_unknown_name_is_not_found() -> None:
    assert (await chosen("gpt-4o", settings={"route_names": ["gpt-4o"]})).reason == "scored"
    assert (await chosen("anything", settings={"route_names": ["*"]})).reason == "scored"
    with pytest.raises(UnknownName):
        await chosen("gpt-4o")


async def test_a_registered_name_is_served_as_named_even_unmeasured() -> None:
    choice = await chosen("unmeasured", settings={"route_names": ["*"]})

    assert (choice.model, choice.reason, choice.order) == ("unmeasured", "pinned", ("unmeasured",))
    assert (await chosen("unmeasured", fallbacks=True)).order == ("unmeasured", "cheap", "dear")


async def test_attempts_are_bounded_and_can_be_one() -> None:
    assert (await chosen(settings={"fallback_attempts": 1})).order == ("cheap",)
    assert (await chosen(fallbacks=False)).order == ("cheap",)


async def test_a_key_reaches_only_its_models() -> None:
    choice = await chosen(key=LIMITED)

    assert (choice.model, choice.reason, dict(choice.ineligible)) == ("dear", "only_candidate", {})
    for options in ({"model": "cheap"}, {"models": ("cheap",)}):
        with pytest.raises(Forbidden):
            await chosen(key=LIMITED, **options)


async def test_candidates_of_a_request_must_exist() -> None:
    assert (await chosen(models=("dear", "unmeasured"))).model == "dear"
    with pytest.raises(UnknownName):
        await chosen(models=("nobody",))


async def test_without_text_the_best_mean_error_answers() -> None:
    assert (await chosen(text="")).model == "dear"


async def test_late_or_failing_embedding_degrades_to_the_default_model() -> None:
    slow = Corners()
    slow.free.clear()
    late = await chosen(assigner=Assigner(slow, 0.01), settings={"default_model": "cheap"})
    slow.free.set()
    broken = await chosen(text="broken")

    assert (late.model, late.reason, late.order) == ("cheap", "degraded", ("cheap", "dear"))
    assert (broken.model, broken.reason) == ("dear", "degraded")


async def test_too_many_waiting_prompts_are_not_queued() -> None:
    assigner = Assigner(Corners(), 1.0)
    assigner._waiting = 10**6
    with pytest.raises(RoutingLate):
        await assigner.assign("x", a_state().cluster_map)


async def test_what_cannot_be_served_says_why() -> None:
    windows = {name: {"max_input_tokens": 100} for name in ("cheap", "dear")}
    with pytest.raises(TooLong, match="cheap: context window"):
        await chosen(text="word " * 1000, state=a_state(**windows))
    no_tools = {name: {"supports_function_calling": False} for name in ("cheap", "dear")}
    with pytest.raises(NothingAble, match="cheap: not known to call tools"):
        await chosen(state=a_state(**no_tools), body={"tools": [{}]})
    with pytest.raises(NothingAble, match="max_cost_usd"):
        await chosen(max_cost_usd=0.0)
    with pytest.raises(Unavailable, match="unmeasured: not profiled"):
        await chosen(models=("unmeasured",))
    with pytest.raises(Unavailable, match="no model is registered"):
        await chosen(key=ClientKey("k", "n", "d", 0.0, ()))


async def test_the_dry_run_shows_the_whole_decision() -> None:
    shown = to_json(await chosen(explain=True))

    assert [row["model"] for row in shown["candidates"]] == ["cheap", "dear"]
    assert shown["clusters"][0]["id"] == 0
    assert shown["ineligible"] == [{"model": "unmeasured", "why": "not profiled on this cluster map"}]
    assert 0 < shown["candidates"][1]["flips_at_lambda"] < shown["lambda"]


async def test_the_dry_run_of_a_pinned_name_shows_what_routing_would_say() -> None:
    shown = to_json(await chosen("unmeasured", explain=True))

    assert (shown["model"], shown["reason"]) == ("unmeasured", "pinned")
    assert [row["model"] for row in shown["candidates"]] == ["cheap", "dear"]


def only_unmeasured() -> RoutingState:
    record = a_record("new", info={"input_cost_per_token": 1e-7, "output_cost_per_token": 1e-7})
    return build_state(Stored(version=1, models={"new": record}, keys_exist=False), surroundings(), keys_latched=False)


async def test_the_default_model_answers_while_nothing_is_measured_yet() -> None:
    choice = await chosen(state=only_unmeasured(), settings={"default_model": "new"})
    assert (choice.model, choice.reason, choice.order) == ("new", "degraded", ("new",))


async def test_without_a_default_model_a_deployment_with_nothing_measured_says_so() -> None:
    with pytest.raises(Unavailable, match="new: not profiled"):
        await chosen(state=only_unmeasured())


async def test_the_default_model_stands_in_only_where_it_could_answer() -> None:
    with pytest.raises(Unavailable):
        await chosen(state=only_unmeasured(), settings={"default_model": "new"}, key=LIMITED)


async def test_the_stand_in_tells_a_limited_key_of_its_own_models_alone() -> None:
    names = ("new", "other", "secret")
    records = {name: a_record(name) for name in names}
    state = build_state(Stored(version=1, models=records, keys_exist=False), surroundings(), keys_latched=False)
    key = ClientKey("k", "team", "0a", 0.0, ("new", "other"))
    assert (await chosen(state=state, settings={"default_model": "new"}, key=key)).ineligible.keys() == {"other"}


async def test_a_key_states_lambda_where_the_request_does_not() -> None:
    best = ClientKey("k", "team", "0a", 0.0, lambda_default=0.0)
    assert [(await chosen(key=key)).model for key in (None, best)] == ["cheap", "dear"]
