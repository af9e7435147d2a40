from __future__ import annotations

from typing import Any

import pytest

from proxy.settings.litellm_params import merge_model_params
from proxy.upstream.litellm_client import LiteLLMTarget, call_arguments

ASK: Any = [{"role": "user", "content": "hi"}]
LOCAL = LiteLLMTarget("openai", "small", "http://127.0.0.1:9001/v1")
OPENAI = LiteLLMTarget("openai", "gpt-4o", None)
ANTHROPIC = LiteLLMTarget("anthropic", "claude", None)


def test_the_callers_value_wins_over_the_models() -> None:
    params = {"model": "openai/m", "api_key": "k", "temperature": 0.2, "top_k": 4, "extra_body": {"min_p": 0.1}}
    body = merge_model_params(params, {"messages": ASK, "temperature": 0.9})

    assert body == {"messages": ASK, "temperature": 0.9, "top_k": 4, "min_p": 0.1}


@pytest.mark.parametrize("requested", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("fixed", ["max_tokens", "max_completion_tokens"])
def test_one_limit_under_two_names_is_one_limit(requested: str, fixed: str) -> None:
    assert merge_model_params({"model": "m", fixed: 10}, {"messages": ASK, requested: 99}) == {
        "messages": ASK,
        requested: 99,
    }


THINKING: dict[str, Any] = {
    "reasoning_effort": "low",
    "reasoning": {"effort": "high"},
    "thinking": {"type": "disabled"},
    "enable_thinking": False,
}


@pytest.mark.parametrize("requested", THINKING)
@pytest.mark.parametrize("fixed", THINKING)
def test_all_names_of_the_reasoning_effort_are_synonyms(fixed: str, requested: str) -> None:
    params = {"model": "m", "extra_body": {fixed: "the arm's", "thinking_budget": 1}}

    assert merge_model_params(params, {"messages": ASK, requested: THINKING[requested]}) == {
        "messages": ASK,
        requested: THINKING[requested],
    }


@pytest.mark.parametrize(("fixed", "requested"), [("tools", "functions"), ("tool_choice", "function_call")])
def test_the_callers_tools_replace_the_models_under_the_older_name_too(fixed: str, requested: str) -> None:
    assert merge_model_params({"model": "m", fixed: ["arm"]}, {"messages": ASK, requested: []}) == {
        "messages": ASK,
        requested: [],
    }


def test_an_object_of_the_caller_is_not_merged_with_the_models() -> None:
    params = {"model": "m", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    body = {"messages": ASK, "chat_template_kwargs": {"other": 1}}

    assert merge_model_params(params, body) == body


@pytest.mark.parametrize("name", ["temperature", "stop", "seed"])
def test_a_null_of_the_caller_does_not_remove_the_models_value(name: str) -> None:
    assert merge_model_params({"model": "m", name: 2}, {"messages": ASK, name: None}) == {"messages": ASK, name: 2}


def test_a_null_under_a_synonym_is_not_sent_beside_the_models_value() -> None:
    body = {"messages": ASK, "max_tokens": None, "thinking": None, "user": None}
    merged = merge_model_params({"model": "m", "max_completion_tokens": 10, "reasoning_effort": "low"}, body)

    assert merged == {"messages": ASK, "max_completion_tokens": 10, "reasoning_effort": "low", "user": None}


@pytest.mark.parametrize("value", [[], "", 0, False])
def test_an_empty_value_counts_as_stated(value: object) -> None:
    assert merge_model_params({"model": "m", "stop": ["x"]}, {"messages": ASK, "stop": value})["stop"] == value


def test_a_models_parameters_cannot_replace_the_callers_messages_or_model() -> None:
    fixed = {"messages": [], "model": "other", "stream": True}
    body = {"model": "auto", "messages": ASK}
    arguments = call_arguments(LOCAL, merge_model_params({"model": "m", "extra_body": fixed}, body), stream=False)

    assert arguments["extra_body"] == {"messages": ASK}
    assert arguments["stream"] is False


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_callers_system_prompt_replaces_the_models(role: str) -> None:
    own = [{"role": role, "content": "mine"}, *ASK]

    assert merge_model_params({"model": "m", "system": "arm"}, {"messages": ASK})["messages"][0]["content"] == "arm"
    assert merge_model_params({"model": "m", "system": "arm"}, {"messages": own})["messages"] == own


def test_a_server_with_its_own_address_gets_the_callers_body_unchanged() -> None:
    body = {"model": "auto", "messages": ASK, "temperature": 1, "top_k": 4, "metadata": {"a": "b"}, "stop": None}
    arguments = call_arguments(LOCAL, body, stream=False)

    assert arguments["extra_body"] == {name: value for name, value in body.items() if name != "model"}
    assert "temperature" not in arguments


@pytest.mark.parametrize("provider", [LOCAL, OPENAI, ANTHROPIC])
def test_usage_is_always_asked_for_in_a_stream(provider: LiteLLMTarget) -> None:
    arguments = call_arguments(provider, {"messages": ASK, "stream": True}, stream=True)
    sent = {**arguments, **arguments.get("extra_body", {})}

    assert sent["stream_options"] == {"include_usage": True}
    assert arguments["stream"] is True


def test_openai_itself_goes_through_litellms_translation() -> None:
    body = {"messages": ASK, "max_tokens": 5, "metadata": {"a": "b"}, "new_field": 1}
    arguments = call_arguments(OPENAI, body, stream=False)

    assert (arguments["messages"], arguments["max_tokens"]) == (ASK, 5)
    assert arguments["extra_body"] == {"metadata": {"a": "b"}, "new_field": 1}


def test_fields_for_openais_records_are_not_sent_in_other_formats() -> None:
    arguments = call_arguments(ANTHROPIC, {"messages": ASK, "metadata": {"a": "b"}, "store": True}, stream=False)

    assert "extra_body" not in arguments
    assert "store" not in arguments
