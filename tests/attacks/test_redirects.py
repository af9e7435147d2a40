"""A followed redirect would send the prompt, and in some formats the key, to wherever an upstream points."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.litellm_client import LiteLLMClient
from proxy.upstream.litellm_transport import import_litellm
from tests.attacks.conftest import ASK
from tests.support.chunk_streams import PulledBlocks
from tests.support.litellm_calls import open_litellm_client
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream

# One or more of each way in which litellm comes by its client.
SOME = (
    *(
        "aiohttp_openai",
        "anthropic",
        "anthropic_text",
        "azure",
        "bedrock",
        "cloudflare",
        "cohere_chat",
        "gemini",
        "groq",
    ),
    *("maritalk", "mistral", "ollama", "openai", "openai_like", "oobabooga", "text-completion-codestral"),
    *("text-completion-openai", "azure_text"),
)
MORE: dict[str, dict[str, Any]] = {
    **{name: {"api_version": "2024-10-21"} for name in ("azure", "azure_text")},
    "bedrock": {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region_name": "us-east-1"},
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as started:
        yield started


@pytest.fixture(scope="module")
def pointing(elsewhere: ScriptedUpstream) -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as started:
        started.always = Step(status=307, headers={"location": f"{elsewhere.url}/x"}, body=b"")
        yield started


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client(
        {"MODEL_API_KEY": "sk-of-the-provider"}, settings=Settings(data_dir=tmp_path, request_timeout_s=3)
    ) as opened:
        yield opened


async def ask(client: LiteLLMClient, provider: str, api_base: str) -> None:
    params = {"model": f"{provider}/x", "api_base": api_base, "api_key": "os.environ/MODEL_API_KEY"}
    record = ModelRecord("m", params | MORE.get(provider, {}), ModelInfo(), "config", 0.0)
    body = {"model": "m", "messages": ASK}
    for stream in (False, True):
        with contextlib.suppress(UpstreamError):
            async with asyncio.timeout(60):
                if stream:
                    async for _ in PulledBlocks(await client.stream(record, body)):
                        pass
                else:
                    await client.complete(record, body)


@pytest.mark.parametrize("provider", SOME)
async def test_a_redirect_is_not_followed(
    client: LiteLLMClient, pointing: ScriptedUpstream, elsewhere: ScriptedUpstream, provider: str
) -> None:
    await ask(client, provider, pointing.url)

    assert elsewhere.history == []


@pytest.mark.slow
async def test_no_provider_that_litellm_knows_follows_a_redirect(
    client: LiteLLMClient, pointing: ScriptedUpstream, elsewhere: ScriptedUpstream
) -> None:
    pointing.history.clear()
    reached = []
    for provider in sorted({kind.value for kind in import_litellm().LlmProviders}):
        with contextlib.suppress(TimeoutError):
            await ask(client, provider, pointing.url)
        reached += [provider] if pointing.history else []
        pointing.history.clear()
        assert elsewhere.history == [], provider

    assert len(reached) > 60
