from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from redis import Redis

from proxy.storage.client_keys import KeyChange
from tests.server.conftest import Fleet
from tests.support.command import environment, run_command
from tests.support.keyed_proxy import KeyedProxy, with_registry
from tests.support.proxy_process import ADMIN_KEY, ProxyProcess, model_entry, uniform_profile
from tests.support.waiting import wait_until

QUIET: dict[str, Any] = {"profile": {"on_start": False}}
ENVIRON = {"MODEL_API_KEY": "sk-x", "OTHER_SECRET": "canary-other"}
ADMIN_CALLS = [("GET", "/admin/models"), ("POST", "/admin/models"), ("DELETE", "/admin/models/a"), ("GET", "/admin")]


class WithoutAdminKey(ProxyProcess):
    """Start without UNIROUTE_ADMIN_KEY."""

    def start(self) -> Self:
        self._environ.pop("UNIROUTE_ADMIN_KEY")
        return super().start()


def config(**ours: Any) -> dict[str, Any]:
    return {"model_list": [model_entry("kept", "http://127.0.0.1:9/v1")], "uniroute": {**QUIET, **ours}}


def statuses(url: str, **headers: str) -> list[int]:
    return [httpx.request(method, url + path, headers=headers, timeout=60).status_code for method, path in ADMIN_CALLS]


def create_key(folder: Path, role: str = "client") -> str:
    return with_registry(folder, lambda registry: registry.keys.create("team", None, KeyChange({"role": role})))[1]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[tuple[ProxyProcess, str]]:
    """Start a server that is configured to listen everywhere, after a key was created, and return that key."""
    folder = tmp_path_factory.mktemp("exposed")
    key = create_key(folder)
    settings = config(host="0.0.0.0", allowed_env=["OTHER_SECRET"])
    with ProxyProcess(folder, embedder_cache, settings, ENVIRON) as proxy:  # its socket is on loopback all the same
        yield proxy, key


def test_admin_calls_need_the_admin_key(fleet: Fleet) -> None:
    assert statuses(fleet.url) == [401] * 4
    assert statuses(fleet.url, authorization="Bearer another-key-than-that") == [401] * 4
    assert statuses(fleet.url, authorization=f"Bearer {ADMIN_KEY}")[0] == 200


def test_with_no_admin_key_set_there_is_no_admin_api(tmp_path: Path, embedder_cache: Path) -> None:
    admin = create_key(tmp_path, "admin")
    with WithoutAdminKey(tmp_path, embedder_cache, config(), ENVIRON) as proxy:
        key = {"authorization": f"Bearer {admin}"}
        for headers in ({}, {"authorization": f"Bearer {ADMIN_KEY}"}, key):
            assert statuses(proxy.url, **headers) == [403] * 4
        assert httpx.get(f"{proxy.url}/v1/models", headers=key).status_code == 200


def test_listening_beyond_this_machine_without_a_client_key_is_refused_at_start(
    tmp_path: Path, embedder_cache: Path, exposed: tuple[ProxyProcess, str]
) -> None:
    proxy, key = exposed
    refused = run_command("serve", "--host", "0.0.0.0", "--port", "0", environ=environment(tmp_path, embedder_cache))
    assert (refused.returncode, "no client key exists" in refused.stderr) == (2, True)
    assert httpx.get(f"{proxy.url}/v1/models").status_code == 401
    assert httpx.get(f"{proxy.url}/v1/models", headers={"x-api-key": key}).status_code == 200


