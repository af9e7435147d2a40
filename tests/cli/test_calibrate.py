"""Run `uniroute calibrate` on a server with a cheap model that knows half of the clusters, and an expensive one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proxy.cli.calibrate import sample
from proxy.cli.client import ServerClient
from proxy.cli.deployed import deployed_pool
from router_core.artifact import builtin_map, save_map
from router_core.clustering import ClusterMap
from router_core.validation.families.registry import builtin_validation_set
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.proxy_process import uniform_profile

Environ = dict[str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[tuple[ServeCommand, Environ]]:
    folder = tmp_path_factory.mktemp("served")
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    with ServeCommand(environ=environ, log=folder / "log.txt") as server:
        halves = uniform_profile(0.15)
        halves["errors"][::2] = [0.7] * len(halves["errors"][::2])
        add(server, "cheap", halves, 1e-6)
        add(server, "dear", uniform_profile(0.1, output_tokens=40.0), 1e-5)
        add(server, "priceless", uniform_profile(0.0), None)
        yield server, {**environ, "UNIROUTE_URL": server.url}


def add(server: ServeCommand, name: str, profile: dict[str, Any], price: float | None) -> None:
    info = {} if price is None else {"input_cost_per_token": price, "output_cost_per_token": 4 * price}
    params = {"model": f"openai/{name}", "api_base": "http://127.0.0.1:9/v1"}
    body = {"model_name": name, "litellm_params": params, "model_info": info, "profile": profile}
    reply = httpx.post(f"{server.url}/admin/models", json=body, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert reply.status_code == 201, reply.text


def calibrated(environ: Environ, *arguments: str | Path) -> dict[str, Any]:
    ended = run_command("calibrate", *arguments, "--json", environ=environ)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def routed(server: ServeCommand, prompt: str, lambda_: float) -> str:
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
    reply = httpx.post(f"{server.url}/v1/route", json=body, headers={"lambda": f"{lambda_:g}"}, timeout=20)
    return str(reply.json()["model"])


def test_the_share_of_the_best_models_quality_is_kept_at_less_cost(served: tuple[ServeCommand, Environ]) -> None:
    found = calibrated(served[1], "--quality", "0.97")
    assert list(found) == [
        "lambda",
        "quality",
        "relative_quality",
        "relative_interval",
        "usd_per_1k",
        "best_single",
        "shares",
        "prompts",
        "cost_unit",
    ]
    assert found["relative_quality"] >= 0.97
    assert (found["best_single"]["model"], found["best_single"]["quality"]) == ("dear", pytest.approx(0.9))
    assert found["usd_per_1k"] < found["best_single"]["usd_per_1k"]
    assert (found["prompts"], found["cost_unit"]) == (len(builtin_validation_set()), "reference")
    assert set(found["shares"]) == {"cheap", "dear"}


def test_the_server_routes_as_was_promised(served: tuple[ServeCommand, Environ], tmp_path: Path) -> None:
    server, environ = served
    prompts = [prompt.text.replace("\n", " ").strip() for prompt in builtin_validation_set().prompts[::23]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    found = calibrated(environ, "--quality", "0.95", "--prompts", tmp_path / "prompts.txt")
    chosen = Counter(routed(server, prompt, found["lambda"]) for prompt in prompts)
    assert {name: chosen[name] / len(prompts) for name in found["shares"]} == found["shares"]
    assert 0 < chosen["cheap"] < len(prompts) == found["prompts"]


def test_a_budget_is_kept_and_buys_the_best_that_it_can(served: tuple[ServeCommand, Environ]) -> None:
    low, high = (calibrated(served[1], "--budget-usd-per-1k", usd) for usd in ("0.5", "1"))
    assert low["usd_per_1k"] <= 0.5 < high["usd_per_1k"] <= 1
    assert low["quality"] < high["quality"]
    assert low["lambda"] > high["lambda"]


def test_the_cost_unit_of_the_configuration_is_the_unit_of_lambda(
    served: tuple[ServeCommand, Environ], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"uniroute": {"cost_unit": "cents"}}))
    in_cents = calibrated(served[1], "--quality", "0.97", "--config", tmp_path / "config.yaml")
    assert in_cents["cost_unit"] == "cents"
    assert in_cents["lambda"] > calibrated(served[1], "--quality", "0.97")["lambda"]


def test_a_person_is_told_what_to_set_and_that_it_is_only_expected(served: tuple[ServeCommand, Environ]) -> None:
    ended = run_command("calibrate", "--quality", "0.97", environ=served[1])
    lambda_ = calibrated(served[1], "--quality", "0.97")["lambda"]
    assert f"`lambda: {lambda_:g}` in the uniroute section" in ended.stdout
    assert f"`uniroute lambda set {lambda_:g}`" in ended.stdout
    assert "always dear" in ended.stdout
    low, high = calibrated(served[1], "--quality", "0.97")["relative_interval"]
    assert f"it may be {low:.1%} to {high:.1%} of the best" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "give --quality or --budget-usd-per-1k"),
        (("--quality", "0.9", "--budget-usd-per-1k", "1"), 2, "and not both"),
        (("--quality", "1.5"), 1, "the most within reach is"),
        (("--budget-usd-per-1k", "0.0001"), 1, "the least possible is $"),
        (("--quality", "0.9", "--prompts", "/nowhere.txt"), 2, "cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    served: tuple[ServeCommand, Environ], arguments: tuple[str, ...], status: int, message: str
) -> None:
    ended = run_command("calibrate", *arguments, environ=served[1])
    assert (ended.returncode, message in ended.stderr, ended.stdout) == (status, True, ""), ended.stderr


def test_another_map_than_the_servers_is_refused(
    served: tuple[ServeCommand, Environ], tmp_path: Path, cluster_map: ClusterMap
) -> None:
    save_map(cluster_map.with_hard_assignment(), tmp_path / "map")
    ended = run_command("calibrate", "--quality", "1", environ={**served[1], "UNIROUTE_MAP": str(tmp_path / "map")})
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"was measured on map {cluster_map.id}, but the map of the settings here is" in ended.stderr


def test_a_sample_keeps_repeats_and_every_part_of_the_file() -> None:
    assert sample(iter("aab"), 5) == ["a", "a", "b"]
    drawn = sample(("often" if number % 4 else "seldom" for number in range(4000)), 400)
    assert len(drawn) == 400
    assert 250 < Counter(drawn)["often"] < 350


def test_a_lambda_is_set_shown_and_taken_back(served: tuple[ServeCommand, Environ]) -> None:
    environ = served[1]
    set_, shown = (run_command("lambda", *each, environ=environ) for each in (["set", "0.491"], ["show", "--json"]))
    reset = run_command("lambda", "reset", environ=environ)

    assert set_.stdout.startswith("λ = 0.491, set by root at ")
    assert set_.stdout.endswith("; the configuration has 0.1\n")
    assert json.loads(shown.stdout)["value"] == 0.491
    assert reset.stdout == run_command("lambda", "show", environ=environ).stdout == "λ = 0.1, of the configuration\n"
    for wrong in ("-1", "nan", "much"):
        assert run_command("lambda", "set", "--", wrong, environ=environ).returncode == 2


def test_a_paused_model_is_listed_as_such_and_is_no_choice_of_a_calibration(
    served: tuple[ServeCommand, Environ],
) -> None:
    server, environ = served
    try:
        paused = run_command("models", "pause", "cheap", environ=environ)
        listed = run_command("models", "list", environ=environ).stdout
        with ServerClient(server.url, ADMIN_KEY) as client:
            pool = deployed_pool(client, builtin_map())
    finally:
        resumed = run_command("models", "resume", "cheap", environ=environ)

    expected = "cheap is paused; `uniroute models resume cheap` lets it go on\n"
    assert (paused.returncode, paused.stderr) == (0, expected)
    assert [line.split()[:3] for line in listed.splitlines() if "paused" in line] == [["cheap", "ready,", "paused"]]
    assert [pool.names[row] for row in pool.routable_rows] == ["dear"]
    assert (resumed.returncode, resumed.stderr) == (0, "cheap takes traffic again\n")
    assert run_command("models", "pause", "nobody", environ=environ).returncode == 1
