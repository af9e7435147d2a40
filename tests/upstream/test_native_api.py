from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.settings.model_config import ModelInfo, NativeAPI, UpstreamAPI
from proxy.settings.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.client import NativeRequest, UpstreamClient
from proxy.upstream.direct_target import DirectTarget, DirectTargets, url_of
from proxy.upstream.native_api import native_apis, native_provider
from tests.support.makers import a_record
from tests.support.native_answers import MESSAGE, RESPONSE
from tests.support.raw_upstream import RawUpstream, plain

ANTHROPIC_KEY = "key-of-anthropic-alone"
OPENAI_KEY = "key-of-openai-alone"
ENVIRON = {"ANTHROPIC_API_KEY": ANTHROPIC_KEY, "OPENAI_API_KEY": OPENAI_KEY, "MODEL_API_KEY": "key-of-the-model"}
CLAUDE = ResolvedProvider("translate", "claude-opus-4-8", "anthropic")
GPT = ResolvedProvider("relay", "gpt-5", "openai", "https://api.openai.com/v1", "OPENAI_API_KEY", own_address=True)
ELSEWHERE = "http://127.0.0.1:9/v1"


def a_model(resolved: ResolvedProvider, info: dict[str, Any] | None = None, **params: Any) -> ModelRecord:
    record = a_record("ours", info=info or {})
    return replace(
        record, litellm_params={"model": f"{resolved.provider}/{resolved.model}", **params}, resolved=resolved
    )


def target_of(record: ModelRecord, api: UpstreamAPI, environ: Mapping[str, str] = ENVIRON) -> DirectTarget:
    resolved = native_provider(record)
    assert resolved is not None
    return DirectTargets(Settings(), environ, Outbound(environ)).get(record, resolved, api)


@pytest.mark.parametrize(
    ("resolved", "params", "expected"),
    [
        (CLAUDE, {}, {"messages"}),
        (replace(CLAUDE, own_address=True), {"api_base": "https://api.anthropic.com"}, {"messages"}),
        (CLAUDE, {"api_base": ELSEWHERE}, set()),
        (GPT, {}, {"responses"}),
        (GPT, {"api_base": "https://eu.api.openai.com/v1"}, {"responses"}),
        (replace(GPT, api_base=ELSEWHERE, own_address=False), {"api_base": ELSEWHERE}, set()),
        (replace(GPT, provider="openrouter", api_base="https://openrouter.ai/api/v1"), {}, set()),
        (ResolvedProvider("translate", "claude", "bedrock"), {}, set()),
    ],
)
def test_by_default_an_api_is_spoken_at_its_providers_own_address_alone(
    resolved: ResolvedProvider, params: dict[str, Any], expected: set[str]
) -> None:
    assert native_apis(a_model(resolved, **params)) == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("messages", {"messages"}), (["chat", "responses"], {"responses"}), ("chat", set()), (["chat"], set())],
)
def test_what_is_stated_holds_at_any_address(stated: Any, expected: set[str]) -> None:
    at_others = a_model(replace(GPT, api_base=ELSEWHERE), {"api": stated}, api_base=ELSEWHERE)
    assert native_apis(at_others) == native_apis(a_model(CLAUDE, {"api": stated})) == expected
    assert native_apis(replace(at_others, resolved=None)) == expected


def test_a_model_without_a_known_address_is_asked_in_no_other_api() -> None:
    bedrock = ResolvedProvider("translate", "claude", "bedrock")

    assert native_apis(a_model(bedrock, {"api": "messages"})) == set()
    assert native_apis(a_model(bedrock, {"api": "messages"}, api_base=ELSEWHERE)) == {"messages"}


@pytest.mark.parametrize("stated", ["embeddings", [], ["chat", "voice"], 7])
def test_an_api_that_nobody_speaks_is_refused(stated: Any) -> None:
    with pytest.raises(ValidationError):
        ModelInfo.model_validate({"api": stated})


