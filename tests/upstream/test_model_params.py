from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.upstream.litellm_client import LiteLLMClient
from tests.support.chunk_streams import PulledBlocks
from tests.support.litellm_calls import open_litellm_client
from tests.support.makers import a_record
from tests.support.scripted_answers import CLAUDE, Step
from tests.support.scripted_upstream import ScriptedUpstream

ASK: Any = {"role": "user", "content": "hi"}
MODEL_PARAMS: dict[str, Any] = {
    "temperature": 0.1,
    "max_tokens": 50,
    "stop": ["###"],
    "reasoning_effort": "low",
    "system": "You are the arm.",
    "extra_body": {"min_p": 0.05, "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.fixture
async def upstream() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client() as opened:
        yield opened


async def arriving(upstream: LiteLLMClient, body: dict[str, Any], *, stream: bool = False) -> dict[str, Any]:
    with ScriptedUpstream() as server:
        record = a_record(model="openai/m", api_base=server.url, api_key="k", **MODEL_PARAMS)
        if stream:
            async for _ in PulledBlocks(await upstream.stream(record, {"model": "auto", **body})):
                pass
        else:
            await upstream.complete(record, {"model": "auto", **body})
        return server.last.body


@pytest.mark.parametrize("stream", [False, True])
async def test_the_models_parameters_are_sent_if_the_caller_states_none(
    upstream: LiteLLMClient, *, stream: bool
) -> None:
    sent = await arriving(upstream, {"messages": [ASK]}, stream=stream)

    assert sent["messages"] == [{"role": "system", "content": "You are the arm."}, ASK]
    assert {name: sent[name] for name in ("temperature", "max_tokens", "stop", "reasoning_effort", "min_p")} == {
        "temperature": 0.1,
        "max_tokens": 50,
        "stop": ["###"],
        "reasoning_effort": "low",
        "min_p": 0.05,
    }
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_callers_parameters_replace_the_models(upstream: LiteLLMClient, *, stream: bool) -> None:
    requested: dict[str, Any] = {
        "messages": [{"role": "developer", "content": "Mine."}, ASK],
        "temperature": 0,
        "max_completion_tokens": 900,
        "stop": ["END"],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "min_p": 0.5,
        "chat_template_kwargs": {"custom": True},
    }
    sent = await arriving(upstream, requested, stream=stream)

    assert {name: value for name, value in sent.items() if not name.startswith("stream")} == {**requested, "model": "m"}


async def test_nulls_of_the_caller_leave_the_models_values(upstream: LiteLLMClient) -> None:
    sent = await arriving(upstream, {"messages": [ASK], "temperature": None, "max_completion_tokens": None})

    assert (sent["temperature"], sent["max_tokens"]) == (0.1, 50)
    assert "max_completion_tokens" not in sent


async def test_the_callers_limit_system_and_reasoning_are_sent_in_another_format_too(upstream: LiteLLMClient) -> None:
    with ScriptedUpstream() as server:
        server.then(Step(body=CLAUDE))
        fixed: dict[str, Any] = {
            "max_tokens": 50,
            "system": "The arm.",
            "thinking": {"type": "enabled", "budget_tokens": 2000},
        }
        record = a_record(model="anthropic/claude-sonnet-4-5", api_base=server.url, api_key="k", **fixed)
        requested = {"messages": [{"role": "system", "content": "Mine."}, ASK], "max_completion_tokens": 9000}
        await upstream.complete(record, {"model": "auto", **requested, "reasoning_effort": "low"})
        sent = server.last.body

    assert sent["max_tokens"] == 9000
    assert [part["text"] for part in sent["system"]] == ["Mine."]
    assert sent["thinking"]["budget_tokens"] != 2000
