from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from proxy.storage.client_keys import ClientKey
from proxy.storage.registry import Registry
from tests.support.keyed_proxy import with_registry
from tests.support.proxy_process import ADMIN_KEY, ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


@dataclass(frozen=True)
class Keyed:
    proxy: ProxyProcess
    whole: str
    """May use every model."""
    limited: str
    """May use "first" alone."""
    closing: ExitStack

    def client(self, key: str) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.proxy.url}/v1", api_key=key, max_retries=0, timeout=60)
        return self.closing.enter_context(client)

    def status(self, **headers: str) -> int:
        return httpx.get(f"{self.proxy.url}/v1/models", headers=headers, timeout=60).status_code


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    with ScriptedUpstream() as upstream, ExitStack() as closing:
        config = {
            "model_list": [model_entry("first", upstream.url), model_entry("second", upstream.url)],
            "uniroute": {"profile": {"on_start": False}},
        }
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy:
            _, whole = with_registry(folder, lambda registry: registry.keys.create("whole"))
            _, limited = with_registry(folder, lambda registry: registry.keys.create("limited", ("first",)))
            opened = Keyed(proxy, whole, limited, closing)
            assert wait_until(lambda: opened.status() == 401)  # while no key is known, none is needed
            assert wait_until(lambda: opened.status(authorization=f"Bearer {limited}") == 200)
            yield opened


def test_a_request_without_a_valid_key_is_an_authentication_error(keyed: Keyed) -> None:
    for key in ("garbage", "x" * 10_000, keyed.whole[:-1], keyed.whole.upper()):
        with pytest.raises(openai.AuthenticationError) as caught:
            keyed.client(key).chat.completions.create(model="first", messages=ASK)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert keyed.status() == 401


def test_a_valid_key_is_accepted_in_either_header(keyed: Keyed) -> None:
    assert keyed.client(keyed.whole).chat.completions.create(model="second", messages=ASK).model == "second"
    assert keyed.status(**{"x-api-key": keyed.whole}) == 200
    assert keyed.status(authorization=f"Bearer {ADMIN_KEY}") == 200


def test_a_limited_key_sees_and_uses_its_models_only(keyed: Keyed) -> None:
    client = keyed.client(keyed.limited)

    assert [model.id for model in client.models.list()][-1] == "first"
    assert client.chat.completions.create(model="first", messages=ASK).model == "first"
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model="second", messages=ASK)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("second")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    assert caught.value.code == "model_not_found"


def test_a_decision_shows_a_limited_key_its_models_only(keyed: Keyed) -> None:
    headers = {"authorization": f"Bearer {keyed.limited}"}
    body = {"model": "auto", "messages": ASK}
    before = httpx.post(f"{keyed.proxy.url}/v1/route", json=body, headers=headers)
    keyed.proxy.put_profile("first", 0.1)
    keyed.proxy.put_profile("second", 0.1)
    after = httpx.post(f"{keyed.proxy.url}/v1/route", json=body, headers=headers)

    assert before.status_code == 503
    assert "second" not in before.text + after.text
    assert after.json()["model"] == "first"


def test_client_keys_are_refused_on_the_admin_api(keyed: Keyed) -> None:
    headers = {"authorization": f"Bearer {keyed.whole}"}

    assert httpx.get(f"{keyed.proxy.url}/admin/models", headers=headers).status_code == 403


def test_health_needs_no_key_and_metrics_do(keyed: Keyed) -> None:
    statuses = [httpx.get(f"{keyed.proxy.url}{path}").status_code for path in ("/healthz", "/readyz", "/metrics")]

    assert statuses == [200, 200, 401]


def test_other_origins_and_hosts_are_refused(keyed: Keyed) -> None:
    key = {"authorization": f"Bearer {keyed.whole}"}

    assert keyed.status(**key, origin="http://evil.example") == 403
    assert keyed.status(**key, host="evil.example") == 403
    assert keyed.status(**key, origin=keyed.proxy.url) == 200


def test_after_the_last_key_is_revoked_authentication_stays_on(keyed: Keyed) -> None:
    async def revoke_all(registry: Registry) -> tuple[ClientKey, ...]:
        keys = await registry.keys.listed()
        for key in keys:
            await registry.keys.revoke(key.id)
        return keys

    with_registry(keyed.proxy.folder, revoke_all)

    assert wait_until(lambda: keyed.status(authorization=f"Bearer {keyed.whole}") == 401)
    assert keyed.status() == 401
