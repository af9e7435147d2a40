from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from proxy.errors import BadRequest
from proxy.routing.chat_request import OWN_FIELDS, read_options
from proxy.routing.trajectory import has_failed
from proxy.server.api.messages_request import count_tokens, translate
from tests.server.api.messages import (
    CAPTURED,
    ID,
    TOOL,
    a_call,
    a_request,
    a_result,
    an_image,
    chat_messages,
    translated,
)
from tests.support.captured_requests import captured_body

USER = {"role": "user", "content": "hi"}


def refused(*messages: dict[str, Any], **fields: Any) -> str | None:
    """Return the path that a refusal names."""
    with pytest.raises(BadRequest) as caught:
        translated(*messages, **fields)
    return caught.value.param


def answers(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def asks(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_request_is_translated_and_every_field_accounted_for(name: str) -> None:
    body = captured_body(name)
    before = copy.deepcopy(body)
    translation = translate(body, answer_id=ID, created_at=1)
    kept = {
        "model": "model", "messages": "messages", "system": "messages", "max_tokens": "max_tokens", "tools": "tools",
        "metadata": "metadata", "stream": "stream", "thinking": "thinking", "output_config": "reasoning_effort",
        "tool_choice": "tool_choice",
    }  # fmt: skip
    assert body == before
    assert {name for name in body if kept.get(name) not in translation.body} == set(translation.left_out)
    assert set(translation.left_out) <= {"context_management"}


@pytest.mark.parametrize("name", CAPTURED)
def test_tool_messages_of_captured_requests_stand_right_behind_their_calls(name: str) -> None:
    messages = translate(captured_body(name), answer_id=ID, created_at=1).body["messages"]
    roles = [message["role"] for message in messages]
    assert [place for place, role in enumerate(roles) if role == "system"] == [0]
    assert all(roles[place - 1] in ("assistant", "tool") for place, role in enumerate(roles) if role == "tool")


def test_claude_codes_session_is_the_session() -> None:
    translation = translate(captured_body(CAPTURED[0]), answer_id=ID, created_at=1)
    assert read_options(translation.body, []).session == "00000000-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    ("user_id", "session"),
    [("user_1_account_2_session_3", "3"), ('{"session_id": 3}', None), ("{broken", None), ("somebody", None)],
)
def test_a_session_is_read_from_other_user_ids_only_if_it_is_there(user_id: str, session: str | None) -> None:
    body = translated(metadata={"user_id": user_id}).body
    assert read_options(body, []).session == session
    assert body["user"] == user_id


def test_own_fields_stay_in_the_chat_body_alone() -> None:
    own = {"uniroute": {"lambda": 1}, "models": ["a"], "route": "fallback", "provider": {}}
    translation = translated(**own)
    assert {name: translation.body[name] for name in OWN_FIELDS} == own
    assert translation.document == a_request()


def test_a_text_stays_a_text_and_parameters_get_their_chat_names() -> None:
    body = translated(stop_sequences=["END"], temperature=0.5, top_p=0.9, top_k=5, stream=True).body
    assert body == {
        "model": "auto", "messages": [USER], "max_tokens": 100, "stop": ["END"], "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "stream": True,
    }  # fmt: skip


def test_system_blocks_are_first_and_the_billing_line_is_left_out() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
        {"type": "text", "text": "be kind", **cached},
        {"type": "text", "text": "be brief"},
    ]
    first = chat_messages(system=blocks)[0]
    assert first == {"role": "system", "content": [blocks[1], blocks[2]]}
    assert chat_messages(system="x-anthropic-billing-header: a\nbe kind")[0]["content"] == "be kind"


def test_system_messages_before_the_first_answer_join_the_first_and_later_ones_stay() -> None:
    told = [{"role": "system", "content": text} for text in ("one", "two")]
    messages = chat_messages(USER, told[0], answers({"type": "text", "text": "yes"}), told[1], USER, system="zero")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "system", "user"]
    assert [part["text"] for part in messages[0]["content"]] == ["zero", "one"]


def test_a_system_message_between_call_and_result_stands_behind_the_result() -> None:
    told = {"role": "system", "content": "careful"}
    messages = chat_messages(USER, answers(a_call()), told, asks(a_result("done"), {"type": "text", "text": "go on"}))
    assert [message["role"] for message in messages[2:]] == ["tool", "system", "user"]


