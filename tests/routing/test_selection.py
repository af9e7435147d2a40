from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import Forbidden, ModelNotFound, ServiceUnavailable
from proxy.routing.agents import COMPACTION
from proxy.routing.assigner import AssignmentTimeout, ClusterAssigner
from proxy.routing.selection import selection_to_json
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import build_state
from proxy.storage.state_reader import StoredState
from tests.support.makers import a_record, snapshot_inputs
from tests.support.selections import LIMITED_KEY, Corners, a_state, chosen, only_unmeasured


async def test_lambda_decides_between_errors_and_price() -> None:
    usual, best = await chosen(), await chosen(lambda_=0.0)

    assert (usual.model, usual.candidates, usual.reason) == ("cheap", ("cheap", "dear"), "scored")
    assert (best.model, best.candidates) == ("dear", ("dear", "cheap"))


@pytest.mark.parametrize(
    ("name", "model"), [("uniroute/best", "dear"), ("uniroute/cheap", "cheap"), ("uniroute/auto", "cheap")]
)
async def test_the_aliases_choose_as_they_say(name: str, model: str) -> None:
    assert (await chosen(name, lambda_=0.1)).model == model


async def test_a_route_name_is_routed_and_an_unknown_name_is_not_found() -> None:
    assert (await chosen("gpt-4o", settings={"route_names": ["gpt-4o"]})).reason == "scored"
    assert (await chosen("anything", settings={"route_names": ["*"]})).reason == "scored"
    with pytest.raises(ModelNotFound):
        await chosen("gpt-4o")


async def test_a_registered_name_is_served_as_named_even_unmeasured() -> None:
    choice = await chosen("unmeasured", settings={"route_names": ["*"]})

    assert (choice.model, choice.reason, choice.candidates) == ("unmeasured", "pinned", ("unmeasured",))
    assert (await chosen("unmeasured", fallbacks=True)).candidates == ("unmeasured", "cheap", "dear")


@pytest.mark.parametrize(
    ("name", "clamp", "cap"),
    [("auto", "auto", 500), ("cheap", "auto", 9000), ("cheap", "on", 500), ("auto", "off", None)],
)
async def test_a_cap_is_lowered_for_routed_names_or_as_the_setting_says(name: str, clamp: str, cap: int | None) -> None:
    state = a_state(cheap={"max_output_tokens": 500}, dear={"max_output_tokens": 9000})
    choice = await chosen(name, state=state, body={"max_tokens": 9000}, settings={"clamp_max_tokens": clamp})

    assert choice.model == ("dear" if cap is None else "cheap")
    assert selection_to_json(choice)["max_tokens"] == {"stated": 9000, "sent": cap or 9000}


async def test_attempts_are_bounded_and_can_be_one() -> None:
    assert (await chosen()).max_attempts == 3
    assert (await chosen(settings={"fallback_attempts": 1})).max_attempts == 1
    assert (await chosen(fallbacks=False)).candidates == ("cheap",)


async def test_a_key_reaches_only_its_models() -> None:
    choice = await chosen(key=LIMITED_KEY)

    assert (choice.model, choice.reason, dict(choice.ineligible)) == ("dear", "only_candidate", {})
    for options in ({"model": "cheap"}, {"models": ("cheap",)}):
        with pytest.raises(Forbidden):
            await chosen(key=LIMITED_KEY, **options)


async def test_candidates_of_a_request_must_exist() -> None:
    assert (await chosen(models=("dear", "unmeasured"))).model == "dear"
    with pytest.raises(ModelNotFound):
        await chosen(models=("nobody",))


async def test_without_text_the_best_mean_error_answers() -> None:
    assert (await chosen(text="")).model == "dear"


async def test_a_late_or_failing_embedding_degrades_to_the_default_model() -> None:
    slow = Corners()
    slow.free.clear()
    late = await chosen(assigner=ClusterAssigner(slow, 0.01), settings={"default_model": "cheap"})
    slow.free.set()
    broken = await chosen(text="broken")

    assert (late.model, late.reason, late.candidates) == ("cheap", "degraded", ("cheap", "dear"))
    assert (broken.model, broken.reason) == ("dear", "degraded")


async def test_too_many_waiting_prompts_are_not_queued() -> None:
    assigner = ClusterAssigner(Corners(), 1.0)
    assigner._queued = 10**6
    with pytest.raises(AssignmentTimeout):
        await assigner.assign("x", a_state().cluster_map)


