from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.command import ADMIN_KEY, ServeCommand, environment
from tests.support.outcome_files import PRICES, error_line, rows, run, write_files
from tests.support.proxy_process import uniform_profile

Environ = dict[str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Environ]:
    """Serve a cheap model with a bad profile, an expensive one with a good profile, and one that no file scores."""
    folder = tmp_path_factory.mktemp("served")
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    with ServeCommand(environ=environ, log=folder / "log.txt") as server:
        for name, error in (("tiny", 0.7), ("large", 0.2), ("unheard", 0.5)):
            add(server, name, error)
        yield {**environ, "UNIROUTE_URL": server.url}


def add(server: ServeCommand, name: str, error: float) -> None:
    price = PRICES.get(name, 1e-6)
    body = {
        "model_name": name,
        "litellm_params": {"model": f"openai/{name}", "api_base": "http://127.0.0.1:9/v1"},
        "model_info": {"input_cost_per_token": price, "output_cost_per_token": price},
        "profile": uniform_profile(error),
    }
    reply = httpx.post(f"{server.url}/admin/models", json=body, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert reply.is_success, reply.text


def test_deployed_profiles_are_measured_on_the_models_that_both_have(served: Environ, tmp_path: Path) -> None:
    files = write_files(tmp_path, rows(90, "tiny", "middle", "large"))
    ended = run(served, *files[:2], "--deployed", "--json")
    document = json.loads(ended.stdout)
    assert document["protocol"]["models"] == ["large", "tiny"]
    assert list(document["methods"]) == ["cheapest", "best_single", "random_mix", "ours", "oracle"]
    assert ended.stderr.splitlines()[-2:] == [
        "left out, not deployed: middle",
        "left out, not in outcomes.jsonl: unheard",
    ]


def test_deployed_profiles_have_a_page_and_a_picture_too(served: Environ, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    files = write_files(tmp_path, rows(90, "tiny", "large"))
    ended = run(served, *files[:2], "--deployed", "--html", page, "--svg", picture)
    assert (ended.returncode, "routed by the deployed profiles" in ended.stdout) == (0, True), ended.stderr
    assert "Deployed profiles: outcomes.jsonl" in page.read_text()
    assert "Deferral curves" in picture.read_text()


def test_two_models_must_be_both_scored_and_deployed(served: Environ, tmp_path: Path) -> None:
    files = write_files(tmp_path, rows(40, "middle", "large"))
    message = error_line(run(served, *files[:2], "--deployed"), 1)
    assert message.endswith("Both: large. Only scored: middle. Only deployed: tiny, unheard")
