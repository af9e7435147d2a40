from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from proxy.app import app_state, create_app
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import load_settings
from tests.attacks.canaries import (
    ADMIN_KEY,
    HEADER,
    LITERAL_KEY,
    PROMPT,
    PROVIDER_KEY,
    REDIS_PASSWORD,
    SECRETS,
    Canaries,
    model,
    served_with_canaries,
)
from tests.support.client_apis import API_NAMES
from tests.support.command import environment, run_command
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

# The secrets that each model's upstream gets, and may repeat.
KNOWN = {
    "named": f"no: Bearer {PROVIDER_KEY}",
    "translated": f"no: Bearer {PROVIDER_KEY}",
    "other": f"no: x-api-key {PROVIDER_KEY}",
    "literal": f"no: Bearer {LITERAL_KEY} with {HEADER}",
}
CONTENT_CHUNK: Any = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
pytestmark = pytest.mark.filterwarnings("ignore:Item .* on TypedDict:UserWarning")


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Canaries]:
    with served_with_canaries(tmp_path_factory.mktemp("canaries"), embedder_cache) as served:
        yield served


@pytest.fixture(autouse=True)
def nothing_scripted(canaries: Canaries) -> None:
    canaries.upstream.script.clear()
    canaries.upstream.always = None
    canaries.seen.clear()


def found(*texts: str, secrets: tuple[str, ...] = SECRETS) -> list[str]:
    """Return the secrets that are in any of the texts, whole or nearly so, with what stands around the first."""
    tails = [(secret, secret[-8:]) for secret in secrets]
    return [
        f"{secret} in {text[max(0, text.index(tail) - 200) : text.index(tail) + 60]!r}"
        for text in texts
        for secret, tail in tails
        if tail in text
    ]


def test_secrets_are_only_where_they_belong(canaries: Canaries) -> None:
    for name, key in (("translated", PROVIDER_KEY), ("named", PROVIDER_KEY), ("literal", LITERAL_KEY)):
        assert canaries.ask(name).status_code == 200
        assert canaries.upstream.last.headers["authorization"] == f"Bearer {key}"
        assert found(json.dumps(canaries.upstream.last.body)) == []
    assert canaries.upstream.last.headers["x-tenant-secret"] == HEADER


