from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import BadRequest, UpstreamError
from proxy.settings.litellm_params import is_openai_url
from proxy.settings.model_config import ModelInfo
from proxy.settings.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.client import UpstreamClient, is_direct
from proxy.upstream.direct_target import DirectTargets, url_of
from proxy.upstream.key_scope import restore_credentials
from proxy.upstream.pool import basic_auth_of
from proxy.upstream.provider_resolution import CACHE_FILE, Resolver, resolve_static
from tests.support.makers import a_record
from tests.support.scripted_upstream import ScriptedUpstream

NEAR = "http://127.0.0.1:9/v1"
AZURE = "https://r.openai.azure.com"
AZURE_V1 = f"{AZURE}/openai/v1/"
CANARY = "sk-canary-of-the-environment"
BODY: Any = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
RENAMED = {"max_completion_tokens": "max_tokens"}


def a_model(forward: Any = "auto", **params: Any) -> ModelRecord:
    info = ModelInfo.model_validate({"free": True, "forward": forward})
    return replace(a_record("m"), litellm_params=params, info=info)


def relay(provider: str, model: str, base: str, key: str | None = None, renames: Any = None) -> ResolvedProvider:
    return ResolvedProvider("relay", model, provider, base, key, renames or {}, own_address=key is not None)


def translate(provider: str, model: str = "x", base: str | None = None) -> ResolvedProvider:
    return ResolvedProvider("translate", model, provider, base)