def test_calls_and_results_become_tool_calls_and_tool_messages() -> None:
    calls = answers({"type": "text", "text": "look"}, a_call("a", path="x/ü"), a_call("b"))
    messages = chat_messages(USER, calls, asks(a_result("1", "a"), {"type": "text", "text": "?"}, a_result("2", "b")))
    assert messages[1]["content"] == "look"
    assert messages[1]["tool_calls"][0] == {
        "id": "a", "type": "function", "function": {"name": "Read", "arguments": '{"path":"x/ü"}'}
    }  # fmt: skip
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "user", "content": "?"},
    ]


def test_results_in_two_turns_of_the_user_stand_together() -> None:
    turns = (asks(a_result("1", "a"), {"type": "text", "text": "?"}), asks(a_result("2", "b")))
    messages = chat_messages(USER, answers(a_call("a")), answers(a_call("b")), *turns)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]


def test_images_of_results_follow_in_a_turn_of_the_user_that_names_the_call() -> None:
    result = a_result([{"type": "text", "text": "seen"}, an_image()])
    tool, user = chat_messages(USER, answers(a_call()), asks(result, {"type": "text", "text": "and?"}))[2:]
    assert tool["content"] == "seen\n\n(attached to the next message)"
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert "toolu_1" in user["content"][0]["text"]
    assert user["content"][1]["image_url"]["url"] == "data:image/png;base64,aGk="


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("no such file", "Error: no such file"),
        ("it ends with an error", "Error: it ends with an error"),
        ("Error: x", "Error: x"),
        ("<tool_use_error>x</tool_use_error>", "<tool_use_error>x</tool_use_error>"),
        ("Exit code 1\nx", "Exit code 1\nx"),
        (None, "Error"),
    ],
)
def test_a_result_that_is_an_error_says_so_once(content: Any, told: str) -> None:
    result = chat_messages(USER, answers(a_call()), asks(a_result(content, is_error=True)))[2]["content"]
    assert (result, has_failed(result)) == (told, True)


def test_signed_thinking_is_kept_with_its_signature_and_unsigned_as_text_alone() -> None:
    signed = {"type": "thinking", "thinking": "first ", "signature": "S"}
    hidden = {"type": "redacted_thinking", "data": "D"}
    turn = answers(signed, hidden, {"type": "thinking", "thinking": "then", "signature": ""}, a_call())
    message = chat_messages(USER, turn, asks(a_result("")))[1]
    assert message["reasoning_content"] == "first then"
    assert message["thinking_blocks"] == [signed, hidden]
    assert message["content"] is None


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
         [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]),
        ({"type": "document", "title": "T.pdf",
          "source": {"type": "base64", "media_type": "application/pdf", "data": "A"}},
         [{"type": "text", "text": "T.pdf"},
          {"type": "file", "file": {"filename": "T.pdf", "file_data": "data:application/pdf;base64,A"}}]),
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
         [{"type": "text", "text": "words"}]),
        ({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "x"}]}},
         [{"type": "text", "text": "x"}]),
        ({"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "x"}]},
         [{"type": "text", "text": "T\nS\nx"}]),
    ],
)  # fmt: skip
def test_attachments_become_parts(block: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    question = {"type": "text", "text": "?"}
    assert chat_messages(asks(block, question))[0]["content"] == [*parts, question]


def test_tools_become_functions_and_long_names_are_shortened_and_restored() -> None:
    name = "mcp__" + "x" * 100
    translation = translated(tools=[{**TOOL, "name": name, "strict": True, "cache_control": {"type": "ephemeral"}}])
    tool = translation.body["tools"][0]
    assert len(tool["function"]["name"]) == 64
    assert tool["cache_control"] == {"type": "ephemeral"}
    assert tool["function"]["strict"] is True
    assert translation.facts.tool_names == {tool["function"]["name"]: name}


def test_tools_of_anthropic_are_left_out() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    translation = translated(tools=[TOOL, search], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert translation.left_out == ("tools[1] (web_search_20250305)",)
    assert [tool["function"]["name"] for tool in translation.body["tools"]] == ["Read"]
    assert translation.body["tool_choice"] == "required"
    assert translation.body["parallel_tool_calls"] is False


def test_without_a_tool_that_can_be_offered_there_is_no_choice_of_tools() -> None:
    body = translated(tools=[{"type": "bash_20250124", "name": "bash"}], tool_choice={"type": "auto"}).body
    assert {"tools", "tool_choice"}.isdisjoint(body)


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ({"output_config": {"effort": "xhigh"}}, "xhigh"),
    ],
)
def test_thinking_is_kept_and_said_as_an_effort_too(fields: dict[str, Any], effort: str | None) -> None:
    body = translated(**fields).body
    assert body.get("reasoning_effort") == effort
    assert body.get("thinking") == fields.get("thinking")


