from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.gateway import CONFIGURED, Gateway, a_gateway, counted
from tests.support.command import ADMIN_KEY
from tests.support.ports import free_port
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer, frozen
from tests.support.waiting import wait_until


@dataclass
class Setting:
    gateway: Gateway
    valkey: ValkeyServer
    requests: int = 0

    def ask(self, model: str = CONFIGURED) -> int:
        reply = self.gateway.ask(model)
        self.requests += reply.status_code == 200
        return reply.status_code

    def ask_in_every_mode(self) -> list[int]:
        """Send requests routed, pinned, and streamed to the end."""
        statuses = [self.ask("auto"), self.ask()]
        with self.gateway.streaming() as answer:
            whole = "[DONE]" in answer.read().decode()
        self.requests += whole
        return [*statuses, 200 if whole else 500]

    def usage_is_exact(self) -> bool:
        with self.valkey.client() as client:
            return wait_until(lambda: counted(client) == self.requests)

    def recovers(self) -> bool:
        return wait_until(lambda: self.gateway.put_price().status_code == 200)


@pytest.fixture(scope="module")
def setting(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, upstream: ScriptedUpstream
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("external")
    with (
        ValkeyServer(folder / "valkey") as valkey,
        a_gateway(folder, embedder_cache, upstream, environ={"UNIROUTE_REDIS_URL": valkey.url}) as gateway,
    ):
        yield Setting(gateway, valkey)


def refused(call: Callable[[], httpx.Response], why: str) -> bool:
    """Check that an admin call is refused by the store, with the reason."""
    reply = call()
    error = reply.json()["error"]
    return (reply.status_code, error["code"]) == (503, "unavailable") and why in error["message"]


def test_a_frozen_store_fails_no_request_and_usage_is_counted_once(setting: Setting) -> None:
    assert setting.gateway.add("added").status_code == 201
    with frozen(setting.valkey.pid):
        assert setting.ask_in_every_mode() == [200, 200, 200]
        time_out = setting.gateway.put_price  # the first waits for its timeout, the next is refused at once
        assert refused(time_out, "could not store a price")
        assert refused(time_out, "has not answered for")
        assert refused(lambda: setting.gateway.add("late"), "could not add a model")
        assert refused(lambda: setting.gateway.admin("DELETE", "/models/added"), "could not")
        assert setting.gateway.admin("GET", "/models/added").json()["state"] == "ready"
        assert setting.ask_in_every_mode() == [200, 200, 200]
    assert setting.recovers()
    assert setting.usage_is_exact()


def test_usage_recorded_while_the_store_is_stopped_reaches_it_later(setting: Setting) -> None:
    setting.valkey.stop()
    assert refused(setting.gateway.put_price, "could not store a price")
    assert setting.ask_in_every_mode() == [200, 200, 200]
    setting.valkey.start()
    assert setting.recovers()
    assert setting.usage_is_exact()


def test_a_full_store_refuses_changes_and_gets_usage_once_it_has_room(setting: Setting) -> None:
    with setting.valkey.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        before = counted(client)
        assert refused(setting.gateway.put_price, "maxmemory")
        assert refused(lambda: setting.gateway.add("late"), "maxmemory")
        assert setting.ask_in_every_mode() == [200, 200, 200]
        assert wait_until(lambda: "usage waits in its journals" in setting.gateway.server.log)
        assert counted(client) == before
        client.config_set("maxmemory", "0")
    assert setting.recovers()
    assert setting.usage_is_exact()


def test_a_store_restored_from_an_older_copy_is_used_and_gets_the_usage_it_lacks(
    setting: Setting, tmp_path: Path
) -> None:
    assert setting.usage_is_exact()
    setting.valkey.stop()
    shutil.copytree(setting.valkey.folder, tmp_path / "older")
    setting.valkey.start()
    assert setting.recovers()
    assert setting.gateway.add("younger").status_code == 201
    assert setting.ask_in_every_mode() == [200, 200, 200]
    assert setting.usage_is_exact()
    version = setting.gateway.ready()["state_version"]

    setting.valkey.stop()
    shutil.rmtree(setting.valkey.folder)
    shutil.copytree(tmp_path / "older", setting.valkey.folder)
    setting.valkey.start()
    assert wait_until(lambda: setting.gateway.admin("GET", "/models/younger").status_code == 404)
    assert setting.gateway.ready()["state_version"] < version
    assert setting.ask_in_every_mode() == [200, 200, 200]
    assert setting.recovers()
    assert setting.usage_is_exact()


def test_a_flushed_store_loses_what_was_added_and_authentication_stays_on(setting: Setting) -> None:
    gateway = setting.gateway
    assert gateway.add("added-too").status_code == 201
    gateway.client_key = gateway.create_client_key(setting.valkey.url)
    assert wait_until(lambda: setting.ask() == 200)
    with setting.valkey.client() as client:
        client.flushall()
    assert wait_until(lambda: setting.ask() == 401)
    gateway.client_key = None
    assert setting.ask() == 401
    gateway.client_key = ADMIN_KEY
    assert setting.ask() == 200
    assert gateway.admin("GET", "/models/added-too").status_code == 404
    assert gateway.admin("GET", f"/models/{CONFIGURED}").json()["state"] == "unprofiled"
    assert gateway.add("added-too").status_code == 201
    again = gateway.admin("POST", f"/models/{CONFIGURED}/profile", uniform_profile(0.2))
    assert again.status_code == 200
    assert setting.ask_in_every_mode() == [200, 200, 200]
    assert setting.usage_is_exact()


def test_a_promoted_replica_is_used_as_soon_as_it_accepts_writes(setting: Setting, tmp_path: Path) -> None:
    primary, address = setting.valkey, setting.valkey.port
    assert setting.usage_is_exact()
    with ValkeyServer(tmp_path / "replica", free_port(), replicaof=f"127.0.0.1 {address}") as replica:
        with replica.client() as client:
            assert wait_until(lambda: counted(client) == setting.requests)
            client.replicaof("127.0.0.1", "1")  # from here on it hears no more: it lags behind
        assert setting.ask_in_every_mode() == [200, 200, 200]
        assert setting.usage_is_exact()
        primary.stop(signal.SIGKILL)
        assert setting.ask_in_every_mode() == [200, 200, 200]

        with replica.client() as client:
            client.config_set("port", str(address))
        replica.port = address
        assert wait_until(lambda: setting.gateway.ready()["store"] == "up")
        assert refused(setting.gateway.put_price, "read only")
        assert setting.ask_in_every_mode() == [200, 200, 200]

        with replica.client() as client:
            client.replicaof("NO", "ONE")
        setting.valkey = replica
        assert setting.recovers()
        assert setting.usage_is_exact()
        setting.valkey = primary


def metric(gateway: Gateway, name: str) -> float:
    lines: Any = httpx.get(f"{gateway.url}/metrics", headers=gateway.headers, timeout=60).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_no_usage_was_dropped_by_these_faults(setting: Setting) -> None:
    assert metric(setting.gateway, "uniroute_usage_dropped_total") == 0
