from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.native_api import OWN_REASONING_PREFIX, OWN_SIGNATURE_PREFIX
from proxy.upstream.native_body import native_body
from tests.support.makers import a_record

OPUS = "claude-opus-4-8"
HAIKU = "claude-haiku-4-5"
SIGNED = {"type": "thinking", "thinking": "Hm.", "signature": "EqQBCkgIBhAB"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {}}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}]}
HELLO = {"role": "user", "content": "hi"}
CLEAR = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


def claude(name: str = OPUS, info: dict[str, Any] | None = None, **params: Any) -> ModelRecord:
    record = replace(a_record("ours", info=info or {}), resolved=ResolvedProvider("translate", name, "anthropic"))
    return replace(record, litellm_params={"model": f"anthropic/{name}", **params})


def gpt(name: str = "gpt-5", info: dict[str, Any] | None = None, **params: Any) -> ModelRecord:
    resolved = ResolvedProvider("relay", name, "openai", "https://api.openai.com/v1")
    record = replace(a_record("ours", info=info or {}), resolved=resolved)
    return replace(record, litellm_params={"model": f"openai/{name}", **params})


def unknown(**info: Any) -> ModelRecord:
    return a_record("ours", info=info, model="hosted_vllm/own-model")


def messages(record: ModelRecord, *turns: Any, limit: int | None = None, **fields: Any) -> dict[str, Any]:
    document = {"model": "auto", "max_tokens": 64000, "messages": list(turns) or [HELLO], **fields}
    before = json.dumps(document)
    body = native_body("messages", document, record, max_output_tokens=limit)
    assert json.dumps(document) == before
    return body


def responses(record: ModelRecord, *items: Any, limit: int | None = None, **fields: Any) -> dict[str, Any]:
    document = {"model": "auto", "input": list(items) or "hi", **fields}
    before = json.dumps(document)
    body = native_body("responses", document, record, max_output_tokens=limit)
    assert json.dumps(document) == before
    return body


def test_a_body_that_the_model_can_take_is_sent_as_it_is() -> None:
    fields: dict[str, Any] = {
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": CLEAR,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1"}],
        "metadata": {"user_id": "x"},
        "unknown_field": [1],
    }
    turns = (HELLO, {"role": "system", "content": "Mind."}, {"role": "assistant", "content": [SIGNED, CALL]}, RESULT)

    assert messages(claude(), *turns, **fields) == {
        "model": "auto",
        "max_tokens": 64000,
        "messages": list(turns),
        **fields,
    }


def test_what_is_not_known_of_a_model_changes_nothing() -> None:
    fields: dict[str, Any] = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}, "temperature": 0.1}

    assert messages(unknown(), {"role": "system", "content": "x"}, **fields).items() >= fields.items()
    assert responses(unknown(), reasoning={"effort": "minimal"})["reasoning"] == {"effort": "minimal"}


@pytest.mark.parametrize(
    ("limit", "stated", "sent"), [(None, 9, 9), (100, 9, 9), (5, 9, 5), (5, None, 5), (5, True, 5)]
)
def test_the_limit_of_the_answer_is_only_lowered(limit: int | None, stated: Any, sent: int) -> None:
    assert messages(claude(), limit=limit, max_tokens=stated)["max_tokens"] == sent
    assert responses(gpt(), limit=limit, max_output_tokens=stated)["max_output_tokens"] == sent


def test_adaptive_thinking_becomes_a_budget_below_the_limit_where_the_model_knows_no_other() -> None:
    asked: dict[str, Any] = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high", "format": {"a": 1}}}

    body = messages(claude(HAIKU), **asked)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 16384}
    assert body["output_config"] == {"format": {"a": 1}}
    assert messages(claude(HAIKU), **asked, limit=4000)["thinking"]["budget_tokens"] == 2000
    assert messages(claude(HAIKU), **asked, limit=1500)["thinking"]["budget_tokens"] == 1024


def test_thinking_that_has_no_room_is_left_out_with_the_edits_of_it() -> None:
    body = messages(claude(HAIKU), thinking={"type": "adaptive"}, context_management=CLEAR, limit=1024)

    assert {"thinking", "context_management"}.isdisjoint(body)


@pytest.mark.parametrize(("budget", "effort"), [(31999, "high"), (32000, "xhigh"), (5000, "medium"), (1024, "low")])
def test_a_budget_becomes_an_effort_where_the_model_takes_no_budget(budget: int, effort: str) -> None:
    body = messages(claude(OPUS), thinking={"type": "enabled", "budget_tokens": budget})

    assert (body["thinking"], body["output_config"]) == ({"type": "adaptive"}, {"effort": effort})