FOUND: list[tuple[ModelRecord, ResolvedProvider | str]] = [
    (a_model(model="openai/gpt-4o"), relay("openai", "gpt-4o", "https://api.openai.com/v1", "OPENAI_API_KEY")),
    (a_model(model="gpt-4o-mini"), relay("openai", "gpt-4o-mini", "https://api.openai.com/v1", "OPENAI_API_KEY")),
    (
        a_model(model="openai/o3"),
        relay("openai", "o3", "https://api.openai.com/v1", "OPENAI_API_KEY", {"max_tokens": "max_completion_tokens"}),
    ),
    (
        a_model(model="openai/gpt-4o", api_base="https://api.openai.com/v1"),
        relay("openai", "gpt-4o", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    ),
    (a_model(model="gpt-4o-mini", api_base=NEAR), relay("openai", "gpt-4o-mini", NEAR)),  # no key to others
    (a_model(model="custom_openai/x"), translate("custom_openai")),
    (
        a_model(model="azure/x", api_base=f"{AZURE}/openai/v1"),
        relay("azure", "x", f"{AZURE}/openai/v1"),
    ),
    (a_model(model="azure/x", api_base=AZURE, api_version="2024-10-21"), translate("azure")),
    (a_model(model="deepseek/x"), relay("deepseek", "x", "https://api.deepseek.com/beta", "DEEPSEEK_API_KEY")),
    (a_model(model="groq/a/b"), relay("groq", "a/b", "https://api.groq.com/openai/v1", "GROQ_API_KEY", RENAMED)),
    (a_model(model="groq/x", api_base=NEAR), relay("groq", "x", NEAR, None, RENAMED)),
    (a_model(model="groq/x", base_url=NEAR), relay("groq", "x", NEAR, None, RENAMED)),
    (
        a_model(model="x", custom_llm_provider="groq"),
        relay("groq", "x", "https://api.groq.com/openai/v1", "GROQ_API_KEY", RENAMED),
    ),
    (a_model(model="mistral/x"), relay("mistral", "x", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", RENAMED)),
    (a_model(model="openrouter/a/b"), relay("openrouter", "a/b", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY")),
    (a_model(model="together_ai/x"), relay("together_ai", "x", "https://api.together.ai/v1", "TOGETHERAI_API_KEY")),
    (
        a_model(model="fireworks_ai/x"),
        relay("fireworks_ai", "x", "https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY", RENAMED),
    ),
    (a_model(model="xai/x"), relay("xai", "x", "https://api.x.ai/v1", "XAI_API_KEY", RENAMED)),
    (a_model(model="groq/x", api_base=NEAR, ssl_verify=False), relay("groq", "x", NEAR, None, RENAMED)),
    (a_model(model="groq/x", api_base=NEAR, drop_params=True), translate("groq")),
    (a_model("translate", model="groq/x", api_base=NEAR), translate("groq")),
    *[
        (a_model(model=f"{name}/x", api_base=NEAR), translate(name))
        for name in ("anthropic", "gemini", "ollama", "ollama_chat", "bedrock", "cohere_chat", "vertex_ai")
    ],
    (a_model("relay", model="anthropic/x", api_base=NEAR), relay("anthropic", "x", NEAR, None, RENAMED)),
    (a_model("relay", model="gemini/x", api_base=NEAR), relay("gemini", "x", NEAR)),
    (a_model("relay", model="bedrock/x", api_base=NEAR), relay("bedrock", "x", NEAR, None, RENAMED)),
    (a_model("relay", model="ollama/x", api_base=NEAR), relay("ollama", "x", NEAR)),
    *[
        (a_model("relay", model=f"{name}/x"), "forward: relay needs api_base")
        for name in ("anthropic", "gemini", "ollama", "bedrock", "azure", "hosted_vllm")
    ],
    *[
        (a_model(forward, **params), "no provider is known by its name")
        for forward in ("auto", "relay", "translate")
        for params in ({"model": "nonsense/x", "api_base": NEAR}, {"model": "nonsense"}, {"model": "nonsense/x"})
    ],
    *[
        (a_model("relay", model=model, api_base=NEAR, drop_params=True), "no place for litellm_params.drop_params")
        for model in ("groq/x", "openai/x")
    ],
    (a_model(model="aiohttp_openai/x", api_base=NEAR), "follows redirects"),
    (a_model(model="text-completion-inception/x", api_base=NEAR), "does not chat"),
    (a_model(model="text-completion-openai/x", api_base=NEAR), translate("text-completion-openai")),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRecord | str]:
    """Resolve all of them in one process."""
    resolver = Resolver(tmp_path_factory.mktemp("resolving"), {})

    async def each() -> list[ModelRecord | str]:
        await resolver.resolve_all([record for record, _ in FOUND])
        outcomes: list[ModelRecord | str] = []
        for record, _ in FOUND:
            try:
                outcomes.append(await resolver.resolve(record))
            except BadRequest as error:
                outcomes.append(f"{error.param}: {error.message}")
        return outcomes

    return asyncio.run(each())


@pytest.mark.parametrize("place", range(len(FOUND)), ids=[f"{r.info.forward}-{r.litellm_params}" for r, _ in FOUND])
def test_each_provider_is_called_directly_or_through_litellm(found: list[ModelRecord | str], place: int) -> None:
    outcome, expected = found[place], FOUND[place][1]
    if isinstance(expected, str):
        assert isinstance(outcome, str)
        assert outcome.startswith("litellm_params.model: m: ")
        assert expected in outcome
    else:
        assert isinstance(outcome, ModelRecord)
        assert outcome.resolved == expected
        assert (is_direct(outcome) is not None) == (expected.mode == "relay")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (a_model(model="openai/a/b", api_base=NEAR), relay("openai", "a/b", NEAR)),
        (a_model(model="hosted_vllm/x", base_url=NEAR, api_base="http://no"), relay("hosted_vllm", "x", NEAR)),
        (a_model(model="a/b", custom_llm_provider="openai", api_base=NEAR), relay("openai", "a/b", NEAR)),
        (a_model(model="openai/x", custom_llm_provider="openai", api_base=NEAR), relay("openai", "x", NEAR)),
        (
            a_model(model="openai/x", api_base=NEAR, api_key="k", headers={}, organization="o"),
            relay("openai", "x", NEAR),
        ),
        (a_model("translate", model="openai/x", api_base=NEAR), translate("openai", base=NEAR)),
        (a_model(model="openai/x", api_base=NEAR, drop_params=True), translate("openai", base=NEAR)),
        (a_model("relay", model="openai/x", api_base=NEAR, temperature=1), relay("openai", "x", NEAR)),
        (a_model(model="openai/x"), None),
        (a_model(model="openai/x", api_base="https://api.openai.com/v1"), None),
        (a_model(model="groq/x", api_base=NEAR), None),
        (a_model(model="openai", api_base=NEAR), None),
    ],
)
def test_servers_of_openais_format_are_resolved_without_litellm(
    record: ModelRecord, expected: ResolvedProvider | None
) -> None:
    assert resolve_static(record.litellm_params, record.info.forward) == expected


@pytest.mark.parametrize(
    ("address", "openais"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com", True),
        ("HTTPS://API.OPENAI.COM:443/v1", True),
        ("https://elsewhere.example/api.openai.com/v1", False),
        ("https://api.openai.com.elsewhere.example/v1", False),
        ("https://api.openai.com@elsewhere.example/v1", False),
        ("https://elsewhere.example/?x=api.openai.com", False),
        ("https://notapi.openai.com/v1", False),
    ],
)
def test_only_openais_hosts_are_openais_addresses(address: str, openais: bool) -> None:
    """The name of the host within another address is no such host."""
    assert is_openai_url(address) == openais


@pytest.mark.parametrize(
    ("base", "url"),
    [
        (NEAR, f"{NEAR}/chat/completions"),
        (f"{NEAR}/", f"{NEAR}/chat/completions"),
        (f"{NEAR}/chat/completions", f"{NEAR}/chat/completions"),
        (f"{NEAR}?api-version=preview", f"{NEAR}/chat/completions?api-version=preview"),
    ],
)
def test_the_path_of_chat_completions_is_appended_to_the_address(base: str, url: str) -> None:
    assert url_of(base) == url


async def test_a_key_of_the_environment_is_sent_and_not_stored(tmp_path: Path) -> None:
    environ = {"MISTRAL_API_KEY": CANARY}
    with ScriptedUpstream() as server:
        environ["MISTRAL_API_BASE"] = server.url
        record = await Resolver(tmp_path, environ).resolve(a_model(model="mistral/x", api_base=server.url))
        upstream = UpstreamClient(Settings(), environ)
        body = {**BODY, "max_completion_tokens": 7}
        await upstream.complete(record, body, raw=json.dumps(body).encode())
        await upstream.aclose()

        assert server.last.headers["authorization"] == f"Bearer {CANARY}"
        assert (server.last.body["max_tokens"], "max_completion_tokens" in server.last.body) == (7, False)
    assert record.resolved is not None
    target = DirectTargets(Settings(), environ, Outbound({})).get(record, record.resolved)
    kept = (tmp_path / CACHE_FILE).read_text() + record.to_json() + repr(record) + repr(target) + repr(record.resolved)
    assert "MISTRAL_API_KEY" in kept
    assert CANARY not in kept


async def test_credentials_in_an_address_of_the_environment_are_sent_and_not_stored(tmp_path: Path) -> None:
    with ScriptedUpstream() as server:
        environ = {"GROQ_API_BASE": server.url.replace("//", f"//user:{CANARY}@") + f"/?key={CANARY}"}
        record = await Resolver(tmp_path, environ).resolve(a_model(model="groq/x", api_key=None))
        upstream = UpstreamClient(Settings(), environ)
        await upstream.complete(record, BODY)
        await upstream.aclose()

        assert server.last.headers["authorization"] == basic_auth_of(environ["GROQ_API_BASE"])
        assert server.last.path == f"/v1/chat/completions?key={CANARY}"
    assert record.resolved is not None
    assert CANARY not in (tmp_path / CACHE_FILE).read_text() + record.to_json()


@pytest.mark.parametrize(
    ("address", "provider", "full"),
    [
        ("http://a/v1", "groq", "http://one:1@a/v1"),
        ("http://a/v1/", "groq", "http://one:1@a/v1/"),
        ("http://a/v1/more", "groq", "http://one:1@a/v1/more"),
        ("http://a/v1", "xai", "http://two:2@a/v1"),
        ("http://b/v1", "xai", "http://b/v1?key=3"),
        ("http://a/v12", "groq", "http://a/v12"),
        ("http://a.example/v1", "groq", "http://a.example/v1"),
        ("https://a/v1", "groq", "https://a/v1"),
        ("http://c/v1", "groq", "http://c/v1"),
    ],
)
def test_credentials_go_to_the_address_they_were_stated_with(address: str, provider: str, full: str) -> None:
    environ = {
        "GROQ_API_BASE": "http://one:1@a/v1",
        "XAI_API_BASE": "http://two:2@a/v1/",
        "OTHER_BASE_URL": "http://b/v1?key=3",
        "EMPTY_API_BASE": "",
        "PLAIN_BASE": "http://four:4@c/v1",
    }
    assert restore_credentials(address, provider, environ) == full


@pytest.mark.parametrize("variable", ["UNIROUTE_ADMIN_KEY", "AWS_SECRET_ACCESS_KEY", "HOME", "UNIROUTE_X_API_KEY"])
def test_a_record_that_names_another_variable_gets_no_key(variable: str) -> None:
    """Whoever can write to the store may not read the environment."""
    record, resolved = a_record(), ResolvedProvider("relay", "m", "x", NEAR, variable, own_address=True)
    with pytest.raises(UpstreamError, match="no key"):
        DirectTargets(Settings(), {variable: CANARY}, Outbound({})).get(record, resolved)


@pytest.mark.parametrize("forward", ["auto", "relay", "translate"])
async def test_a_model_that_an_older_version_stored_still_answers(forward: str) -> None:
    with ScriptedUpstream() as server:
        record = a_model(forward, model="openai/x", api_base=server.url, api_key="sk-of-the-arm")
        stored = ModelRecord.from_json("m", record.to_json())
        upstream = UpstreamClient(Settings(), {})
        answer = await upstream.complete(stored, BODY)
        await upstream.aclose()

    assert (stored.resolved, answer.body["object"]) == (None, "chat.completion")
    assert (server.last.headers["user-agent"] == "uniroute") == (forward != "translate")


@pytest.mark.parametrize("resolved", [relay("groq", "x", NEAR, "GROQ_API_KEY", RENAMED), translate("anthropic")])
def test_the_resolved_provider_is_stored_with_the_model(resolved: ResolvedProvider) -> None:
    record = a_model(model="groq/x", api_base=NEAR)
    kept = replace(record, resolved=resolved)

    assert ModelRecord.from_json("m", kept.to_json()).resolved == resolved
    assert kept.fingerprint == record.fingerprint
