"""From a record and a body to a provider call: the arm's parameters, the caller's, and who wins."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.upstream.call import Provider, arm_body, call_arguments

ASK: Any = [{"role": "user", "content": "hi"}]
LOCAL = Provider("openai", "small", "http://127.0.0.1:9001/v1")
OPENAI = Provider("openai", "gpt-4o", None)
ANTHROPIC = Provider("anthropic", "claude", None)


def test_the_callers_value_wins_over_the_arms() -> None:
    params = {"model": "openai/m", "api_key": "k", "temperature": 0.2, "top_k": 4, "extra_body": {"min_p": 0.1}}
    body = arm_body(params, {"messages": ASK, "temperature": 0.9})

    assert body == {"messages": ASK, "temperature": 0.9, "top_k": 4, "min_p": 0.1}


@pytest.mark.parametrize("stated", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("fixed", ["max_tokens", "max_completion_tokens"])
def test_one_limit_under_two_names_is_one_limit(stated: str, fixed: str) -> None:
    assert arm_body({"model": "m", fixed: 10}, {"messages": ASK, stated: 99}) == {"messages": ASK, stated: 99}


def test_a_null_of_the_caller_does_not_undo_the_arm() -> None:
    assert arm_body({"model": "m", "temperature": 0.2}, {"messages": ASK, "temperature": None})["temperature"] == 0.2


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_arms_system_prompt_yields_to_the_callers(role: str) -> None:
    own = [{"role": role, "content": "mine"}, *ASK]

    assert arm_body({"model": "m", "system": "arm"}, {"messages": ASK})["messages"][0]["content"] == "arm"
    assert arm_body({"model": "m", "system": "arm"}, {"messages": own})["messages"] == own


def test_an_own_address_gets_the_callers_body_verbatim() -> None:
    body = {"model": "auto", "messages": ASK, "temperature": 1, "top_k": 4, "metadata": {"a": "b"}, "stop": None}
    arguments = call_arguments(LOCAL, body, stream=False)

    assert arguments["extra_body"] == {name: value for name, value in body.items() if name != "model"}
    assert "temperature" not in arguments


@pytest.mark.parametrize("provider", [LOCAL, OPENAI, ANTHROPIC])
def test_usage_is_always_asked_for_in_a_stream(provider: Provider) -> None:
    arguments = call_arguments(provider, {"messages": ASK, "stream": True}, stream=True)
    sent = {**arguments, **arguments.get("extra_body", {})}

    assert sent["stream_options"] == {"include_usage": True}
    assert arguments["stream"] is True


def test_openai_itself_goes_through_litellms_translation() -> None:
    body = {"messages": ASK, "max_tokens": 5, "metadata": {"a": "b"}, "new_field": 1}
    arguments = call_arguments(OPENAI, body, stream=False)

    assert (arguments["messages"], arguments["max_tokens"]) == (ASK, 5)
    assert arguments["extra_body"] == {"metadata": {"a": "b"}, "new_field": 1}


def test_openais_book_keeping_stays_here_for_other_formats() -> None:
    arguments = call_arguments(ANTHROPIC, {"messages": ASK, "metadata": {"a": "b"}, "store": True}, stream=False)

    assert "extra_body" not in arguments
    assert "store" not in arguments
