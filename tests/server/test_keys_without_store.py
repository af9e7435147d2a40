from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis

from proxy.storage.valkey import EmbeddedValkey
from tests.server.test_without_store import ASK
from tests.support.keyed_proxy import KeyedProxy, MadeKey
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path / "redis")
    server.ensure()
    yield server
    server.stop()


@pytest.fixture
def keyed(tmp_path: Path, embedder_cache: Path, redis: EmbeddedValkey) -> Iterator[KeyedProxy]:
    environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"unix://{redis.socket_path}"}
    with ScriptedUpstream() as upstream:
        config = {"model_list": [model_entry("kept", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
        with ProxyProcess(tmp_path / "proxy", embedder_cache, config, environ) as proxy, KeyedProxy(proxy) as opened:
            yield opened


def store(keyed: KeyedProxy) -> str:
    return str(httpx.get(f"{keyed.proxy.url}/readyz", timeout=60).json()["store"])


def test_without_redis_known_keys_work_and_no_key_can_be_created(keyed: KeyedProxy, redis: EmbeddedValkey) -> None:
    client, viewer, gone = keyed.make(), keyed.make(role="viewer"), keyed.make()
    keyed.proxy.admin("DELETE", f"/admin/keys/{gone.id}")
    redis.stop()
    assert wait_until(lambda: store(keyed) == "away")

    assert keyed.client(client).chat.completions.create(model="kept", messages=ASK).model == "kept"
    assert [keyed.opens(key) for key in (viewer, gone, None, MadeKey("-", "ur-x"))] == [True, False, False, False]
    refused = [
        keyed.proxy.admin("POST", "/admin/keys", {"name": "late"}),
        keyed.proxy.admin("GET", "/admin/keys"),
        keyed.proxy.admin("PATCH", f"/admin/keys/{client.id}", {"role": "admin"}),
        keyed.proxy.admin("POST", f"/admin/keys/{client.id}/rotate"),
        keyed.proxy.admin("DELETE", f"/admin/keys/{client.id}"),
        keyed.proxy.admin("GET", "/admin/audit"),
    ]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(503, "unavailable")] * 6
    assert keyed.opens(client)

    redis.ensure()
    assert wait_until(lambda: store(keyed) == "up")
    assert keyed.opens(client)
    assert keyed.proxy.admin("DELETE", f"/admin/keys/{client.id}").status_code == 204
    assert not keyed.opens(client)


def test_an_emptied_store_has_no_keys_and_refuses_every_client(keyed: KeyedProxy, redis: EmbeddedValkey) -> None:
    client = keyed.make()
    assert keyed.opens(client)
    with Redis(unix_socket_path=str(redis.socket_path)) as direct:
        direct.flushall()
    assert wait_until(lambda: not keyed.opens(client))
    assert not keyed.opens(None)
    assert keyed.opens(keyed.make())
