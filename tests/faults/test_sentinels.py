"""Kill, freeze or replace a primary by its sentinels under traffic. `pytest -rP` prints the figures."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.storage.redis import CHANGED, KEYS
from tests.faults.gateway import CONFIGURED, QUESTION, Gateway, a_gateway, counted
from tests.support.command import ADMIN_KEY
from tests.support.proxy_process import model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.sentinels import Sentinels, sentinels
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

HEALS_S = 120.0
PROMPTS = 24


@dataclass
class Traffic:
    """Send requests of a key without limits and of one with a budget, and create keys as an administrator."""

    gateway: Gateway
    keys: dict[str, dict[str, str]]
    """Headers by the name of the key."""
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    slowest_s: float = 0.0
    made: list[str] = field(default_factory=list)
    """Ids of the keys whose making was acknowledged."""
    refused: list[tuple[float, str]] = field(default_factory=list)
    """When a change got 503, and its message."""
    working_from: float | None = None
    """When a change was accepted again after that."""
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._ask, args=(who,)) for who in self.keys]
        self._threads.append(threading.Thread(target=self._administer))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def recovered(self) -> bool:
        return bool(self.refused) and self.working_from is not None and self.working_from > self.refused[-1][0]

    @property
    def refused_s(self) -> float:
        """Return the seconds from the first refused change to the first that was taken after the last refusal."""
        return (self.working_from or time.monotonic()) - self.refused[0][0] if self.refused else 0.0

    def _ask(self, who: str) -> None:
        counts = self.statuses.setdefault(who, Counter())
        url, body = f"{self.gateway.url}/v1/chat/completions", {"model": CONFIGURED, "messages": QUESTION}
        with httpx.Client(headers=self.keys[who], timeout=60) as client:
            while not self._over.is_set():
                started = time.monotonic()
                counts[client.post(url, json=body).status_code] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                self._over.wait(0.03)

    def _administer(self) -> None:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(headers=headers, timeout=60) as client:
            while not self._over.is_set():
                reply = client.post(f"{self.gateway.url}/admin/keys", json={"name": "made meanwhile"})
                if reply.status_code == 201:
                    self.made.append(reply.json()["id"])
                    self.working_from = self.working_from if self.recovered() else time.monotonic()
                else:
                    self.refused.append((time.monotonic(), reply.json()["error"]["message"]))
                self._over.wait(0.03)


@dataclass
class Setting:
    gateway: Gateway
    group: Sentinels
    keys: dict[str, dict[str, str]]
    answered: int = 0
    """Requests that were answered with 200."""

    def traffic(self) -> Traffic:
        return Traffic(self.gateway, self.keys)

    def primary(self) -> ValkeyServer:
        assert wait_until(lambda: self.group.primary() is not None, HEALS_S)
        found = self.group.primary()
        assert found is not None
        return found

    def holds(self, true_of: Callable[[redis.Redis], bool]) -> bool:
        """Tell whether it becomes true of the present primary."""
        with self.group.client(self.primary()) as client:
            return wait_until(lambda: true_of(client), HEALS_S)


@pytest.fixture(scope="module")
def setting(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, upstream: ScriptedUpstream
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("sentinels")
    with (
        sentinels(folder / "group", password="pw", sentinel_password="spw") as group,
        a_gateway(folder, embedder_cache, upstream, environ={"UNIROUTE_REDIS_URL": group.url()}) as gateway,
    ):
        keys = {}
        for who, terms in (("unlimited", {}), ("budgeted", {"usd_per_day": 1000})):
            made = gateway.admin("POST", "/keys", {"name": who, **terms})
            keys[who] = {"authorization": f"Bearer {made.json()['key']}"}
        yield Setting(gateway, group, keys)


def fails_over(setting: Setting, how: Callable[[ValkeyServer], None], name: str) -> Traffic:
    """Take the primary away by `how` under traffic; return once changes are taken again."""
    assert wait_until(setting.group.replicates, HEALS_S)
    before = setting.primary()
    with setting.traffic() as traffic:
        assert wait_until(lambda: len(traffic.made) >= 20, HEALS_S)
        started = time.monotonic()
        how(before)
        assert wait_until(lambda: setting.group.primary() not in (before, None), HEALS_S)
        named_s = time.monotonic() - started
        made = len(traffic.made)
        assert wait_until(lambda: len(traffic.made) >= made + 20, HEALS_S), traffic.refused[-1:]
    setting.answered += sum(counts[200] for counts in traffic.statuses.values())
    after = setting.primary()
    assert after is not before
    with setting.group.client(after) as client:
        lost = [key for key in traffic.made if not client.hexists(KEYS, key)]
    figures = {
        "new primary named after s": round(named_s, 2),
        "changes refused for s": round(traffic.refused_s, 2),
        "changes refused": len(traffic.refused),
        "changes acknowledged": len(traffic.made),
        "of them lost": len(lost),
        "answers": {who: dict(counts) for who, counts in traffic.statuses.items()},
        "slowest request s": round(traffic.slowest_s, 2),
    }
    print(f"{name}: {json.dumps(figures)}")  # noqa: T201
    assert lost == []
    return traffic


def killed(server: ValkeyServer) -> None:
    server.stop(signal.SIGKILL)


def test_a_killed_primary_fails_no_request_and_loses_no_acknowledged_change(setting: Setting) -> None:
    upstream = setting.gateway.upstream
    measured = {**model_entry("measured", upstream.url), "profile": {"prompts": PROMPTS, "max_usd": 1.0}}
    upstream.slow_s = 0.2
    before = setting.primary()
    job = setting.gateway.admin("POST", "/models", measured).json()["job"]

    traffic = fails_over(setting, killed, "killed")

    assert set(traffic.statuses["unlimited"]) == {200}
    assert set(traffic.statuses["budgeted"]) <= {200, 503}
    assert all("could not" in why for _, why in traffic.refused)
    upstream.slow_s = 0.0
    assert wait_until(lambda: job_of(setting, job)["state"] == "ready"), job_of(setting, job)
    assert job_of(setting, job)["done"] == PROMPTS
    prompts = Counter(json.dumps(each.body["messages"]) for each in upstream.history if is_of(each.body, "measured"))
    assert len(prompts) == PROMPTS
    assert max(prompts.values()) <= 2
    before.start()


def is_of(body: dict[str, Any], model: str) -> bool:
    return str(body["model"]).startswith(model)


def job_of(setting: Setting, job: str) -> dict[str, Any]:
    found: dict[str, Any] = setting.gateway.admin("GET", f"/jobs/{job}").json()
    return found


def test_the_usage_of_a_failover_is_counted_once(setting: Setting) -> None:
    assert setting.holds(lambda client: counted(client) - of_jobs(client) == setting.answered)


def of_jobs(client: redis.Redis) -> int:
    """Return the recorded requests of the measured model: measuring records no usage."""
    stored: Any = client.hget("uniroute:usage:totals:measured", "requests")
    return int(stored or 0)


def test_subscriptions_move_to_the_new_primary(setting: Setting) -> None:
    assert setting.holds(lambda client: all(count > 0 for _, count in client.pubsub_numsub(CHANGED, "uniroute:health")))


def test_a_frozen_primary_that_comes_back_is_not_used_any_more(setting: Setting) -> None:
    stopped: list[ValkeyServer] = []

    def freeze(server: ValkeyServer) -> None:
        stopped.append(server)
        server.send(signal.SIGSTOP)

    try:
        traffic = fails_over(setting, freeze, "frozen")
        assert set(traffic.statuses["unlimited"]) == {200}
    finally:
        stopped[0].send(signal.SIGCONT)
    late = setting.gateway.admin("POST", "/keys", {"name": "while the old one still thinks that it is the primary"})
    assert late.status_code == 201
    assert wait_until(setting.group.replicates, HEALS_S)
    assert setting.holds(lambda client: bool(client.hexists(KEYS, late.json()["id"])))
    assert setting.holds(lambda client: counted(client) == setting.answered)


def test_a_requested_failover_fails_no_request(setting: Setting) -> None:
    def ask(_: ValkeyServer) -> None:
        port = setting.group.ports[0]
        with redis.Redis(port=port, password=setting.group.sentinel_password) as client:
            client.execute_command("SENTINEL", "FAILOVER", "uniroute")

    traffic = fails_over(setting, ask, "asked for")
    assert set(traffic.statuses["unlimited"]) == {200}
    assert setting.holds(lambda client: counted(client) == setting.answered)


def test_no_usage_was_dropped_and_no_traceback_was_logged(setting: Setting) -> None:
    metrics = httpx.get(f"{setting.gateway.url}/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
    assert "\nuniroute_usage_dropped_total 0.0" in metrics.text
    assert "Traceback" not in setting.gateway.server.log
