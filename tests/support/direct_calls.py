from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from tests.support.chunk_streams import PulledBlocks
from tests.support.makers import a_record
from tests.support.raw_upstream import CHUNK, DONE, END, JSON, RawUpstream, Reply, chunked

KEY = "sk-canary-of-the-relay"
WHOLE = Reply(chunked(CHUNK, END, DONE))
BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}


def a_model(server: RawUpstream, **params: Any) -> ModelRecord:
    all_params = {"model": "openai/theirs", "api_base": server.url, "api_key": "os.environ/MODEL_API_KEY"}
    return replace(a_record("ours"), litellm_params={**all_params, **params})


def model_in_mode(server: RawUpstream, mode: str, **info: Any) -> ModelRecord:
    return replace(a_model(server), info=a_record("ours", info={"forward": mode, **info}).info)


async def completion_of(upstream: UpstreamClient, record: ModelRecord) -> bytes:
    return (await upstream.complete(record, BODY)).with_model("ours")


async def stream_of(upstream: UpstreamClient, record: ModelRecord) -> list[bytes]:
    found: list[bytes] = []
    stream = PulledBlocks(await upstream.stream(record, {**BODY, "stream": True}))
    try:
        async for block in stream:
            found += [chunk.with_model("ours") for chunk in block]
    finally:
        await stream.aclose()
    return found


async def error_of(upstream: UpstreamClient, record: ModelRecord, ask: Callable[..., Any]) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        async with asyncio.timeout(60):
            await ask(upstream, record)
    assert KEY not in f"{caught.value.message}{caught.value.body!r}{caught.value.headers}"
    return caught.value


# It says that there is more to come.
SHORT = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + JSON