def test_a_schema_of_the_answer_is_strict_only_if_openai_would_accept_it_so() -> None:
    closed = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
    loose = {**closed, "required": []}
    strict, not_strict = (
        translated(output_config={"format": {"type": "json_schema", "schema": schema}}).body["response_format"]
        for schema in (closed, loose)
    )
    assert strict["json_schema"] == {"name": "answer", "schema": closed, "strict": True}
    assert "strict" not in not_strict["json_schema"]


def test_what_has_no_chat_field_is_listed() -> None:
    ran = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    turn = answers({"type": "text", "text": "a"}, ran, {"type": "text", "text": "b"})
    fields = {"container": "c", "mcp_servers": [], "context_management": {}, "speed": "fast", "seed": 1}
    translation = translated(USER, turn, USER, **fields)
    assert set(translation.left_out) == {"messages[1].content[1] (server_tool_use)", *fields}
    assert [part["text"] for part in translation.body["messages"][1]["content"]] == ["a", "\n\nb"]


def test_a_last_turn_of_the_assistant_stays_last() -> None:
    assert chat_messages(USER, answers({"type": "text", "text": "{"}))[-1] == {"role": "assistant", "content": "{"}


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (asks({"type": "video"}), "messages[0].content[0].type"),
        (asks({"text": "?"}), "messages[0].content[0].type"),
        (asks({"type": "text", "text": 1}), "messages[0].content[0].text"),
        (asks(a_result("x")), "messages[0].content[0].tool_use_id"),
        (asks({"type": "image", "source": {"type": "file", "file_id": "f"}}), "messages[0].content[0].source"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 1}, "messages[0].content"),
    ],
)
def test_what_is_wrong_with_a_message_is_named_as_the_client_wrote_it(message: dict[str, Any], path: str) -> None:
    assert refused(message) == path


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"temperature": "1"}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"tools": [{"name": "Read"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "Write"}}, "tool_choice.name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": ["any"]}}, "tool_choice.type"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}, "messages": [asks(a_result("x"))]}, "thread"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
    ],
)
def test_what_is_wrong_with_a_field_is_named_as_the_client_wrote_it(fields: dict[str, Any], path: str) -> None:
    assert refused(**fields) == path


def test_a_count_of_tokens_needs_no_limit_and_grows_with_the_text() -> None:
    request = {name: value for name, value in a_request().items() if name != "max_tokens"}
    longer = {**request, "system": "x" * 4000}
    assert count_tokens(longer) - count_tokens(request) == pytest.approx(1000, abs=20)


def test_every_field_of_the_sdk_is_read_or_left_out() -> None:
    from anthropic.types import message_create_params
    from anthropic.types.beta import message_create_params as beta

    names = {
        *message_create_params.MessageCreateParamsBase.__annotations__,
        *beta.MessageCreateParamsBase.__annotations__,
    }
    left = {
        "container", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id",
        "billing_policy", "context_management", "fallback_credit_token", "fallbacks", "mcp_servers", "betas",
    }  # fmt: skip
    translation = translated(**dict.fromkeys(left, "x"))
    assert set(translation.left_out) == left
    assert names - left == {
        "max_tokens", "messages", "model", "metadata", "output_config", "service_tier", "stop_sequences", "system",
        "thinking", "tool_choice", "tools", "compaction", "thread", "cache_control",
    }  # fmt: skip


def test_nothing_of_a_body_is_shared_that_the_translation_changes() -> None:
    body = a_request(USER, answers(a_call()), asks(a_result("x", cache_control={"type": "ephemeral"})), tools=[TOOL])
    before = json.dumps(body)
    translate(body, answer_id=ID, created_at=1)
    assert json.dumps(body) == before
