from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from proxy.storage.valkey import PERSISTENCE
from tests.test_house import ROOT

COMPOSE = ROOT / "deploy" / "compose.yaml"
OURS = ("proxy-a", "proxy-b", "worker")
MONITORING = ("prometheus", "grafana")
EVERY = (*OURS, "valkey", *MONITORING)


@cache
def text() -> str:
    """Return the text with the variables' defaults filled in, as compose does before it reads anything else."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text("utf-8"))


@cache
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(text()))


def service(name: str) -> dict[str, Any]:
    return dict(compose()["services"][name])


def checked(compose_file: str) -> PyCompose:
    """Check the file or raise ValueError. The checker wants addresses in extra_hosts and rejects `host-gateway`."""
    document = yaml.safe_load(compose_file.replace("host-gateway", "127.0.0.1"))
    return PyCompose.from_yaml(json.dumps(document))  # without anchors and merge keys; JSON is YAML


def test_it_is_valid_by_the_compose_specification() -> None:
    assert sorted(checked(text()).service_names()) == sorted(EVERY)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("read_only:", "readonly:"), ("interval: 5s", "interval: 5x"), ("cap_drop: [ALL]", "cap_drop: ALL")],
)
def test_the_check_notices_what_is_wrong(right: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{wrong.partition(':')[0]}\b"):
        checked(text().replace(right, wrong))


@pytest.mark.parametrize("name", EVERY)
def test_every_container_is_read_only_and_has_no_privileges(name: str) -> None:
    described = service(name)
    assert described["read_only"] is True
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]
    assert described["tmpfs"]
    assert {"pids_limit", "mem_limit", "restart"} <= set(described)


def test_the_store_is_reached_by_ours_alone_and_keeps_what_it_acknowledged() -> None:
    valkey = service("valkey")
    assert "ports" not in valkey
    assert valkey["networks"] == ["state"]
    assert compose()["networks"]["state"]["internal"] is True
    words = valkey["command"]
    assert {name: words[words.index(f"--{name}") + 1] for name in PERSISTENCE} == PERSISTENCE
    assert any(volume.endswith(f":{words[words.index('--dir') + 1]}") for volume in valkey["volumes"])


def test_every_volume_and_network_that_is_used_is_declared() -> None:
    used = {volume.partition(":")[0] for name in EVERY for volume in service(name)["volumes"]}
    assert {volume for volume in used if not volume.startswith("./")} == set(compose()["volumes"])
    assert {network for name in EVERY for network in service(name)["networks"]} == set(compose()["networks"])


def test_the_files_that_are_mounted_are_there() -> None:
    mounted = {volume.split(":")[0] for name in EVERY for volume in service(name)["volumes"] if volume.startswith("./")}
    assert [path for path in mounted if not (COMPOSE.parent / path).exists()] == []


@pytest.mark.parametrize("name", MONITORING)
def test_what_watches_is_started_only_if_asked_for_and_not_open_to_others(name: str) -> None:
    described = service(name)
    assert described["profiles"] == ["monitoring"]
    assert described["networks"] == ["front"]
    assert all(port.startswith("127.0.0.1:") for port in described.get("ports", ()))


@pytest.mark.parametrize("name", OURS)
def test_no_secret_is_written_down(name: str) -> None:
    environment = service(name)["environment"]
    secret = ("_KEY", "_HEADERS")
    assert {key: value for key, value in environment.items() if key.endswith(secret) and value is not None} == {}


def test_the_two_proxies_differ_in_their_port_and_their_volume_alone() -> None:
    one, other = service("proxy-a"), service("proxy-b")
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"ports", "volumes"}


def test_the_worker_works_and_is_not_asked_for_its_health_over_http() -> None:
    assert service("worker")["command"] == ["uniroute", "worker"]
    assert service("worker")["healthcheck"] == {"disable": True}
    assert "ports" not in service("worker")