@pytest.mark.parametrize(
    ("params", "is_native"),
    [
        ({"temperature": 0.2, "max_tokens": 9, "system": "x", "reasoning_effort": "low"}, True),
        ({"drop_params": True}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"extra_body": {"x": 1}}, False),
        ({"api_version": "2024-01-01"}, False),
        ({"aws_region_name": "eu-1"}, False),
    ],
)
def test_a_model_whose_parameters_have_no_place_in_an_api_is_translated(params: Any, is_native: bool) -> None:
    assert bool(native_apis(a_model(CLAUDE, **params))) is is_native


def test_a_model_that_is_to_be_translated_is_not_relayed() -> None:
    assert native_apis(a_model(CLAUDE, {"forward": "translate"})) == set()
    assert native_apis(a_model(CLAUDE, {"forward": "translate", "api": "messages"})) == {"messages"}


@pytest.mark.parametrize(
    ("base", "api", "url"),
    [
        ("https://a.example", "messages", "https://a.example/v1/messages"),
        ("https://a.example/v1/", "messages", "https://a.example/v1/messages"),
        ("https://a.example/v1/messages", "messages", "https://a.example/v1/messages"),
        ("https://a.example/anthropic", "messages", "https://a.example/anthropic/v1/messages"),
        ("https://a.example/v1/chat/completions", "messages", "https://a.example/v1/messages"),
        ("https://a.example/v1", "responses", "https://a.example/v1/responses"),
        ("https://a.example/v1/responses", "responses", "https://a.example/v1/responses"),
        ("https://a.example/v1/chat/completions?v=1", "responses", "https://a.example/v1/responses?v=1"),
    ],
)
def test_the_address_of_an_api_lies_below_that_of_the_model(base: str, api: UpstreamAPI, url: str) -> None:
    assert url_of(base, api) == url


def test_anthropic_gets_its_key_and_a_version() -> None:
    target = target_of(a_model(CLAUDE), "messages")

    assert target.head.line == b"POST /v1/messages HTTP/1.1\r\n"
    assert target.head.headers["host"] == "api.anthropic.com"
    assert target.head.headers["x-api-key"] == ANTHROPIC_KEY
    assert "authorization" not in target.head.headers
    assert target.head.headers["anthropic-version"] == "2023-06-01"


def test_a_login_token_is_no_api_key() -> None:
    headers = target_of(a_model(CLAUDE, api_key="sk-ant-oat01-abc"), "messages").head.headers

    assert (headers["authorization"], "x-api-key" in headers) == ("Bearer sk-ant-oat01-abc", False)
    assert headers["anthropic-beta"] == "oauth-2025-04-20"


def test_openai_gets_its_key_and_organization() -> None:
    target = target_of(a_model(GPT, organization="org-1"), "responses")

    assert target.head.line == b"POST /v1/responses HTTP/1.1\r\n"
    assert target.head.headers["authorization"] == f"Bearer {OPENAI_KEY}"
    assert target.head.headers["openai-organization"] == "org-1"


@pytest.mark.parametrize("api", ["messages", "responses"])
@pytest.mark.parametrize("resolved", [CLAUDE, replace(GPT, api_base=ELSEWHERE, own_address=False)])
@pytest.mark.parametrize(
    "base", [ELSEWHERE, "https://api.anthropic.com.evil.example", "https://api.openai.com.evil.example/v1"]
)
def test_the_environments_key_is_sent_to_no_other_address(
    api: NativeAPI, resolved: ResolvedProvider, base: str
) -> None:
    headers = target_of(a_model(resolved, {"api": api}, api_base=base), api).head.headers

    assert not any(key in text for key in (ANTHROPIC_KEY, OPENAI_KEY) for text in headers.values())


def test_anthropics_key_is_not_sent_to_openai() -> None:
    record = a_model(CLAUDE, {"api": "messages"}, api_base="https://api.openai.com/v1")

    assert ANTHROPIC_KEY not in str(target_of(record, "messages").head.headers)