def test_neither_revoking_the_last_key_nor_an_emptied_store_nor_a_restart_turns_authentication_off(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with ProxyProcess(tmp_path, embedder_cache, config(), ENVIRON) as proxy:
        keyed = KeyedProxy(proxy)
        assert keyed.opens(None)
        key = keyed.make()
        assert (keyed.opens(key), keyed.opens(None)) == (True, False)
        keyed.proxy.admin("DELETE", f"/admin/keys/{key.id}")
        assert (keyed.opens(key), keyed.opens(None)) == (False, False)
        with Redis(unix_socket_path=str(tmp_path / "valkey" / "valkey.sock")) as direct:
            direct.flushall()
            direct.incr("uniroute:version")
        assert wait_until(lambda: proxy.admin("GET", "/admin/keys").json()["keys"] == [])
        assert not keyed.opens(None)
    with ProxyProcess(tmp_path, embedder_cache, config(), ENVIRON) as again:
        assert httpx.get(f"{again.url}/v1/models").status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/models"])
def test_host_and_origin_are_checked_on_loopback_too(fleet: Fleet, path: str) -> None:
    root = {"authorization": f"Bearer {ADMIN_KEY}"}
    for foreign in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}):
        assert httpx.get(fleet.url + path, headers={**root, **foreign}).status_code == 403
    assert httpx.get(fleet.url + path, headers=root).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["OTHER_SECRET", "PATH", "UNIROUTE_ADMIN_KEY", "UNIROUTE_REDIS_URL", "UNIROUTE_ANY_API_KEY", "", "arm_api_key"],
)
def test_a_model_may_name_only_provider_keys_of_the_environment(fleet: Fleet, name: str) -> None:
    before = fleet.proxy.admin("GET", "/admin/models").json()["models"]
    for param in ("api_key", "api_base"):
        body = {**model_entry("leak", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.1)}
        body["litellm_params"][param] = f"os.environ/{name}"
        reply = fleet.proxy.admin("POST", "/admin/models", body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, f"litellm_params.{param}")
    assert fleet.proxy.admin("GET", "/admin/models").json()["models"] == before


def test_allowed_env_lets_a_model_name_another_variable_but_never_ours(exposed: tuple[ProxyProcess, str]) -> None:
    proxy, _ = exposed
    answers = []
    for name in ("OTHER_SECRET", "UNIROUTE_ADMIN_KEY"):
        body = {**model_entry(f"by-{name}", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.1)}
        body["litellm_params"]["api_key"] = f"os.environ/{name}"
        answers.append(proxy.admin("POST", "/admin/models", body).status_code)
    assert answers == [201, 400]
    assert "canary-other" not in proxy.admin("GET", "/admin/models").text


def test_an_address_is_changed_only_with_the_key_given_again(fleet: Fleet) -> None:
    body = {**model_entry("moving", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.9)}
    assert fleet.proxy.admin("POST", "/admin/models", body).status_code == 201
    elsewhere = {"api_base": "http://127.0.0.1:10/v1"}
    alone = fleet.proxy.admin("PATCH", "/admin/models/moving", {"litellm_params": elsewhere})
    kept = fleet.proxy.admin("GET", "/admin/models/moving").json()["litellm_params"]["api_base"]
    with_key = {"litellm_params": {**elsewhere, "api_key": "os.environ/MODEL_API_KEY"}}
    together = fleet.proxy.admin("PATCH", "/admin/models/moving", with_key)
    assert fleet.proxy.admin("DELETE", "/admin/models/moving").status_code == 204
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "litellm_params.api_key")
    assert kept == "http://127.0.0.1:9/v1"
    assert (together.status_code, together.json()["litellm_params"]["api_base"]) == (200, "http://127.0.0.1:10/v1")


@pytest.mark.parametrize("params", [{"api_key": "sk-canary"}, {"extra_headers": {"Authorization": "Bearer sk-canary"}}])
def test_a_literal_key_is_refused_where_it_would_be_stored(fleet: Fleet, params: dict[str, Any]) -> None:
    body = {**model_entry("literal", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.1)}
    body["litellm_params"] |= params
    added = fleet.proxy.admin("POST", "/admin/models", body)
    body["litellm_params"] |= {"api_key": "os.environ/MODEL_API_KEY", "extra_headers": {}}
    assert fleet.proxy.admin("POST", "/admin/models", body).status_code == 201
    changed = fleet.proxy.admin("PATCH", "/admin/models/literal", {"litellm_params": params})
    fleet.proxy.admin("DELETE", "/admin/models/literal")
    assert [reply.status_code for reply in (added, changed)] == [400, 400]
    dumped = (fleet.proxy.folder / "valkey").rglob("*")
    assert not any(b"sk-canary" in path.read_bytes() for path in dumped if path.is_file())
    assert "sk-canary" not in fleet.proxy.log + added.text + changed.text