@pytest.mark.parametrize("name", ["named", "translated", "literal", "other"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_repeats_the_keys_is_not_quoted(canaries: Canaries, name: str, stream: bool) -> None:
    message = KNOWN[name]
    echoing = {"x-echo": message, "retry-after": message, "www-authenticate": message, "set-cookie": message}
    steps = [
        Step(
            status=401,
            headers=echoing,
            body={"error": {"message": message, "type": message, "code": message, "param": message}},
        ),
        Step(status=500, headers=echoing, body=message.encode()),
        Step(status=429, headers=echoing, body={"detail": [{"loc": [message], "msg": message}]}),
        Step(status=400, headers=echoing, body={"error": message, message: message}),
        Step(status=200, headers=echoing, body={"error": {"message": message}}),
        Step(status=200, headers=echoing, body=message.encode()),
        Step(status=307, headers={"location": f"http://x/{message}"}, body=b""),
        Step(status=200, headers=echoing, events=[{"error": {"message": message, "code": 401}}]),
        Step(status=200, headers=echoing, events=[CONTENT_CHUNK, {"error": {"message": message, "code": message}}]),
        Step(status=200, headers=echoing, events=[CONTENT_CHUNK, b"event: error\ndata: " + message.encode() + b"\n\n"]),
        Step(status=200, headers=echoing, events=[CONTENT_CHUNK], cut_after=1),
    ]
    for step in steps:
        canaries.upstream.always = step
        for api in API_NAMES:
            canaries.ask(name, api, stream=stream)
    assert found(*canaries.seen, canaries.server.log) == []


def test_error_responses_to_callers_contain_no_secret(canaries: Canaries) -> None:
    for body in (b"{", b'"' + ADMIN_KEY.encode(), b'{"model": "' + PROMPT.encode() + b'"}', b"\xff" + PROMPT.encode()):
        canaries.call("POST", "/v1/chat/completions", content=body)
    for api in API_NAMES:
        canaries.ask(PROMPT, api)
        canaries.ask("auto", api, stream=PROMPT)
        canaries.ask("auto", api, uniroute={PROMPT: PROMPT})
        canaries.ask("auto", api, **{PROMPT: PROMPT})
    canaries.call("GET", "/v1/models", headers={"lambda": PROMPT, "x-request-id": f"a {PROMPT}"})
    canaries.call("GET", f"/v1/models/{PROMPT}")
    canaries.call("GET", "/admin/models")
    for wrong in (canaries.client_key[:-1] + "x", ADMIN_KEY[:-1], "Bearer"):
        assert canaries.call("GET", "/v1/models", wrong).status_code == 401

    assert found(canaries.server.log, secrets=(*SECRETS, PROMPT, canaries.client_key)) == []
    assert found(*(text for text in canaries.seen), secrets=(*SECRETS, canaries.client_key)) == []


def test_error_responses_to_administrators_repeat_no_secret(canaries: Canaries) -> None:
    address = canaries.upstream.url
    for params in (
        {"api_key": LITERAL_KEY}, {"api_key": [LITERAL_KEY]}, {"extra_headers": {"authorization": HEADER}},
        {"extra_headers": {"x-api-key": HEADER}}, {"aws_secret_access_key": LITERAL_KEY}, {"extra_headers": HEADER},
        {"api_key": f"os.environ/{'UNIROUTE_ADMIN_KEY'}"}, {"api_key": "os.environ/UNIROUTE_REDIS_URL"},
        {"api_base": f"http://user:{LITERAL_KEY}@host/"}, {"azure_ad_token": LITERAL_KEY}, {"headers": [HEADER]},
        {"vertex_credentials": {"private_key": LITERAL_KEY}}, {"client_secret": LITERAL_KEY},
    ):  # fmt: skip
        entry = model("wrong", address)
        entry["litellm_params"] |= params
        reply = canaries.admin("POST", "/admin/models", {**entry, "profile": {"prompts": 20}})
        assert reply.status_code == 400, (params, reply.text)
    canaries.admin("PATCH", "/admin/models/named", {"litellm_params": {"api_key": LITERAL_KEY}})
    canaries.admin("PUT", "/admin/models/named/pricing", {"input_cost_per_token": "x"})
    for path in ("/admin/models", "/admin/models/named", "/admin/models/literal", "/admin/jobs/none", "/metrics"):
        canaries.admin("GET", path)

    assert found(*canaries.seen, canaries.server.log) == []


def test_failed_jobs_contain_no_key(canaries: Canaries) -> None:
    for name, message in KNOWN.items():
        canaries.upstream.always = Step(status=401, body={"error": {"message": message}})
        job = canaries.admin("POST", f"/admin/models/{name}/profile", {"prompts": 20, "max_usd": 1}).json()["job"]
        assert wait_until(
            lambda job=job: canaries.admin("GET", f"/admin/jobs/{job}").json()["state"] in ("failed", "ready"), 60
        )
        canaries.admin("GET", f"/admin/jobs/{job}/outcomes")
    canaries.upstream.always = None
    job = canaries.admin("POST", "/admin/models/named/profile", {"prompts": 20, "max_usd": 1}).json()["job"]
    assert wait_until(lambda: canaries.admin("GET", f"/admin/jobs/{job}").json()["state"] != "running")
    assert found(*canaries.seen, canaries.server.log) == []


async def stored(url: str) -> list[str]:
    """Return every key and value of the store."""
    client = Redis.from_url(url, decode_responses=True, encoding_errors="replace")
    texts: list[str] = []
    async for key in client.scan_iter(count=1000):
        readers: dict[str, Any] = {
            "string": client.get, "hash": client.hgetall, "set": client.smembers, "stream": client.xrange,
            "list": lambda name: client.lrange(name, 0, -1), "zset": lambda name: client.zrange(name, 0, -1),
        }  # fmt: skip
        kind = str(await client.type(key))
        if kind != "none":  # else it has expired in this moment
            texts.append(f"{key} {await readers[kind](key)!r}")
    await client.aclose()
    return texts


def test_no_secret_is_stored(canaries: Canaries) -> None:
    canaries.ask("named")
    canaries.ask("auto", stream=True)
    canaries.call("POST", "/v1/route", json={"model": "auto", "messages": [{"role": "user", "content": PROMPT}]})
    entry = model("added", canaries.upstream.url, api_key="os.environ/MODEL_API_KEY")
    canaries.admin("POST", "/admin/models", {**entry, "profile": {"prompts": 20}})
    assert wait_until(lambda: any("usage" in text for text in asyncio.run(stored(canaries.redis_url))))
    texts = asyncio.run(stored(canaries.redis_url))
    files = [path for path in (canaries.folder / "data").rglob("*") if path.is_file() and path.suffix != ".npz"]
    texts += [path.read_text("latin-1") for path in files if path.stat().st_size < 10**7]

    assert len(texts) > 5
    assert found(*texts, canaries.server.log, secrets=(*SECRETS, canaries.client_key)) == []
    # Of a prompt, only what a client lets be stored: the input of a response.
    others = [text for text in texts if "uniroute:responses:" not in text]
    assert found(*others, canaries.server.log, secrets=(PROMPT,)) == []


@pytest.mark.parametrize(
    "text",
    [
        f"model_list: [{{model_name: a, litellm_params: [{{api_key: {LITERAL_KEY}}}]}}]",
        f"model_list: {{a: {{api_key: {LITERAL_KEY}}}}}",
        f"model_list: [{LITERAL_KEY}]",
        f"uniroute: {LITERAL_KEY}",
        f"model_list: [{{model_name: a, litellm_params: {{model: 7, api_key: {LITERAL_KEY}}}}}]",
        f"model_list: [{{model_name: a, litellm_params: {{model: x/y, extra_headers: {HEADER}}}}}]",
        f"model_list: [{{model_name: a, litellm_params: {{model: x/y, api_key: [{LITERAL_KEY}]}}}}]",
        f"model_list: [{{model_name: a, litellm_params: {{api_key: {LITERAL_KEY}}}, typo: 1}}]",
        f"uniroute: {{redis_url: 'http://:{REDIS_PASSWORD}@h', admin_key: {ADMIN_KEY}}}",
        f"uniroute: {{admin_key: [{ADMIN_KEY}]}}",
        f"uniroute: {{admin_key: {{a: {ADMIN_KEY}}}, redis_url: [{REDIS_PASSWORD}]}}",
        f"model_list: [{{model_name: a, litellm_params: {{api_key: '{LITERAL_KEY}}}}}]",
        f"api_key: {LITERAL_KEY}\n\tmodel_list: x",
        f"{LITERAL_KEY}",
        f"- {LITERAL_KEY}",
    ],
)
def test_a_refused_configuration_is_not_quoted(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings(tmp_path / "config.yaml", {})

    assert found(str(refused.value), repr(refused.value)) == []


def test_commands_and_refused_starts_show_no_secret(canaries: Canaries) -> None:
    environ = {**canaries.environ, "UNIROUTE_URL": canaries.server.url}
    for command in ("models show literal", "keys list", "serve --port 99999"):
        ended = run_command(*command.split(), environ=environ)
        canaries.seen.append(ended.stdout + ended.stderr)
    for url in (f"http://:{REDIS_PASSWORD}@127.0.0.1/", f"redis://:{REDIS_PASSWORD}@127.0.0.1:port/"):
        ended = run_command("serve", environ={**environ, "UNIROUTE_REDIS_URL": url, "UNIROUTE_HOST": "0.0.0.0"})
        assert ended.returncode != 0, url
        canaries.seen.append(ended.stdout + ended.stderr)

    assert found(*canaries.seen, secrets=(*SECRETS, canaries.client_key)) == []


async def test_no_repr_and_no_crash_shows_a_secret(
    canaries: Canaries, tmp_path: Path, embedder_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {**environment(tmp_path / "data", embedder_cache), **canaries.environ}
    environ["UNIROUTE_DATA_DIR"] = str(tmp_path / "data")
    settings = load_settings(canaries.folder / "config.yaml", environ)
    async with app_state(settings, environ) as services:
        state = services.snapshots.current
        things = [settings, services, services.store.client, state, *state.models.values(), *state.keys.values()]
        things += [part for part in vars(services).values() if part is not environ]
        texts = [repr(thing) for thing in things] + [str(settings), repr(settings.model_list)]
        app = create_app(services)
        object.__setattr__(services, "assigner", None)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            body = {"model": "auto", "messages": [{"role": "user", "content": PROMPT}]}
            reply = await client.post("/v1/chat/completions", json=body)
        texts += [reply.text, str(reply.headers), caplog.text]

    assert (reply.status_code, "Traceback" in caplog.text) == (500, True)
    assert found(*texts, secrets=(*SECRETS, PROMPT, canaries.client_key)) == []


def test_metrics_name_no_key_and_no_prompt(canaries: Canaries) -> None:
    text = canaries.admin("GET", "/metrics").text

    assert "uniroute_requests_total" in text
    assert found(text, secrets=(*SECRETS, PROMPT, canaries.client_key)) == []
    assert not re.search(r"canary", text)
