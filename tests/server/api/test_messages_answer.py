from __future__ import annotations

import copy
from typing import Any

import pytest
from anthropic.types import Message

from proxy.server.api.messages_answer import usage_counts
from proxy.server.api.messages_errors import anthropic_error
from tests.server.api.messages import ID, TOOL, a_completion, translated

THINKING = {"type": "enabled", "budget_tokens": 50}


def answer(message: dict[str, Any], finish_reason: str | None = "stop", usage: Any = None, **choice: Any) -> Any:
    """Translate a completion for a client with a tool and the stop sequence END."""
    completion = a_completion(message, finish_reason, usage, **choice)
    before = copy.deepcopy(completion)
    found = translated(tools=[TOOL], stop_sequences=["END"], thinking=THINKING).answer(completion, "small")
    assert completion == before
    Message.model_validate(found)
    return found


def call(arguments: Any, call_id: Any = "call_1", name: str = "Read") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_text_becomes_a_message() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    assert answer({"content": "hello"}, usage=usage) == {
        "id": f"msg_{ID}", "type": "message", "role": "assistant", "model": "small",
        "content": [{"type": "text", "text": "hello"}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": 9, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 2,
        },
    }  # fmt: skip


def test_blocks_stand_in_the_order_thinking_text_calls() -> None:
    found = answer({"content": "so", "reasoning_content": "hm", "tool_calls": [call('{"a": 1}')]}, "tool_calls")
    assert found["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "call_1", "name": "Read", "input": {"a": 1}},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "S"}]},
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm", "signature": "S"}]},
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "signature": "S"}]},
    ],
)
def test_reasoning_under_two_names_is_one_block_with_its_signature(message: dict[str, Any]) -> None:
    assert answer(message)["content"] == [{"type": "thinking", "thinking": "hm", "signature": "S"}]


def test_encrypted_reasoning_is_kept_if_it_is_anthropics() -> None:
    details = [
        {"type": "reasoning.encrypted", "data": "A", "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "B", "format": "openai-responses-v1"},
    ]
    assert answer({"reasoning_details": details})["content"] == [{"type": "redacted_thinking", "data": "A"}]


def test_mistrals_parts_are_thinking_and_text() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "so"}]
    assert [block["type"] for block in answer({"content": parts})["content"]] == ["thinking", "text"]


@pytest.mark.parametrize(
    ("fields", "types"),
    [
        ({}, ["text"]),
        ({"tools": [TOOL]}, ["thinking", "text"]),
        ({"tools": [TOOL], "thinking": {"type": "disabled"}}, ["text"]),
        ({"thinking": {"type": "adaptive"}}, ["thinking", "text"]),
    ],
)
def test_thinking_is_shown_to_clients_that_asked_or_have_tools(fields: dict[str, Any], types: list[str]) -> None:
    found = translated(**fields).answer(a_completion({"content": "so", "reasoning_content": "hm"}), "m")
    assert [block["type"] for block in found["content"]] == types


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", {}),
        (None, {}),
        ("null", {}),
        ({"a": 1}, {"a": 1}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('{"a": 9223372036854775809}', {"a": 9223372036854775809}),
        ("[1]", {"arguments": [1]}),
        ('{"a":', {"arguments": '{"a":'}),
        ("ls -l", {"arguments": "ls -l"}),
    ],
)
def test_the_input_of_a_call_is_always_an_object(arguments: Any, told: dict[str, Any]) -> None:
    assert answer({"content": None, "tool_calls": [call(arguments)]})["content"][0]["input"] == told


def test_calls_without_an_id_of_their_own_get_one() -> None:
    calls = [call("{}", "x"), call("{}", "x"), call("{}", None), call("{}", "")]
    ids = [block["id"] for block in answer({"tool_calls": calls})["content"]]
    assert ids == ["x", f"toolu_{ID}01", f"toolu_{ID}02", f"toolu_{ID}03"]


def test_a_legacy_function_call_is_a_call() -> None:
    found = answer({"content": None, "function_call": {"name": "Read", "arguments": "{}"}}, "function_call")
    assert [block["type"] for block in found["content"]] == ["tool_use"]
    assert found["stop_reason"] == "tool_use"


