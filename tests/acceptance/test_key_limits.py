from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import LimitedKey
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import frozen
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
PRICE = 1e-4
USAGE = {"prompt_tokens": 8, "completion_tokens": 70, "total_tokens": 78}
COST = 0.0288
# For 100 tokens at most, and a prompt of about 7.
SET_ASIDE = 0.0407
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Replicas:
    first: ProxyProcess
    second: ProxyProcess
    upstream: ScriptedUpstream
    store: redis.Redis

    def key(self, **limits: Any) -> LimitedKey:
        key = LimitedKey.put(self.store, **limits)
        headers = {"authorization": f"Bearer {key.secret}"}
        for proxy in (self.first, self.second):
            assert wait_until(lambda p=proxy: httpx.get(f"{p.url}/v1/models").status_code == 401)
            assert wait_until(lambda p=proxy: httpx.get(f"{p.url}/v1/models", headers=headers).status_code == 200)
        return key


def ask(proxy: ProxyProcess, key: LimitedKey, **more: Any) -> httpx.Response:
    body = {"model": "arm", "messages": ASK, "max_tokens": 100, **more}
    headers = {"authorization": f"Bearer {key.secret}"}
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


@contextmanager
def replicas(folder: Path, embedder_cache: Path, **settings: Any) -> Iterator[Replicas]:
    server = EmbeddedValkey(folder / "redis")
    server.ensure()
    environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"unix://{server.socket_path}"}
    with ScriptedUpstream() as upstream, redis.Redis(unix_socket_path=str(server.socket_path)) as store:
        config = {
            "model_list": [model_entry("arm", upstream.url, price=PRICE)],
            "uniroute": {"profile": {"on_start": False}, **settings},
        }
        with (
            ProxyProcess(folder / "first", embedder_cache, config, environ) as first,
            ProxyProcess(folder / "second", embedder_cache, config, environ) as second,
        ):
            yield Replicas(first, second, upstream, store)
    server.stop()


@pytest.fixture
def patient_replicas(tmp_path: Path, embedder_cache: Path) -> Iterator[Replicas]:
    """Give the limiter more time: this machine may be too busy to answer within 50 ms."""
    with replicas(tmp_path, embedder_cache, limits_timeout_s=1.0) as opened:
        yield opened


def test_two_hundred_requests_at_once_over_two_servers_never_spend_more_than_the_budget(
    patient_replicas: Replicas,
) -> None:
    key = patient_replicas.key(usd_per_day=2.0)
    patient_replicas.upstream.always = Step(usage=USAGE)
    with ThreadPoolExecutor(40) as clients:
        replies = list(
            clients.map(lambda n: ask((patient_replicas.first, patient_replicas.second)[n % 2], key), range(200))
        )
    answered = [reply for reply in replies if reply.status_code == 200]
    refused = [reply.json()["error"] for reply in replies if reply.status_code != 200]

    assert [error for error in refused if error["code"] != "insufficient_quota"] == []
    assert len(answered) * COST + 40 * SET_ASIDE > 2.0 - 2 * SET_ASIDE
    assert wait_until(lambda: key.open == 0)
    assert key.spent_usd == pytest.approx(len(answered) * COST)
    assert key.spent_usd <= 2.0
    assert len(patient_replicas.upstream.history) == len(answered)


def test_reservations_of_a_killed_server_expire(patient_replicas: Replicas) -> None:
    key = patient_replicas.key(usd_per_day=0.05)
    patient_replicas.upstream.then(Step(hang=True))
    with ThreadPoolExecutor(1) as client:
        asking = client.submit(ask, patient_replicas.first, key)
        assert wait_until(lambda: bool(patient_replicas.upstream.history))
        patient_replicas.first.stop(signal.SIGKILL)
        assert isinstance(asking.exception(), httpx.HTTPError)
    assert key.reserved_usd == pytest.approx(SET_ASIDE)
    assert ask(patient_replicas.second, key).json()["error"]["code"] == "insufficient_quota"
    key.let_reservations_end()

    assert ask(patient_replicas.second, key).status_code == 200


def test_a_frozen_redis_refuses_only_keys_with_budgets_until_it_answers_again(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with replicas(tmp_path, embedder_cache) as servers:
        money, rated, free = (
            servers.key(usd_per_day=1.0, requests_per_minute=100),
            servers.key(requests_per_minute=3),
            servers.key(),
        )
        info: Any = servers.store.info("server")
        with frozen(int(info["process_id"])):
            refused = ask(servers.first, money)
            rates = [ask(servers.first, rated).status_code for _ in range(4)]
            untouched = ask(servers.first, free).status_code

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert (rates, untouched) == ([200, 200, 200, 429], 200)
        assert wait_until(lambda: ask(servers.first, money).status_code == 200)
        assert wait_until(lambda: money.open == 0)
        assert money.reserved_usd == 0
