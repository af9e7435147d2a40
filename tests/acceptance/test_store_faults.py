from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.storage.valkey import EmbeddedValkey
from tests.acceptance.serving import ServedProxy
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import frozen
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
PRICE = {"input_cost_per_token": 2e-6, "output_cost_per_token": 2e-6}


@dataclass(frozen=True)
class Served:
    proxy: ServedProxy
    upstream: ScriptedUpstream
    store: redis.Redis

    def add(self, name: str) -> int:
        body = {**model_entry(name, self.upstream.url), "profile": uniform_profile(0.1)}
        return self.proxy.admin("POST", "/admin/models", body).status_code

    def ask(self) -> int:
        body = {"model": "auto", "messages": ASK}
        return httpx.post(f"{self.proxy.url}/v1/chat/completions", json=body, timeout=60).status_code

    def put_price(self, name: str = "kept") -> int:
        return self.proxy.admin("PUT", f"/admin/models/{name}/pricing", PRICE).status_code

    def store_pid(self) -> int:
        info: Any = self.store.info("server")
        return int(info["process_id"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with (
        ScriptedUpstream() as upstream,
        ServedProxy(folder, embedder_cache, {"model_list": []}, {"MODEL_API_KEY": "sk-arm"}) as proxy,
    ):
        sockets = [*folder.rglob("valkey.sock"), EmbeddedValkey(folder).socket_path]
        with redis.Redis(unix_socket_path=str(sockets[0])) as store:
            served = Served(proxy, upstream, store)
            assert served.add("kept") == 201
            yield served


def test_a_model_added_through_one_process_is_known_to_the_next_call_on_any(served: Served) -> None:
    for number in range(8):
        path = f"/admin/models/new-{number}"
        assert served.add(f"new-{number}") == 201
        assert served.proxy.admin("GET", path).json()["model_name"] == f"new-{number}"
        for info in ({"max_input_tokens": 5000}, {"max_output_tokens": 1000}):
            assert served.proxy.admin("PATCH", path, {"model_info": info}).status_code == 200
        stored = served.proxy.admin("PATCH", path, {"model_info": {"supports_vision": True}}).json()["model_info"]
        assert {"max_input_tokens", "max_output_tokens", "supports_vision"} <= set(stored)
        assert served.proxy.admin("DELETE", path).status_code == 204


def test_of_concurrent_changes_none_is_lost_and_of_concurrent_additions_one_wins(served: Served) -> None:
    with ThreadPoolExecutor(4) as clients:
        assert sorted(clients.map(served.add, ["twin"] * 4)) == [201, 409, 409, 409]
        infos = [{"max_input_tokens": 5000}, {"max_output_tokens": 1000}, {"supports_vision": True}]
        changes = [{"model_info": info} for info in infos]
        replies = clients.map(lambda change: served.proxy.admin("PATCH", "/admin/models/twin", change), changes)
        assert [reply.status_code for reply in replies] == [200] * 3

    def stored() -> set[str]:
        return set(served.proxy.admin("GET", "/admin/models").json()["models"][-1]["model_info"])

    # A server that Redis did not answer in time shows a change a moment after it was stored.
    assert wait_until(lambda: {"max_input_tokens", "max_output_tokens", "supports_vision"} <= stored())
    assert served.proxy.admin("DELETE", "/admin/models/twin").status_code == 204


def test_a_killed_embedded_store_is_restarted_while_requests_are_served(served: Served) -> None:
    os.kill(served.store_pid(), signal.SIGKILL)

    assert served.ask() == 200
    assert wait_until(lambda: served.put_price() == 200)
    assert served.proxy.admin("GET", "/admin/models/kept").json()["state"] == "ready"


def test_a_frozen_store_fails_no_request_and_refuses_changes(served: Served) -> None:
    for number in range(4):
        served.add(f"one-of-{number}")
    with frozen(served.store_pid()):
        assert served.ask() == 200
        for method, path, status in (
            ("PUT", "/admin/models/kept/pricing", 503),
            ("DELETE", "/admin/models/kept", 503),
            ("GET", "/admin/models", 200),
        ):
            assert served.proxy.admin(method, path, PRICE if method == "PUT" else None).status_code == status

    assert wait_until(lambda: served.put_price() == 200)


@pytest.mark.parametrize("info", [{"max_input_tokens": 10**400}, {"input_cost_per_token": 1e300}])
def test_a_number_out_of_range_is_refused_before_it_is_stored(served: Served, info: dict[str, Any]) -> None:
    whole = {"output_cost_per_token": 1e-6, **info} if "input_cost_per_token" in info else info

    assert served.proxy.admin("PATCH", "/admin/models/kept", {"model_info": whole}).status_code == 400
    assert served.put_price() == 200