def test_a_shortened_name_is_the_clients_again() -> None:
    name = "x" * 100
    translation = translated(tools=[{**TOOL, "name": name}])
    short = translation.body["tools"][0]["function"]["name"]
    found = translation.answer(a_completion({"tool_calls": [call("{}", name=short)]}), "m")
    assert found["content"][0]["name"] == name


CALLS = {"tool_calls": [call("{}")]}


@pytest.mark.parametrize(
    ("message", "finish", "choice", "told"),
    [
        ({"content": "x"}, "stop", {}, ("end_turn", None)),
        ({"content": "x"}, None, {}, ("end_turn", None)),
        ({"content": "x"}, "length", {}, ("max_tokens", None)),
        ({"content": "x"}, "content_filter", {}, ("refusal", None)),
        ({"refusal": "no"}, "stop", {}, ("refusal", None)),
        ({"content": "x"}, "tool_calls", {}, ("end_turn", None)),
        (CALLS, "stop", {}, ("tool_use", None)),
        (CALLS, "length", {}, ("max_tokens", None)),
        ({"content": "x"}, "stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ({"content": "x"}, "stop", {"matched_stop": "END"}, ("stop_sequence", "END")),
        ({"content": "x"}, "stop", {"stop_reason": 151643}, ("end_turn", None)),
        ({"content": "x"}, "stop", {"stop_reason": [1]}, ("end_turn", None)),
        ({"content": "x"}, "stop", {"native_finish_reason": "stop_sequence"}, ("stop_sequence", "END")),
    ],
)
def test_the_reason_of_the_end(
    message: dict[str, Any], finish: str | None, choice: dict[str, Any], told: tuple[str, str | None]
) -> None:
    found = answer(message, finish, **choice)
    assert (found["stop_reason"], found["stop_sequence"]) == told
    assert ("stop_details" in found) == (told[0] == "refusal")


def test_a_refusal_is_text_too() -> None:
    found = answer({"content": None, "refusal": "I cannot"})
    assert found["content"] == [{"type": "text", "text": "I cannot"}]
    assert found["stop_details"]["explanation"] == "I cannot"


def test_white_space_alone_is_no_block() -> None:
    assert answer({"content": "\n\n"})["content"] == []


def test_only_the_first_choice_counts() -> None:
    completion = a_completion({"content": "first"})
    completion["choices"].insert(0, {"index": 1, "message": {"content": "second"}, "finish_reason": "length"})
    found = translated().answer(completion, "m")
    assert (found["content"][0]["text"], found["stop_reason"]) == ("first", "end_turn")


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        (None, (0, 0, 0, 0)),
        ({"prompt_tokens": 99, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 60}}, (39, 0, 60, 5)),
        (
            {
                "prompt_tokens": 100, "completion_tokens": 5, "cache_read_input_tokens": 60,
                "cache_creation_input_tokens": 30, "total_tokens": 105,
            },
            (10, 30, 60, 5),
        ),
        (
            {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 30},
            (10, 30, 60, 5),
        ),
    ],
)  # fmt: skip
def test_input_tokens_are_those_that_no_cache_read_or_wrote(usage: Any, told: tuple[int, ...]) -> None:
    counts = usage_counts(usage)
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    assert tuple(counts[name] for name in names) == told


def test_tokens_of_thinking_are_told() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
    assert answer({"content": "x"}, usage=usage)["usage"]["output_tokens_details"] == {"thinking_tokens": 4}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error"),
        (403, "permission_error"), (404, "not_found_error"), (408, "invalid_request_error"),
        (413, "request_too_large"), (422, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error"),
        (502, "api_error"), (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"),
    ],
)  # fmt: skip
def test_an_error_has_anthropics_type_for_its_status(status: int, kind: str) -> None:
    assert anthropic_error({"message": "no", "code": None}, status, "req_1") == {
        "type": "error", "error": {"type": kind, "message": "no"}, "request_id": "req_1"
    }  # fmt: skip


def test_an_error_of_an_upstream_keeps_the_details_by_which_clients_know_it() -> None:
    details = {"error_code": "thread_not_found"}
    assert anthropic_error({"message": "no", "details": details}, 400)["error"]["details"] == details


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_claude_code_knows() -> None:
    error = anthropic_error({"message": "too many tokens", "code": "context_length_exceeded"}, 400)
    assert error["error"]["message"] == "prompt is too long: too many tokens"
