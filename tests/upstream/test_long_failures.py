from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.upstream.litellm_client import LiteLLMClient
from tests.support.litellm_calls import open_litellm_client
from tests.support.makers import a_record
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
WORDS = "what went wrong is a long story. " * 60_000
CHUNKS = b'data: {"choices": [{"index": 0, "delta": {}}]}\n\n' * 20_000
# Generous: without their guards each of these takes ten times as long.
MAX_BLOCKED_CPU_S = 2.0


@pytest.fixture
async def upstream() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client() as opened:
        yield opened


async def failing(upstream: LiteLLMClient, step: Step, model: str) -> tuple[UpstreamError, float]:
    """Return the failure, and the most CPU time that the loop spent before another task could run."""
    longest_s = 0.0

    async def tick() -> None:
        nonlocal longest_s
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.01)
            longest_s = max(longest_s, time.thread_time() - before)

    with ScriptedUpstream() as server:
        server.then(step)
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.05)
        with pytest.raises(UpstreamError) as failed:
            await upstream.complete(a_record(model=model, api_base=server.url, api_key="sk-arm-of-the-test"), BODY)
        await asyncio.sleep(0.05)
        ticking.cancel()
    return failed.value, longest_s


@pytest.mark.parametrize("model", ["openai/x", "anthropic/claude-x"])
@pytest.mark.parametrize(
    "step",
    [
        Step(status=500, body={"error": {"message": WORDS}}),
        Step(status=400, body=WORDS.encode()),
        Step(body=WORDS.encode()),
        Step(headers={"content-type": "text/event-stream"}, body=CHUNKS),
    ],
)
async def test_a_long_error_delays_no_other_request(upstream: LiteLLMClient, step: Step, model: str) -> None:
    _, longest_s = await failing(upstream, step, model)

    assert longest_s < MAX_BLOCKED_CPU_S


@pytest.mark.parametrize("model", ["openai/x", "anthropic/claude-x"])
@pytest.mark.parametrize(
    "body", [{"error": {"message": WORDS}}, {"choices": [], "said": WORDS}, {"choices": [{"message": WORDS}]}]
)
async def test_a_long_response_that_is_no_completion_delays_no_other_request(
    upstream: LiteLLMClient, body: dict[str, Any], model: str
) -> None:
    failure, longest_s = await failing(upstream, Step(body=body), model)

    assert failure.message.endswith("success and no completion")
    assert longest_s < MAX_BLOCKED_CPU_S


async def test_the_start_of_a_long_error_is_passed_on(upstream: LiteLLMClient) -> None:
    body = {"error": {"message": "x" * (MAX_ERROR_BYTES - 100)}}
    short, _ = await failing(upstream, Step(status=503, body=body), "openai/x")
    long, _ = await failing(upstream, Step(status=503, body={"error": {"message": WORDS}}), "openai/x")

    assert isinstance(short.body, bytes)
    assert json.loads(short.body) == body
    assert isinstance(long.body, bytes)
    assert len(long.body) == MAX_ERROR_BYTES
    assert long.status == 503


async def test_litellm_logs_no_call(upstream: LiteLLMClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from litellm.litellm_core_utils.litellm_logging import Logging

    kept: list[str] = []
    monkeypatch.setattr(Logging, "failure_handler", lambda *_: kept.append("failure"))
    monkeypatch.setattr(Logging, "_failure_handler_helper_fn", lambda *_: kept.append("failure"))
    await failing(upstream, Step(status=500, body={"error": {"message": "short"}}), "openai/x")

    assert kept == []
