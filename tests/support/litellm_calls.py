from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from proxy.settings.schema import Settings
from proxy.upstream.litellm_client import LiteLLMClient


@asynccontextmanager
async def open_litellm_client(
    environ: Mapping[str, str] | None = None, settings: Settings | None = None
) -> AsyncIterator[LiteLLMClient]:
    """Open a client that calls models through litellm, ready for the first call."""
    client = LiteLLMClient(settings or Settings(), environ or {})
    await client.prepare()
    yield client
    await client.aclose()
