from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.cli.deployed import evaluate_deployment
from proxy.cli.models import joined
from proxy.settings.schema import load_settings
from router_core.evaluation.outcomes import read_outcomes
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.profiling import knows, write_validation_set
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

Environ = dict[str, str]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[tuple[ServeCommand, Environ]]:
    """Serve two measured models, one of them right in half of the families, and one with an uploaded profile."""
    folder = tmp_path_factory.mktemp("served")
    prompts = write_validation_set(folder / "prompts.jsonl")
    more = {"UNIROUTE_ADMIN_KEY": ADMIN_KEY, "UNIROUTE_VALIDATION_SET": str(prompts)}
    environ = environment(folder / "data", embedder_cache, **more)
    with (
        ScriptedUpstream(knows("north", "east")) as half,
        ScriptedUpstream(knows("north", "east", "south", "west")) as all_of_it,
        ServeCommand(environ=environ, log=folder / "log.txt") as server,
    ):
        add(server, "team/half", half.url, 1e-6, {"prompts": 24})
        add(server, "all", all_of_it.url, 1e-5, {"prompts": 32})
        add(server, "handed", half.url, 1e-6, uniform_profile(0.5))
        assert wait_until(
            lambda: [card_of(server, name)["state"] for name in ("team/half", "all")] == ["ready"] * 2, 60
        )
        yield server, {**environ, "UNIROUTE_URL": server.url}


def add(server: ServeCommand, name: str, url: str, price: float, profile: dict[str, Any]) -> None:
    info = {"input_cost_per_token": price, "output_cost_per_token": 4 * price}
    params = {"model": "openai/scripted", "api_base": url}
    body = {"model_name": name, "litellm_params": params, "model_info": info, "profile": profile}
    assert httpx.post(f"{server.url}/admin/models", json=body, headers=ADMIN).is_success


def card_of(server: ServeCommand, name: str) -> dict[str, Any]:
    card: dict[str, Any] = httpx.get(f"{server.url}/admin/models/{name}", headers=ADMIN).json()
    return card


def exported(environ: Environ, folder: Path, *names: str) -> list[dict[str, Any]]:
    ended = run_command("models", "outcomes", *names, "--out", folder / "outcomes.jsonl", environ=environ)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]


def test_a_jobs_graded_answers_are_shown_to_the_administrator_alone(served: tuple[ServeCommand, Environ]) -> None:
    server, _ = served
    path = f"{server.url}/admin/jobs/{card_of(server, 'team/half')['job']['id']}/outcomes"
    lines = httpx.get(path, headers=ADMIN).json()["outcomes"]
    scores = {line["source"]: line["scores"]["team/half"] for line in lines}
    assert (len(lines), scores) == (24, {"north": 1.0, "east": 1.0, "south": 0.0, "west": 0.0})
    assert httpx.get(path).status_code == 401
    missing = httpx.get(f"{server.url}/admin/jobs/nobody/outcomes", headers=ADMIN)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")


def test_what_is_exported_is_an_outcomes_file_with_its_prices(
    served: tuple[ServeCommand, Environ], tmp_path: Path
) -> None:
    files = tmp_path / "outcomes.jsonl", tmp_path / "prices.json"
    ended = run_command("models", "outcomes", "--out", files[0], "--prices", files[1], environ=served[1])
    assert (ended.returncode, "left out: handed has no graded answers" in ended.stderr) == (0, True), ended.stderr
    outcomes = read_outcomes(*files)
    assert (outcomes.models, len(outcomes.prompts)) == (("all", "team/half"), 32)
    assert [price.output_cost_per_token for price in outcomes.prices] == [4e-5, 4e-6]
    assert (outcomes.scores[:, 0] == 1.0).all()


def test_the_same_prompt_is_one_line_with_the_scores_of_all(
    served: tuple[ServeCommand, Environ], tmp_path: Path
) -> None:
    lines = exported(served[1], tmp_path)
    assert len({line["prompt"] for line in lines}) == len(lines) == 32
    assert sum(set(line["scores"]) == {"all", "team/half"} for line in lines) == 24
    assert lines[0].keys() == {"id", "source", "prompt", "scores", "output_tokens"}


def test_one_model_alone_can_be_named(served: tuple[ServeCommand, Environ], tmp_path: Path) -> None:
    assert {name for line in exported(served[1], tmp_path, "team/half") for name in line["scores"]} == {"team/half"}


def test_a_named_model_that_was_never_asked_is_refused(served: tuple[ServeCommand, Environ], tmp_path: Path) -> None:
    for name, message in (("handed", "handed has no graded answers: not asked here"), ("nobody", "no model named")):
        ended = run_command("models", "outcomes", "all", name, "--out", tmp_path / "file", environ=served[1])
        assert (ended.returncode, message in ended.stderr) == (1, True), ended.stderr
    assert not (tmp_path / "file").exists()


def test_deployed_profiles_are_judged_on_an_outcomes_file(
    served: tuple[ServeCommand, Environ], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, environ = served
    exported(environ, tmp_path)
    monkeypatch.setenv("UNIROUTE_ADMIN_KEY", ADMIN_KEY)
    settings = load_settings(None, environ)
    results, common = evaluate_deployment(tmp_path / "outcomes.jsonl", settings, server.url)
    assert (common.models, common.only_deployed) == (("all", "team/half"), ("handed",))
    assert (results.protocol.test_prompts, results.protocol.labels) == (24, (28,))
    (ours,), (cheapest,) = results.methods["ours"].values(), results.methods["cheapest"].values()
    assert ours.peak.mean > cheapest.peak.mean


def test_what_is_exported_is_what_evaluate_reads(served: tuple[ServeCommand, Environ], tmp_path: Path) -> None:
    files = "--outcomes", str(tmp_path / "outcomes.jsonl"), "--prices", str(tmp_path / "prices.json")
    exporting = run_command("models", "outcomes", "--out", files[1], *files[2:], environ=served[1])
    assert exporting.returncode == 0, exporting.stderr
    studied = run_command("evaluate", *files, "--labels", "5,10", "--trials", "3", "--json", environ=served[1])
    deployed = run_command("evaluate", *files[:2], "--deployed", "--json", environ=served[1])
    for ended in (studied, deployed):
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["protocol"]["models"] == ["all", "team/half"]
    assert "left out, not in outcomes.jsonl: handed" in deployed.stderr


def test_lines_are_joined_by_their_prompt() -> None:
    line = {"id": "1", "source": "s", "prompt": "p"}
    first = {**line, "scores": {"a": 1.0}}
    second = {**line, "scores": {"b": 0.0}, "output_tokens": {"b": 3}}
    assert joined([first, second]) == [{**line, "scores": {"a": 1.0, "b": 0.0}, "output_tokens": {"b": 3}}]