def test_other_servers_find_the_models_key_in_either_header() -> None:
    record = a_model(CLAUDE, {"api": "messages"}, api_base=ELSEWHERE, api_key="os.environ/MODEL_API_KEY")
    target = target_of(record, "messages")

    assert target.head.headers["x-api-key"] == "key-of-the-model"
    assert target.head.headers["authorization"] == "Bearer key-of-the-model"
    assert "key-of-the-model" in target.secrets


def test_the_environment_may_name_anthropics_address() -> None:
    environ = {**ENVIRON, "ANTHROPIC_BASE_URL": "http://gateway.example:8080"}

    assert target_of(a_model(CLAUDE), "messages", environ).head.headers["host"] == "gateway.example:8080"


CLIENTS = {"traceparent": "00-1", "Anthropic-Version": "2024-01-01", "anthropic-beta": "a-1, b-2,a-1,\u00fc,x y"}


def test_the_clients_version_and_betas_reach_anthropic_beside_the_models_own() -> None:
    head = target_of(a_model(CLAUDE, extra_headers={"anthropic-beta": "own-1,a-1"}), "messages").render_head(CLIENTS)

    assert b"anthropic-version: 2024-01-01\r\n" in head
    assert b"anthropic-beta: own-1,a-1,b-2\r\n" in head
    assert b"traceparent: 00-1\r\n" in head


def test_a_version_that_the_model_states_holds() -> None:
    record = a_model(CLAUDE, extra_headers={"Anthropic-Version": "2023-01-01"})

    assert b"anthropic-version: 2023-01-01\r\n" in target_of(record, "messages").render_head(CLIENTS)


@pytest.mark.parametrize("version", ["", "latest", "2024-01-01\u0661"])
def test_a_version_that_is_none_is_left_out(version: str) -> None:
    head = target_of(a_model(CLAUDE), "messages").render_head({"anthropic-version": version})

    assert head.count(b"anthropic-version:") == 1
    assert b"anthropic-version: 2023-06-01\r\n" in head


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_no_other_server_gets_the_clients_version_and_betas(api: NativeAPI) -> None:
    head = target_of(a_model(GPT, {"api": api}, api_base=ELSEWHERE), api).render_head(CLIENTS)

    assert b"2024-01-01" not in head
    assert b"a-1" not in head
    assert (b"anthropic-version: 2023-06-01\r\n" in head) is (api == "messages")


async def test_one_model_is_asked_in_each_api_at_its_address() -> None:
    replies = (plain(json.dumps(MESSAGE).encode()), plain(json.dumps(RESPONSE).encode()), plain())
    upstream = UpstreamClient(Settings(), ENVIRON)
    async with RawUpstream(*replies) as server:
        record = a_model(GPT, {"api": ["messages", "responses"]}, api_base=server.url, api_key="none")
        await upstream.complete_native(record, NativeRequest("messages", {"messages": []}))
        await upstream.complete_native(record, NativeRequest("responses", {"input": []}))
        await upstream.complete(record, {"model": "x", "messages": []})
    await upstream.aclose()

    paths = [head.split(b" ")[1] for head in server.heads]
    assert paths == [b"/v1/messages", b"/v1/responses", b"/v1/chat/completions"]


@pytest.mark.parametrize("name", ["claude-x", "messages/claude-x"])
async def test_a_model_that_litellm_serves_is_asked_under_its_providers_name(name: str) -> None:
    upstream = UpstreamClient(Settings(), ENVIRON)
    async with RawUpstream(plain(json.dumps(MESSAGE).encode())) as server:
        record = a_model(replace(CLAUDE, model=name), {"api": "messages"}, api_base=server.url)
        await upstream.complete_native(record, NativeRequest("messages", {"messages": []}))
    await upstream.aclose()

    assert json.loads(server.bodies[0])["model"] == "claude-x"
