from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import pytest

from proxy.server.api.adaptation import adapt
from proxy.storage.records import ModelRecord, ResolvedProvider
from tests.server.api.messages import TOOL, a_call, a_result, translated
from tests.support.makers import PRICED, a_record

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}


def a_model(model: str, mode: Literal["relay", "translate"] = "translate", **info: Any) -> ModelRecord:
    """Return a model of a provider's own address."""
    provider, _, bare = model.partition("/")
    record = a_record("m", info={**PRICED, **info}, model=model, api_base=None)
    return replace(record, resolved=ResolvedProvider(mode, bare, provider, "https://provider.example/v1"))


OPUS = a_model("anthropic/claude-opus-4-8")
HAIKU = a_model("anthropic/claude-haiku-4-5")
GPT = a_model("openai/gpt-5", "relay")
GPT_4 = a_model("openai/gpt-4.1", "relay")
GEMINI = a_model("gemini/gemini-2.5-flash")
OPENROUTER_CLAUDE = a_model("openrouter/anthropic/claude-opus-4.8", "relay")
COHERE = a_model("cohere_chat/command-a")
LOCAL = a_record("local", info={**PRICED, "supports_reasoning": True})
PLAIN = a_record("plain")

USER = {"role": "user", "content": "hi"}


def adapted(record: ModelRecord, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request with these fields as the model gets it."""
    body = {"model": "auto", "messages": [USER], "max_tokens": 64000, **fields}
    before = copy.deepcopy(body)
    found, _ = adapt(body, record)
    assert body == before
    return dict(found)


def left_out(record: ModelRecord, **fields: Any) -> tuple[str, ...]:
    return adapt({"model": "auto", "messages": [USER], **fields}, record)[1]


@pytest.mark.parametrize("record", [OPUS, GPT, GEMINI, LOCAL, PLAIN, COHERE])
def test_a_body_that_any_model_takes_is_the_same_object(record: ModelRecord) -> None:
    body = translated(USER, system="be kind", tools=[TOOL], stream=True).body
    assert adapt(body, record) == (body, ())
    assert adapt(body, record)[0] is body


def test_messages_that_need_no_change_are_shared() -> None:
    marked = {"role": "user", "content": [{"type": "text", "text": "a", **EPHEMERAL}]}
    messages = adapted(GPT, messages=[{"role": "system", "content": "s"}, marked])["messages"]
    assert messages[1]["content"] == "a"
    body = {"messages": [USER, {"role": "assistant", "content": "x"}, marked]}
    assert adapt(body, GPT)[0]["messages"][1] is body["messages"][1]


def test_marks_of_caches_go_where_they_are_read() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {}, **EPHEMERAL}]}
    fields = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", **EPHEMERAL}]},
            calls,
            {"role": "tool", "tool_call_id": "a", "content": "x", **EPHEMERAL},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}, **EPHEMERAL}],
    }
    assert adapted(OPUS, **fields) == {"model": "auto", "max_tokens": 64000, **fields}
    assert "cache_control" not in str(adapted(GPT, **fields))
    assert left_out(GPT, **fields) == ("cache_control",)
    routed = adapted(OPENROUTER_CLAUDE, **fields)
    assert ["cache_control" in str(message) for message in routed["messages"]] == [True, False, False]
    assert routed["tools"] == fields["tools"]


def test_a_mark_of_the_whole_body_goes_to_anthropics_format_alone() -> None:
    assert "cache_control" in adapted(OPUS, **EPHEMERAL)
    assert left_out(a_model("bedrock/us.anthropic.claude-opus-4-8"), **EPHEMERAL) == ("cache_control",)


def test_parts_that_are_all_text_are_one_text_with_and_without_marks() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content in (parts, [parts[0], {**parts[1], **EPHEMERAL}]):
        assert adapted(LOCAL, messages=[{"role": "user", "content": content}])["messages"][0]["content"] == "a\n\nb"
    assert adapted(OPUS, messages=[{"role": "user", "content": parts}])["messages"][0]["content"] == parts


@pytest.mark.parametrize(
    ("record", "effort", "told"),
    [
        (GPT, "high", "high"),
        (GPT, "xhigh", "high"),
        (GPT, "none", "minimal"),
        (a_model("openai/gpt-5.2", "relay"), "max", "xhigh"),
        (a_model("openai/gpt-5.2", "relay"), "none", "none"),
        (GPT_4, "high", None),
        (GEMINI, "max", "high"),
        (LOCAL, "max", "high"),
        (PLAIN, "high", None),
        (COHERE, "low", None),
        (a_model("mistral/mistral-small-latest", "relay", supports_reasoning=False), "high", None),
        (OPUS, "xhigh", "xhigh"),
        (OPUS, "max", "max"),
        (HAIKU, "high", None),
    ],
)
def test_an_effort_is_told_in_a_word_that_the_model_knows(record: ModelRecord, effort: str, told: str | None) -> None:
    assert adapted(record, reasoning_effort=effort).get("reasoning_effort") == told


@pytest.mark.parametrize(("effort", "told"), [("none", "none"), ("low", "high"), ("max", "high")])
def test_whoever_asks_for_some_thinking_is_not_given_none(effort: str, told: str) -> None:
    knows_two = a_model("mistral/mistral-small-latest", "relay")
    assert adapted(knows_two, reasoning_effort=effort)["reasoning_effort"] == told


@pytest.mark.parametrize(
    ("thinking", "told"),
    [
        ({"type": "adaptive"}, {"type": "adaptive"}),
        ({"type": "disabled"}, {"type": "disabled"}),
        ({"type": "enabled", "budget_tokens": 5000}, {"type": "adaptive", "display": "summarized"}),
    ],
)
def test_an_adaptive_claude_is_told_to_adapt(thinking: dict[str, Any], told: dict[str, Any]) -> None:
    assert adapted(OPUS, thinking=thinking)["thinking"] == told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"thinking": {"type": "adaptive"}, "reasoning_effort": "low"}, 2048),
        ({"thinking": {"type": "adaptive"}}, 16384),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}, "reasoning_effort": "high"}, 31999),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}, "max_tokens": 4000}, 2000),
        ({"thinking": {"type": "enabled", "budget_tokens": 63999}, "max_tokens": 100_000}, 63999),
        ({"thinking": {"type": "enabled", "budget_tokens": 90000}, "max_tokens": 100_000}, 32000),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, 1024),
    ],
)
def test_an_older_claude_is_told_a_budget_below_its_limit(fields: dict[str, Any], told: int) -> None:
    body = adapted(HAIKU, **fields)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": told}
    assert "reasoning_effort" not in body


def test_thinking_is_left_out_where_claude_would_refuse_it() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    assert left_out(HAIKU, thinking=thinking, max_tokens=1000) == ("thinking",)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
    loop = [USER, calls, {"role": "tool", "tool_call_id": "a", "content": "x"}]
    assert "thinking" not in adapted(HAIKU, thinking=thinking, messages=loop)
    assert "thinking" not in adapted(HAIKU, thinking=thinking, messages=[*loop, USER])
    ended = [*loop, {"role": "assistant", "content": "x"}, USER]
    assert "thinking" in adapted(HAIKU, thinking=thinking, messages=ended)
    signed = {**calls, "thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "S"}]}
    assert "thinking" in adapted(HAIKU, thinking=thinking, messages=[USER, signed, loop[2]])
    always = a_model("anthropic/claude-opus-5-5")
    assert "thinking" not in adapted(always, thinking={"type": "disabled"})


def test_other_models_get_no_thinking_of_anthropics() -> None:
    fields = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "reasoning_effort": "low"}
    for record, lost in ((GPT, ()), (GPT_4, ("thinking",)), (LOCAL, ()), (PLAIN, ("thinking",))):
        assert "thinking" not in adapted(record, **fields)
        assert left_out(record, **fields) == lost


@pytest.mark.parametrize("record", [OPUS, HAIKU, OPENROUTER_CLAUDE])
def test_what_another_provider_has_signed_is_left_out(record: ModelRecord) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "Read", "arguments": "{}"}}
    proofs = {"thinking_blocks": [{"type": "thinking", "thinking": "r", "signature": "S"}], "reasoning_details": [{}]}
    turn = {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call], **proofs}
    messages = [USER, turn, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = {"messages": messages, "max_tokens": 9000, "thinking": thinking}
    found, _ = adapt(body, record, reads_reasoning=False)
    assert not proofs.keys() & found["messages"][1].keys()
    assert found.get("thinking") != thinking  # Anthropic refuses a budget where the thinking before a call is missing
    assert adapt({"messages": [USER]}, record, reads_reasoning=False)[0]["messages"] == [USER]


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (OPUS, {"thinking_blocks", "reasoning_content"}), (OPENROUTER_CLAUDE, {"reasoning_content"}),
        (LOCAL, {"reasoning_content"}), (a_model("deepseek/deepseek-chat", "relay"), {"reasoning_content"}),
        (GPT, set()), (a_model("groq/llama-3.3-70b", "relay"), set()),
    ],
)  # fmt: skip
def test_earlier_reasoning_goes_to_those_that_read_it(record: ModelRecord, kept: set[str]) -> None:
    turn = {"role": "assistant", "content": "x", "reasoning_content": "r", "thinking_blocks": [{"type": "thinking"}]}
    assert adapted(record, messages=[USER, turn])["messages"][1].keys() - {"role", "content"} == kept


@pytest.mark.parametrize(
    ("record", "lost"),
    [
        (OPUS, {"temperature", "top_p", "top_k", "service_tier"}), (HAIKU, {"service_tier"}),
        (GPT, {"temperature", "top_p", "top_k", "stop"}), (GPT_4, {"top_k"}),
        (LOCAL, {"service_tier"}), (COHERE, {"top_k", "service_tier", "parallel_tool_calls"}),
    ],
)  # fmt: skip
def test_what_a_model_refuses_is_left_out(record: ModelRecord, lost: set[str]) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "service_tier": "default", "parallel_tool_calls": False}
    assert set(left_out(record, **fields, stop=["END"])) == lost


def test_openai_gets_four_stop_sequences() -> None:
    assert adapted(GPT_4, stop=list("abcde"))["stop"] == list("abcd")
    assert left_out(GPT_4, stop=list("abcde")) == ("stop[4:]",)
    assert adapted(LOCAL, stop=list("abcde"))["stop"] == list("abcde")


def test_metadata_is_for_the_session_alone_unless_the_answer_is_stored() -> None:
    fields = {"metadata": {"user_id": "u", "session_id": "s"}}
    assert "metadata" not in adapted(GPT, **fields)
    assert left_out(GPT, **fields) == ()
    assert adapted(GPT, **fields, store=True)["metadata"] == fields["metadata"]


def test_a_long_user_goes_to_anthropic_alone() -> None:
    assert "user" not in adapted(GPT, user="u" * 65)
    assert adapted(GPT, user="u" * 64)["user"] == "u" * 64
    assert adapted(OPUS, user="u" * 65)["user"] == "u" * 65


def test_later_system_messages_are_turns_of_the_user_except_at_openai() -> None:
    told = [{"role": "system", "content": text} for text in ("first", "later")]
    messages = [told[0], USER, {"role": "assistant", "content": "x"}, told[1], {"role": "user", "content": "?"}]
    assert [message["role"] for message in adapted(LOCAL, messages=messages)["messages"]] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    assert adapted(LOCAL, messages=messages)["messages"][3]["content"] == "<system>\nlater\n</system>\n\n?"
    assert adapted(GPT, messages=messages)["messages"] == messages


def test_anthropic_fetches_a_document_itself() -> None:
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://a/b.pdf"}}
    question = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    assert adapted(OPUS, messages=question)["messages"][0]["content"][0]["file"] == {"file_id": "https://a/b.pdf"}
    assert adapted(LOCAL, messages=question)["messages"] == question


def test_a_translated_loop_of_tools_stays_in_order_for_every_model() -> None:
    turns = (
        {"role": "assistant", "content": [a_call()]},
        {"role": "user", "content": [{**a_result("x"), **EPHEMERAL}]},
    )
    body = translated(USER, *turns, {"role": "system", "content": "go on"}).body
    for record in (OPUS, HAIKU, GPT, GEMINI, LOCAL, COHERE, OPENROUTER_CLAUDE):
        roles = [message["role"] for message in adapt(body, record)[0]["messages"]]
        assert roles[:3] == ["user", "assistant", "tool"]
        assert roles[3] == ("system" if record is GPT else "user")
