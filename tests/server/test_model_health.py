from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from proxy.storage.valkey import socket_path
from proxy.upstream.health import CHANNEL, health_key
from tests.server.conftest import Fleet, open_fleet
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    with open_fleet(tmp_path_factory.mktemp("health"), embedder_cache) as opened:
        yield opened


WELL = {"state": "well", "recovers_in_s": None, "why": None}


@pytest.fixture
def other_process(fleet: Fleet) -> Iterator[Redis]:
    with Redis(unix_socket_path=str(socket_path(fleet.proxy.folder / "valkey"))) as client:
        yield client
        client.delete(health_key("fair"))
        client.publish(CHANNEL, "fair")
        assert wait_until(lambda: health_of(fleet) == WELL)


def health_of(fleet: Fleet, name: str = "fair") -> Any:
    return fleet.proxy.admin("GET", f"/admin/models/{name}").json()["health"]


def test_model_cards_and_metrics_show_cooldowns_and_their_reasons(fleet: Fleet, other_process: Redis) -> None:
    assert (health_of(fleet), health_of(fleet, "good")) == (WELL, WELL)
    other_process.set(health_key("fair"), "status 503", px=60_000)
    other_process.publish(CHANNEL, "fair")
    assert wait_until(lambda: health_of(fleet)["state"] == "resting")

    listed = {card["model_name"]: card["health"] for card in fleet.proxy.admin("GET", "/admin/models").json()["models"]}
    metrics = httpx.get(f"{fleet.url}/metrics").text
    assert (listed["fair"]["why"], listed["good"]) == ("status 503", WELL)
    assert 0 < listed["fair"]["recovers_in_s"] <= 60
    assert 'uniroute_model_resting{model="fair"} 1.0' in metrics
    assert 'uniroute_model_resting{model="good"} 0.0' in metrics
    assert 'uniroute_breaker_opened_total{model="fair"} 0.0' in metrics


def test_changing_a_model_ends_its_cooldown_and_removing_it_ends_its_series(fleet: Fleet, other_process: Redis) -> None:
    name, good = "resting-arm", fleet.proxy.admin("GET", "/admin/models/good").json()
    body = {"model_name": name, "litellm_params": good["litellm_params"], "model_info": {"free": True}}
    profile = {key: good["profile"][key] for key in ("map", "errors", "labels", "mean_output_tokens", "mean_seconds")}
    assert fleet.proxy.admin("POST", "/admin/models", {**body, "profile": profile}).status_code == 201
    try:
        other_process.set(health_key(name), "status 401", px=60_000)
        other_process.publish(CHANNEL, name)
        assert wait_until(lambda: health_of(fleet, name)["state"] == "resting")
        changed = fleet.proxy.admin("PATCH", f"/admin/models/{name}", {"litellm_params": {"temperature": 0}})
        assert changed.json()["health"] == WELL, json.dumps(changed.json())
        assert wait_until(lambda: not other_process.exists(health_key(name)))
    finally:
        fleet.proxy.admin("DELETE", f"/admin/models/{name}")
    assert name not in httpx.get(f"{fleet.url}/metrics").text
