from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from proxy.settings.model_config import ModelInfo
from proxy.storage.records import ModelRecord
from proxy.upstream.litellm_client import LiteLLMClient
from tests.server.test_other_formats import BEGIN
from tests.support.chunk_streams import PulledBlocks
from tests.support.litellm_calls import open_litellm_client
from tests.support.raw_upstream import CHUNK, RawUpstream, Reply, chunked
from tests.support.waiting import until

ASK: Any = {"messages": [{"role": "user", "content": "hi"}]}
MODELS = {"openai/gpt-5": chunked(CHUNK), "anthropic/claude-sonnet-4-5": chunked(*BEGIN)}
# Of the event loop: cancelled once more in each.
TURNS = 12


@pytest.fixture
async def translate() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client() as opened:
        yield opened


def record_of(model: str, server: RawUpstream) -> ModelRecord:
    base = server.url.removesuffix("/v1") if model.startswith("anthropic") else server.url
    return ModelRecord("theirs", {"model": model, "api_base": base, "api_key": "sk-x"}, ModelInfo(), "admin", 0.0)


async def insist(task: asyncio.Task[None]) -> None:
    for _ in range(TURNS):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({task})


@pytest.mark.parametrize("model", MODELS)
async def test_a_stream_is_closed_however_often_its_reader_is_cancelled(translate: LiteLLMClient, model: str) -> None:
    async with RawUpstream(Reply(MODELS[model][:-1], "hang")) as server:
        began = asyncio.Event()

        async def read() -> None:
            stream = PulledBlocks(await translate.stream(record_of(model, server), ASK))
            async with aclosing(stream):
                async for _ in stream:
                    began.set()

        task = asyncio.create_task(read())
        await began.wait()
        assert server.open == 1
        await insist(task)
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", MODELS)
async def test_a_call_is_given_up_however_often_its_caller_is_cancelled(
    translate: LiteLLMClient, model: str, *, stream: bool
) -> None:
    async with RawUpstream(Reply((), "hang")) as server:
        call = translate.stream if stream else translate.complete

        async def ask() -> None:
            await call(record_of(model, server), ASK)

        task = asyncio.create_task(ask())
        await until(lambda: len(server.bodies) == 1)
        await insist(task)
        await until(lambda: server.open == 0)
