from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from proxy.settings.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.litellm_client import LiteLLMClient
from proxy.upstream.pool import ConnectionPool
from proxy.upstream.response_memory import ResponseMemory
from tests.support.chunk_streams import PulledBlocks


@asynccontextmanager
async def open_litellm_client(
    environ: Mapping[str, str] | None = None, settings: Settings | None = None
) -> AsyncIterator[LiteLLMClient]:
    """Open a client that calls models through litellm, ready for the first call."""
    outbound = Outbound(environ or {})
    pool = ConnectionPool(100, outbound.context)
    settings = settings or Settings()
    memory = ResponseMemory(settings.max_answer_bytes, settings.max_answers_in_flight_bytes)
    client = LiteLLMClient(settings, environ or {}, outbound, pool, memory)
    await client.prepare()
    yield client
    await client.aclose()
    await pool.aclose()


async def translated(client: LiteLLMClient, record: ModelRecord, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole completion."""
    return (await client.complete(record, body)).body


async def translated_chunks(
    client: LiteLLMClient, record: ModelRecord, body: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the chunks of a stream."""
    blocks = PulledBlocks(await client.stream(record, {**body, "stream": True}))
    return [chunk.body async for block in blocks for chunk in block]
