from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.storage.valkey import EmbeddedValkey
from tests.support.proxy_process import ProxyProcess, model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
PRICE = {"input_cost_per_token": 2e-6, "output_cost_per_token": 2e-6}


@dataclass(frozen=True)
class Away:
    proxy: ProxyProcess
    redis: EmbeddedValkey
    upstream: ScriptedUpstream

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.proxy.url}/v1/chat/completions", json={"model": "auto", "messages": ASK}, timeout=60)

    def store(self) -> str:
        return str(httpx.get(f"{self.proxy.url}/readyz", timeout=60).json()["store"])


@pytest.fixture
def away(tmp_path: Path, embedder_cache: Path) -> Iterator[Away]:
    redis = EmbeddedValkey(tmp_path / "redis")
    redis.ensure()
    config = {"uniroute": {"profile": {"on_start": False}}}
    environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"unix://{redis.socket_path}"}
    with ScriptedUpstream() as upstream, ProxyProcess(tmp_path / "proxy", embedder_cache, config, environ) as proxy:
        body = {**model_entry("kept", upstream.url), "profile": uniform_profile(0.1)}
        assert proxy.admin("POST", "/admin/models", body).status_code == 201
        yield Away(proxy, redis, upstream)
    redis.stop()


def test_a_stopped_redis_fails_no_request_and_refuses_writes(away: Away) -> None:
    assert away.ask().status_code == 200
    away.redis.stop()
    assert wait_until(lambda: away.store() == "away")

    assert [away.ask().status_code for _ in range(3)] == [200, 200, 200]
    late = model_entry("late", away.upstream.url)
    refused = [
        away.proxy.admin("POST", "/admin/models", late),
        away.proxy.admin("POST", "/admin/models", {**late, "profile": uniform_profile(0.1)}),
        away.proxy.admin("PUT", "/admin/models/kept/pricing", PRICE),
        away.proxy.admin("DELETE", "/admin/models/kept"),
    ]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(503, "unavailable")] * 4
    assert away.proxy.admin("GET", "/admin/models/kept").json()["state"] == "ready"

    away.redis.ensure()
    assert wait_until(lambda: away.store() == "up")
    assert away.proxy.admin("PUT", "/admin/models/kept/pricing", PRICE).status_code == 200
    assert away.proxy.admin("GET", "/admin/models/late").status_code == 404
    assert away.ask().status_code == 200