def test_a_budget_stays_where_the_model_takes_either() -> None:
    thinking = {"type": "enabled", "budget_tokens": 5000}

    assert messages(claude("claude-opus-4-6"), thinking=thinking)["thinking"] == thinking


@pytest.mark.parametrize(
    ("name", "effort", "sent"),
    [
        (OPUS, "xhigh", "xhigh"),
        ("claude-sonnet-4-6", "xhigh", "high"),
        ("claude-sonnet-4-6", "max", "max"),
        ("claude-opus-4-5", "max", "high"),
        ("claude-opus-4-5", "low", "low"),
    ],
)
def test_an_effort_that_the_model_does_not_know_is_the_next_weaker(name: str, effort: str, sent: str) -> None:
    assert messages(claude(name), output_config={"effort": effort})["output_config"] == {"effort": sent}


@pytest.mark.parametrize("record", [claude(info={"supports_reasoning": False}), unknown(supports_reasoning=False)])
def test_a_model_without_reasoning_is_asked_for_none(record: ModelRecord) -> None:
    edits = [*CLEAR["edits"], {"type": "clear_tool_uses_20250919"}]
    asked: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "low"}}
    body = messages(
        record,
        HELLO,
        {"role": "assistant", "content": [SIGNED, CALL]},
        RESULT,
        **asked,
        context_management={"edits": edits},
    )

    assert {"thinking", "output_config"}.isdisjoint(body)
    assert body["context_management"] == {"edits": edits[1:]}
    assert body["messages"][1]["content"] == [CALL]


def test_thinking_that_cannot_be_switched_off_is_left_to_the_model() -> None:
    assert "thinking" not in messages(claude("claude-mythos-5"), thinking={"type": "disabled"})
    assert "thinking" in messages(claude(OPUS), thinking={"type": "disabled"})


def test_a_budget_is_not_asked_for_where_another_model_began_the_calls_of_tools() -> None:
    """Anthropic refuses a turn with calls that does not begin with thinking, if thinking has a budget."""
    foreign = {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, CALL]}
    own = {"role": "assistant", "content": [SIGNED, CALL]}
    thinking = {"type": "enabled", "budget_tokens": 2000}

    assert "thinking" not in messages(claude(HAIKU), HELLO, foreign, RESULT, thinking=thinking)
    assert "thinking" in messages(claude(HAIKU), HELLO, own, RESULT, thinking=thinking)
    assert "thinking" in messages(claude(OPUS), HELLO, foreign, RESULT, thinking={"type": "adaptive"})


def test_sampling_is_left_to_models_that_refuse_to_be_told() -> None:
    sampling: dict[str, Any] = {"temperature": 0.3, "top_p": 0.9, "top_k": 4}

    assert sampling.keys().isdisjoint(messages(claude(OPUS), **sampling))
    assert messages(claude(HAIKU), **sampling).items() >= sampling.items()


def test_a_system_turn_becomes_a_users_where_the_model_knows_none() -> None:
    system = {"role": "system", "content": "Mind."}

    assert messages(claude(HAIKU), HELLO, system)["messages"][1] == {
        "role": "user",
        "content": [{"type": "text", "text": "<system>\nMind.\n</system>"}],
    }
    assert messages(claude(OPUS), HELLO, system)["messages"][1] == system


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "thinking", "thinking": "Hm."},
        {"type": "thinking", "thinking": "Hm.", "signature": OWN_SIGNATURE_PREFIX + "x"},
        {"type": "redacted_thinking", "data": OWN_SIGNATURE_PREFIX + "x"},
        {"type": "redacted_thinking"},
    ],
)
def test_thinking_that_anthropic_did_not_sign_is_left_out(block: dict[str, Any]) -> None:
    text = {"type": "text", "text": "Yes."}
    turns = (HELLO, {"role": "assistant", "content": [block]}, {"role": "assistant", "content": [block, SIGNED, text]})

    assert messages(claude(), *turns)["messages"] == [HELLO, {"role": "assistant", "content": [SIGNED, text]}]


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=1"


@pytest.mark.parametrize(
    ("system", "sent"),
    [
        (
            [{"type": "text", "text": BILLING}, {"type": "text", "text": "Be brief."}],
            [{"type": "text", "text": "Be brief."}],
        ),
        ([{"type": "text", "text": BILLING}], None),
        (BILLING, None),
        ("Be brief.", "Be brief."),
    ],
)
def test_the_billing_line_goes_to_anthropic_alone(system: Any, sent: Any) -> None:
    elsewhere = claude(info={"api": "messages"}, api_base="http://127.0.0.1:9")

    assert messages(elsewhere, system=system).get("system") == sent
    assert messages(claude(), system=system)["system"] == system


