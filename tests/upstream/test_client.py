from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from proxy.upstream.litellm_client import LiteLLMClient, LiteLLMTarget
from proxy.upstream.litellm_resolver import resolve_with_litellm
from proxy.upstream.litellm_transport import import_litellm
from proxy.upstream.provider_resolution import cache_query, resolve_static
from tests.support.litellm_calls import open_litellm_client, translated, translated_chunks
from tests.support.makers import a_record
from tests.support.scripted_answers import CLAUDE, Step
from tests.support.scripted_upstream import ScriptedUpstream

OPENAI_KEY = "sk-of-openai-alone"
OPENAIS = ["openai/x", "custom_openai/x", "lm_studio/x", "llamafile/x", "gpt-4o-mini"]
COMPATIBLE = ["nvidia_nim", "perplexity", "cerebras", "moonshot", "github", "xinference", "groq"]
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def upstream() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client({"OPENAI_API_KEY": OPENAI_KEY}) as opened:
        yield opened


def resolved(record: ModelRecord, forward: Any) -> ModelRecord:
    """Return the provider as it is stored once litellm was asked."""
    params = record.litellm_params
    found = resolve_static(params, forward) or resolve_with_litellm(import_litellm(), cache_query(params), forward)
    return replace(record, resolved=found)


@pytest.mark.parametrize("model", OPENAIS)
async def test_openais_key_is_not_sent_to_another_address_through_litellm(
    upstream: LiteLLMClient, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI_KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-openai-alone")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-openai-alone")
    with ScriptedUpstream() as server:
        await upstream.complete(a_record(model=model, api_base=server.url), BODY)

        assert not any("of-openai-alone" in value for value in server.last.headers.values())


@pytest.mark.parametrize("model", OPENAIS)
async def test_openais_key_is_not_sent_to_another_address_directly(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    with ScriptedUpstream() as server:
        record = resolved(a_record(model=model, api_base=server.url), "auto")
        for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, OPENAI_KEY)
        upstream = UpstreamClient(Settings(), {"OPENAI_API_KEY": OPENAI_KEY})
        answer = await upstream.complete(record, BODY)
        await upstream.aclose()

        assert answer.raw is not None
        assert not any(OPENAI_KEY in value for value in server.last.headers.values())


async def test_openai_itself_gets_its_key_from_the_environment(upstream: LiteLLMClient) -> None:
    client = upstream._openai_client(LiteLLMTarget("openai", "gpt-4o-mini", None), {})

    assert (client.api_key, client.base_url.host) == (OPENAI_KEY, "api.openai.com")


@pytest.mark.parametrize("name", COMPATIBLE)
async def test_openai_compatible_providers_are_reached(upstream: LiteLLMClient, name: str) -> None:
    with ScriptedUpstream() as server:
        server.then(Step(extra={"service_tier": "default"}))
        record = a_record(model=f"{name}/x", api_base=server.url, api_key="key-of-this-one")
        answer = await translated(upstream, record, BODY)

        assert answer["choices"][0]["message"]["content"]
        assert server.last.headers["authorization"] == "Bearer key-of-this-one"


@pytest.mark.parametrize("name", COMPATIBLE)
async def test_openai_compatible_providers_are_called_directly_if_configured(name: str) -> None:
    upstream = UpstreamClient(Settings(), {})
    with ScriptedUpstream() as server:
        record = resolved(a_record(model=f"{name}/x", api_base=server.url, api_key="key-of-this-one"), "relay")
        answer = await upstream.complete(record, BODY)
        await upstream.aclose()

        assert answer.raw is not None
        assert (server.last.headers["authorization"], server.last.body["model"]) == ("Bearer key-of-this-one", "x")


@pytest.mark.parametrize("field", ["tools", "web_search_options"])
async def test_a_field_that_litellm_rejects_is_the_requests_fault(upstream: LiteLLMClient, field: str) -> None:
    with ScriptedUpstream() as server:
        server.then(Step(body=CLAUDE))
        record = a_record(model="anthropic/claude-3-5-sonnet-20241022", api_base=server.url, api_key="key-of-this-one")
        with pytest.raises(UpstreamError) as caught:
            await upstream.complete(record, {**BODY, field: 5})

    assert caught.value.status == 400
    assert "format" in caught.value.message


async def test_a_model_of_no_known_provider_is_not_the_callers_fault(upstream: LiteLLMClient) -> None:
    with pytest.raises(UpstreamError, match="no provider is known") as caught:
        await upstream.complete(a_record(model="nonsense"), BODY)

    assert caught.value.status is None
    assert caught.value.retryable


async def test_broken_stream_options_of_a_model_do_not_break_its_streams(upstream: LiteLLMClient) -> None:
    with ScriptedUpstream() as server:
        record = a_record(model="openai/x", api_base=server.url, stream_options=5)
        chunks = await translated_chunks(upstream, record, BODY)

    assert chunks[-1]["usage"]


@pytest.mark.parametrize("model", ["openai/x", "anthropic/claude-sonnet-4-5", "hosted_vllm/x", "gemini/gemini-2.5-pro"])
async def test_a_connection_that_dies_is_one_request_and_reported_as_lost(upstream: LiteLLMClient, model: str) -> None:
    with ScriptedUpstream() as server:
        server.always = Step(drop=True)
        with pytest.raises(UpstreamError) as caught:
            await upstream.complete(a_record(model=model, api_base=server.url, api_key="sk-of-somebody"), BODY)
        assert (len(server.history), caught.value.connection_lost) == (1, True)
