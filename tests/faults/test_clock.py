from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.faults.gateway import CONFIGURED, Gateway, a_gateway, counted
from tests.support.proxy_process import model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="libfaketime is loaded as Linux loads libraries"),
    pytest.mark.skipif(find_spec("libfaketime") is None, reason="libfaketime comes with the extra `clock`"),
]


def the_library() -> Path:
    """Find the library without an import: the package wants to start its importer again."""
    spec = find_spec("libfaketime")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).rglob("libfaketime.so.1")
    return library


def wall_clock(gateway: Gateway) -> str:
    return str(gateway.admin("GET", f"/models/{CONFIGURED}").headers["date"])


def test_clock_jumps_of_a_day_break_nothing(tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream) -> None:
    upstream.slow_s = 0.3
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environ = {
        "LD_PRELOAD": str(the_library()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else every wait of a thread is wrong, and a start takes minutes
    }
    with a_gateway(tmp_path, embedder_cache, upstream, environ=environ) as gateway:
        gateway.client_key = gateway.create_client_key(gateway.embedded_url)
        requests = 0
        for step in ("+1d", "-1d"):
            before = wall_clock(gateway)
            job = measuring(gateway, "forward" if step == "+1d" else "back")
            assert wait_until(lambda job=job: 0 < done(gateway, job) < 20)
            clock.write_text(step)
            assert wait_until(lambda before=before: wall_clock(gateway)[:10] != before[:10])

            assert [gateway.ask(CONFIGURED).status_code for _ in range(3)] == [200] * 3
            requests += 3
            price: Any = gateway.admin("GET", f"/models/{CONFIGURED}").json()["price"]
            assert price["updated_at"] is None or price["age_s"] >= 0
            assert 0 <= gateway.put_price().json()["price"]["age_s"] < 60
            assert wait_until(lambda job=job: gateway.admin("GET", f"/jobs/{job}").json()["state"] == "ready")
            with gateway.embedded_store() as client:
                assert wait_until(lambda client=client, requests=requests: counted(client) == requests)


def measuring(gateway: Gateway, name: str) -> str:
    """Start a job on a new model."""
    body = {**model_entry(name, gateway.upstream.url), "profile": {"prompts": 20, "max_usd": 1.0}}
    reply = gateway.admin("POST", "/models", body)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job"])


def done(gateway: Gateway, job: str) -> int:
    document: Any = gateway.admin("GET", f"/jobs/{job}").json()
    return int(document["done"])