def test_a_models_own_parameters_hold_where_the_client_states_nothing() -> None:
    record = claude(HAIKU, temperature=0.2, stop="END", max_tokens=50, system="Be brief.", reasoning_effort="low")
    body = messages(record, temperature=0.7)

    assert (body["temperature"], body["stop_sequences"], body["max_tokens"]) == (0.7, ["END"], 64000)
    assert (body["system"], body["thinking"]) == ("Be brief.", {"type": "enabled", "budget_tokens": 2048})
    assert messages(record, thinking={"type": "disabled"}, system="x")["thinking"] == {"type": "disabled"}


def test_a_models_own_parameters_have_their_place_in_responses() -> None:
    record = gpt(max_completion_tokens=50, system="Be brief.", reasoning_effort="low", temperature=None)
    body = responses(record)

    assert (body["max_output_tokens"], body["instructions"]) == (50, "Be brief.")
    assert body["reasoning"] == {"effort": "low"}
    assert "instructions" not in responses(record, {"role": "developer", "content": "x"})


ENCRYPTED = "reasoning.encrypted_content"


@pytest.mark.parametrize(
    ("name", "fields", "sent"),
    [
        ("gpt-5", {}, [ENCRYPTED]),
        ("gpt-5", {"store": True, "include": ["x"]}, ["x", ENCRYPTED]),
        ("gpt-5", {"store": False}, None),
        ("gpt-5", {"store": False, "include": [ENCRYPTED]}, [ENCRYPTED]),
        ("gpt-4.1", {}, None),
        ("gpt-4.1", {"include": [ENCRYPTED, "x"]}, ["x"]),
    ],
)
def test_nothing_is_stored_at_openai_and_reasoning_comes_back_instead(name: str, fields: Any, sent: Any) -> None:
    body = responses(gpt(name), previous_response_id="resp_1", conversation="conv_1", background=True, **fields)

    assert (body["store"], body.get("include")) == (False, sent)
    assert {"previous_response_id", "conversation", "background"}.isdisjoint(body)


@pytest.mark.parametrize(
    ("name", "effort", "sent"),
    [
        ("gpt-5", "minimal", "minimal"),
        ("gpt-5", "none", "minimal"),
        ("gpt-5", "xhigh", "high"),
        ("gpt-5.2", "none", "none"),
        ("gpt-5.2", "minimal", "low"),
        ("gpt-5.2", "max", "xhigh"),
        ("o3", "minimal", "low"),
        ("o3", "later", "later"),
    ],
)
def test_an_effort_is_one_that_the_openai_model_takes(name: str, effort: str, sent: str) -> None:
    reasoning = responses(gpt(name), reasoning={"effort": effort, "summary": "auto"})["reasoning"]

    assert reasoning == {"effort": sent, "summary": "auto"}


ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
    {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "run", "arguments": "{}"},
    {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "x"},
]


def test_items_that_openai_can_read_are_sent_as_they_are() -> None:
    assert responses(gpt(), *ITEMS)["input"] == ITEMS


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "id": "rs_2", "summary": []},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": None},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": OWN_REASONING_PREFIX + "x"},
        {"type": "item_reference", "id": "msg_1"},
    ],
)
def test_items_that_openai_cannot_read_are_left_out_and_no_id_refers_to_them(item: dict[str, Any]) -> None:
    sent = responses(gpt(), ITEMS[0], item, *ITEMS[1:], {"type": "web_search_call", "id": "ws_1"})["input"]

    without_id = {name: value for name, value in ITEMS[2].items() if name != "id"}
    assert sent == [*ITEMS[:2], without_id, ITEMS[3], {"type": "web_search_call", "id": "ws_1"}]


def test_a_model_without_reasoning_gets_none_of_anothers() -> None:
    body = responses(gpt("gpt-4.1"), *ITEMS, reasoning={"effort": "low"})

    assert "reasoning" not in body
    assert [item.get("type") for item in body["input"]] == [None, "function_call", "function_call_output"]


@pytest.mark.parametrize("odd", [7, None, "x", [], {}, [7], [[]], {"type": []}, [{"type": {}}], {"edits": [{}, 7]}])
def test_fields_of_odd_shapes_are_left_to_the_provider(odd: Any) -> None:
    names = ("thinking", "output_config", "context_management", "system", "metadata")
    for record in (claude(HAIKU), claude(info={"supports_reasoning": False}), gpt("gpt-4.1"), gpt()):
        messages(record, {"role": "assistant", "content": odd}, odd, **dict.fromkeys(names, odd), max_tokens=odd)
        responses(record, {"type": odd}, odd, include=odd, reasoning=odd, store=odd, limit=5)
