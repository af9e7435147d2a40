from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import BadRequest, UpstreamError
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.client import UpstreamClient
from proxy.upstream.key_scope import check_secrets_stay, is_own_address
from proxy.upstream.litellm_client import LiteLLMClient
from proxy.upstream.provider_resolution import CACHE_FILE, Resolver
from tests.support.litellm_calls import open_litellm_client
from tests.support.makers import a_record
from tests.support.scripted_upstream import ScriptedUpstream

CANARY = "canary-of-the-environment"
BODY: Any = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
FOREIGN = "http://127.0.0.1:9/v1"
PROVIDERS = frozenset(
    """
    anthropic azure bedrock cerebras cohere_chat databricks deepinfra deepseek fireworks_ai gemini groq hosted_vllm
    huggingface litellm_proxy mistral nvidia_nim ollama ollama_chat openrouter perplexity replicate sambanova
    together_ai vertex_ai watsonx xai
    """.split()
)
SECRETS = frozenset(
    """
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AZURE_AD_TOKEN AZURE_OPENAI_API_KEY CO_API_KEY
    DATABRICKS_API_KEY GOOGLE_API_KEY HF_TOKEN HUGGINGFACE_API_KEY REPLICATE_API_TOKEN TOGETHERAI_API_KEY
    TOGETHER_AI_TOKEN PERPLEXITYAI_API_KEY WATSONX_TOKEN FIREWORKS_API_KEY FIREWORKSAI_API_KEY
    """.split()
)


def model(name: str, **params: Any) -> ModelRecord:
    return replace(a_record("m"), litellm_params={"model": name, **params})


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiteLLMClient]:
    for name in [*SECRETS, *(f"{provider.upper()}_API_KEY" for provider in PROVIDERS)]:
        monkeypatch.setenv(name, CANARY)
    async with open_litellm_client({"OLLAMA_API_KEY": CANARY}) as opened:
        yield opened


async def test_no_key_of_the_environment_is_sent_to_another_address(upstream: LiteLLMClient) -> None:
    with ScriptedUpstream() as server:
        for provider in PROVIDERS:
            for base in (server.url, server.url.removesuffix("/v1")):
                with suppress(UpstreamError):
                    await upstream.complete(model(f"{provider}/x", api_base=base), BODY)
        assert len(server.history) > len(PROVIDERS)
        leaked = [each.path for each in server.history if CANARY in f"{each.path}{each.headers}{each.raw!r}"]
        assert leaked == []


async def test_credentials_that_litellm_looks_up_anyway_have_to_be_stated(upstream: LiteLLMClient) -> None:
    with pytest.raises(UpstreamError, match="credentials are for bedrock's own address"):
        await upstream.complete(model("bedrock/anthropic.claude-v2", api_base=FOREIGN), BODY)


@pytest.mark.parametrize(
    ("provider", "address", "own"),
    [
        ("deepseek", "https://api.deepseek.com/other", True),
        ("deepseek", "http://api.deepseek.com", False),
        ("deepseek", "https://api.deepseek.com:8443", False),
        ("deepseek", "https://api.deepseek.com.elsewhere.example", False),
        ("deepseek", "https://api.deepseek.com@elsewhere.example", False),
        ("deepseek", "https://API.DEEPSEEK.COM:443/v1", True),
        ("mistral", "http://gateway.example/v1", True),
        ("mistral", "http://gateway.example:81/v1", False),
        ("anthropic", "https://api.anthropic.com", True),
        ("vertex_ai", "https://eu-aiplatform.googleapis.com/v1", True),
        ("vertex_ai", "https://googleapis.com.elsewhere.example/v1", False),
        ("openai", "https://eu.api.openai.com/v1", True),
        ("deepseek", "nonsense", False),
        ("deepseek", "http://[::1", False),
    ],
)
def test_a_providers_own_addresses_are_the_default_and_those_of_the_environment(
    provider: str, address: str, *, own: bool
) -> None:
    default = "https://api.deepseek.com/beta" if provider == "deepseek" else None
    assert is_own_address(address, provider, default, {"MISTRAL_API_BASE": "http://gateway.example/v2"}) == own


ELSEWHERE = model("deepseek/x", api_base=FOREIGN)
KEYLESS = model("deepseek/x", api_base=FOREIGN, api_key="none")
AT_HOME = model("deepseek/x")
HOLDING = model("deepseek/x", api_base=f"http://me:{CANARY}@127.0.0.1:9/v1?key={CANARY}", api_key="none")


async def test_a_key_that_would_be_looked_up_for_another_address_has_to_be_stated(tmp_path: Path) -> None:
    without = await Resolver(tmp_path, {}).resolve_all([ELSEWHERE, KEYLESS, AT_HOME, HOLDING])  # litellm is asked once
    assert [record.resolved is not None and record.resolved.key_variable for record in without] == [
        *(None, None, "DEEPSEEK_API_KEY", None)
    ]
    assert CANARY not in (tmp_path / CACHE_FILE).read_text() + str(without[3].resolved)
    resolver = Resolver(tmp_path, {"DEEPSEEK_API_KEY": CANARY})
    assert await resolver.resolve_all([KEYLESS, AT_HOME]) == without[1:3]
    with pytest.raises(BadRequest, match=r"DEEPSEEK_API_KEY is for deepseek's own address.*api_key: none") as refused:
        await resolver.resolve(ELSEWHERE)
    assert refused.value.param == "litellm_params.api_key"
    with pytest.raises(SettingsError, match=r"os\.environ/DEEPSEEK_API_KEY"):
        await resolver.resolve_all([ELSEWHERE])


async def test_a_record_of_an_older_version_sends_no_key_elsewhere() -> None:
    environ = {"DEEPSEEK_API_KEY": CANARY}
    with ScriptedUpstream() as server:
        older = ResolvedProvider("relay", "x", "deepseek", server.url, "DEEPSEEK_API_KEY")
        record = replace(model("deepseek/x", api_base=server.url), resolved=older)
        upstream = UpstreamClient(Settings(), environ)
        await upstream.complete(record, BODY)
        await upstream.aclose()
        assert "authorization" not in server.last.headers


def resolved(name: str, provider: str, **params: Any) -> ModelRecord:
    return replace(model(name, **params), resolved=ResolvedProvider("translate", name, provider))


@pytest.mark.parametrize(
    ("after", "changes", "refused"),
    [
        (resolved("gpt-5-mini", "openai", api_key="os.environ/A_API_KEY"), {}, False),
        (resolved("claude", "anthropic", api_key="os.environ/A_API_KEY"), {}, True),
        (resolved("claude", "anthropic", api_key="os.environ/A_API_KEY"), {"api_key": "os.environ/A_API_KEY"}, False),
        (resolved("claude", "anthropic"), {}, False),
        (resolved("gpt-5", "openai", headers={"x": "os.environ/A_API_KEY"}, api_base=FOREIGN), {}, True),
        (resolved("gpt-5", "openai", headers={"x": "blue"}, api_base=FOREIGN), {}, False),
        (
            resolved("gpt-5", "openai", aws_session_token="os.environ/A_API_KEY", aws_sts_endpoint="http://h"),
            {},
            True,
        ),
    ],
)
def test_a_change_of_provider_or_address_needs_its_secrets_stated_again(
    after: ModelRecord, changes: Mapping[str, Any], *, refused: bool
) -> None:
    before = resolved("gpt-5", "openai", api_key="os.environ/A_API_KEY")
    if not refused:
        check_secrets_stay(before, after, changes)
        return
    with pytest.raises(BadRequest, match=r"again in the same change, or null to drop it"):
        check_secrets_stay(before, after, changes)