async def test_the_dry_run_shows_the_whole_decision() -> None:
    decision = selection_to_json(await chosen(explain=True))

    assert [row["model"] for row in decision["candidates"]] == ["cheap", "dear"]
    assert decision["clusters"][0]["id"] == 0
    assert decision["ineligible"] == [{"model": "unmeasured", "why": "not profiled on this cluster map"}]
    assert 0 < decision["candidates"][1]["flips_at_lambda"] < decision["lambda"]


async def test_the_dry_run_of_a_pinned_name_shows_what_routing_would_say() -> None:
    decision = selection_to_json(await chosen("unmeasured", explain=True))

    assert (decision["model"], decision["reason"]) == ("unmeasured", "pinned")
    assert [row["model"] for row in decision["candidates"]] == ["cheap", "dear"]


async def test_the_default_model_answers_while_nothing_is_measured_yet() -> None:
    choice = await chosen(state=only_unmeasured(), settings={"default_model": "new"})
    assert (choice.model, choice.reason, choice.candidates) == ("new", "degraded", ("new",))


async def test_without_a_default_model_a_deployment_with_nothing_measured_says_so() -> None:
    with pytest.raises(ServiceUnavailable, match="new: not profiled"):
        await chosen(state=only_unmeasured())


async def test_the_default_model_stands_in_only_where_it_could_answer() -> None:
    with pytest.raises(ServiceUnavailable):
        await chosen(state=only_unmeasured(), settings={"default_model": "new"}, key=LIMITED_KEY)


async def test_the_stand_in_tells_a_limited_key_of_its_own_models_alone() -> None:
    names = ("new", "other", "secret")
    records = {name: a_record(name) for name in names}
    state = build_state(StoredState(version=1, models=records, keys_exist=False), snapshot_inputs(), keys_latched=False)
    key = ClientKey("k", "team", "0a", 0.0, ("new", "other"))
    assert (await chosen(state=state, settings={"default_model": "new"}, key=key)).ineligible.keys() == {"other"}


async def test_a_key_states_lambda_where_the_request_does_not() -> None:
    best = ClientKey("k", "team", "0a", 0.0, lambda_default=0.0)
    assert [(await chosen(key=key)).model for key in (None, best)] == ["cheap", "dear"]


async def test_housekeeping_goes_to_the_cheapest_model_whatever_the_default_is() -> None:
    best = {"lambda": 0}
    asked, kept = await chosen(settings=best), await chosen(settings=best, housekeeping="title")

    assert (asked.model, asked.reason) == ("dear", "scored")
    assert (kept.model, kept.reason, kept.candidates) == ("cheap", "housekeeping", ("cheap", "dear"))
    assert selection_to_json(kept)["reason"] == "housekeeping"


async def test_a_compaction_is_routed_as_any_request() -> None:
    choice = await chosen(settings={"lambda": 0}, housekeeping=COMPACTION)

    assert (choice.model, choice.reason) == ("dear", "scored")


async def test_the_text_of_housekeeping_is_not_assessed() -> None:
    choice = await chosen(text="broken", housekeeping="title")

    assert (choice.reason, choice.degraded_reason) == ("housekeeping", None)
    assert selection_to_json(choice)["clusters"] == []


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("dear", {}, "pinned"),
        ("uniroute/best", {}, "scored"),
        ("auto", {"lambda_": 0.0}, "scored"),
        ("auto", {"settings": {"lambda": 0, "housekeeping": "off"}}, "scored"),
        ("auto", {"settings": {"lambda": 0}, "key": ClientKey("k", "k", "digest", 0.0, lambda_max=0.5)}, "scored"),
        ("uniroute/exact", {"settings": {"presets": {"exact": {"lambda": 0}}}}, "scored"),
    ],
)
async def test_housekeeping_keeps_a_lambda_that_is_stated(model: str, options: dict[str, Any], reason: str) -> None:
    choice = await chosen(model, housekeeping="title", **options)

    assert (choice.model, choice.reason) == ("dear", reason)


async def test_a_preset_without_lambda_sends_housekeeping_to_the_cheapest_of_its_models() -> None:
    settings = {"lambda": 0, "presets": {"all": {"models": ["cheap", "dear"]}}}
    choice = await chosen("uniroute/all", housekeeping="title", settings=settings)

    assert (choice.model, choice.reason) == ("cheap", "housekeeping")
