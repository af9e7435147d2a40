from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxy.errors import ContextLengthExceeded, Forbidden, ModelNotFound, NoEligibleModelError, ServiceUnavailable
from proxy.routing.chat_request import ChatRequest, ProviderPreferences, RoutingOptions
from proxy.routing.selection_context import SelectionContext, no_candidate_error
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.records import StoredProfile
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from router_core.eligibility import eligible
from tests.support.makers import a_profile, a_record, snapshot_inputs
from tests.support.selections import LIMITED_KEY, LONG, a_state, chosen, only_unmeasured

UNCLAMPED = {"clamp_max_tokens": "off"}


def lacking(**info: Any) -> RoutingSnapshot:
    return a_state(cheap=info, dear=info)


async def refusal(**request: Any) -> str:
    with pytest.raises(NoEligibleModelError) as refused:
        await chosen(**request)
    return refused.value.message


async def test_a_request_that_cannot_be_served_says_why() -> None:
    with pytest.raises(ContextLengthExceeded, match="cheap: context window below about 1253 prompt tokens"):
        await chosen(text="word " * 1000, state=lacking(max_input_tokens=100))
    with pytest.raises(ContextLengthExceeded, match="and 900 of an answer"):
        await chosen(state=lacking(max_input_tokens=910), body={"max_tokens": 900}, settings=UNCLAMPED)
    assert "max_cost_usd" in await refusal(max_cost_usd=0.0)
    with pytest.raises(ServiceUnavailable, match="unmeasured: not profiled"):
        await chosen(models=("unmeasured",))
    with pytest.raises(ServiceUnavailable, match="no model is registered"):
        await chosen(key=ClientKey("k", "n", "d", 0.0, ()))


async def test_what_no_model_could_take_is_refused_at_once_while_none_is_measured() -> None:
    small = only_unmeasured(max_input_tokens=1000, supports_vision=False)
    image = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    with pytest.raises(ContextLengthExceeded, match="new: context window below about 1253 prompt tokens"):
        await chosen(text="word " * 1000, state=small, settings={"default_model": "new"})
    with pytest.raises(ContextLengthExceeded):
        await chosen(text="word " * 1000, state=small)
    assert "new: cannot read images" in await refusal(
        state=small, body={"messages": [{"role": "user", "content": image}]}, settings={"default_model": "new"}
    )


async def test_a_need_that_nobody_meets_is_named_with_where_it_was_asked_for() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}
    state = a_state(cheap={"supports_vision": False}, dear={"supports_vision": False, "max_output_tokens": 10})
    body = {"messages": [{"role": "user", "content": LONG}, image], "max_tokens": 11}

    assert await refusal(state=state, body=body, settings=UNCLAMPED) == (
        "no model can take this request, which needs a model to read images (messages[1] has image_url) ("
        "cheap: cannot read images; dear: cannot answer with 11 tokens, cannot read images; "
        "unmeasured: not profiled on this cluster map)"
    )


async def test_a_limit_that_no_answer_of_any_model_has_is_not_told_as_a_long_prompt() -> None:
    assert "cannot answer with 1000 tokens" in await refusal(
        state=lacking(max_output_tokens=10), body={"max_tokens": 1000}, settings=UNCLAMPED
    )


async def test_a_refusal_names_no_model_that_the_caller_may_not_use() -> None:
    key = ClientKey("k1", "limited", "digest", 0.0, ("cheap",))
    body: dict[str, Any] = {"tools": [{}]}
    message = await refusal(state=lacking(supports_function_calling=False), key=key, body=body)
    narrowed = await refusal(state=lacking(supports_function_calling=False), models=("cheap",), body=body)

    assert "cheap: cannot call tools" in message
    assert not {"dear", "unmeasured"} & set(message.replace(":", " ").split())
    assert message == narrowed


async def test_a_refusal_over_many_models_stays_short() -> None:
    priced = {"input_cost_per_token": 1e-7, "output_cost_per_token": 1e-7, "supports_function_calling": False}
    records = {name: a_record(name, info=priced) for name in (f"{place:03}" + "m" * 125 for place in range(500))}
    profiles = {name: StoredProfile(record.fingerprint, a_profile()) for name, record in records.items()}
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    state = build_state(stored, snapshot_inputs(), keys_latched=False)
    message = await refusal(state=state, body={"tools": [{}]})

    assert len(message) < 3000
    assert message.endswith("; and 490 more)")


async def test_a_refusal_says_that_the_able_models_cool_down() -> None:
    ctx = a_context(a_state())
    error = no_candidate_error(ctx, eligible(ctx.snapshot.pool, ctx.requirements, cooling_down={"cheap", "dear"}))

    assert isinstance(error, ServiceUnavailable)
    assert "rests after failures (cheap: resting after failures; dear: resting" in error.message


def a_context(snapshot: RoutingSnapshot) -> SelectionContext:
    request = ChatRequest({"messages": [{"role": "user", "content": LONG}]}, "auto", False, False, RoutingOptions())
    return SelectionContext("dec-1", request, None, snapshot, Settings.model_validate({"data_dir": Path("/nowhere")}))


async def test_openrouters_lists_name_models_here() -> None:
    assert (await chosen(provider=ProviderPreferences(only=("dear",)))).candidates == ("dear",)
    assert (await chosen(provider=ProviderPreferences(ignore=("cheap", "openai")))).candidates == ("dear",)
    assert (
        await chosen(models=("cheap", "dear"), provider=ProviderPreferences(only=("dear", "unmeasured")))
    ).candidates == ("dear",)
    with pytest.raises(ModelNotFound, match=r"provider\.only"):
        await chosen(provider=ProviderPreferences(only=("nobody",)))
    with pytest.raises(Forbidden):
        await chosen(key=LIMITED_KEY, provider=ProviderPreferences(only=("cheap",)))
    for provider in (ProviderPreferences(only=()), ProviderPreferences(only=("dear",), ignore=("dear",))):
        assert "leave no model" in await refusal(provider=provider)


async def test_ignoring_a_model_opens_none_that_the_key_may_not_use() -> None:
    assert (await chosen(key=LIMITED_KEY, provider=ProviderPreferences(ignore=("unmeasured",)))).candidates == ("dear",)
    assert "leave no model" in await refusal(key=LIMITED_KEY, provider=ProviderPreferences(ignore=("dear",)))


async def test_a_price_cap_rules_out_more_expensive_models() -> None:
    assert (await chosen(lambda_=0.0, provider=ProviderPreferences(max_output_cost_per_token=1e-6))).candidates == (
        "cheap",
    )
    message = await refusal(provider=ProviderPreferences(max_input_cost_per_token=1e-8))
    assert "cheap: input price above 0.01 USD per million tokens" in message


async def test_reasons_for_ineligibility_are_worked_out_when_asked_for() -> None:
    choice = await chosen()
    assert choice.decision is not None
    kept = vars(choice.decision.eligibility)

    assert "reasons" not in kept
    assert dict(choice.ineligible) == {"unmeasured": "not profiled on this cluster map"} == kept["reasons"]


async def test_a_default_model_shows_no_model_that_the_key_may_not_use() -> None:
    priced = {"input_cost_per_token": 1e-7, "output_cost_per_token": 1e-7}
    records = {name: a_record(name, info=priced) for name in ("new", "old", "secret")}
    state = build_state(StoredState(version=1, models=records, keys_exist=False), snapshot_inputs(), keys_latched=False)
    key = ClientKey("k", "n", "d", 0.0, ("new", "old"))
    choice = await chosen(state=state, settings={"default_model": "new"}, key=key)

    assert list(choice.ineligible) == ["old"]
