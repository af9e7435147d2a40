from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from router_core.artifact import save_map
from router_core.clustering import ClusterMap
from router_core.embedding import StaticEmbedder
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.profiling import FAMILIES, knows, write_validation_set
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

NAMES = ("added", "configured")


def a_map(folder: Path, embedder: StaticEmbedder, words: tuple[str, ...]) -> str:
    """Write a map with one cluster around each word, and return its id."""
    made = ClusterMap(np.asarray(embedder.embed(list(words))), embedder_id=embedder.id, top=2)
    save_map(made, folder)
    return made.id


def cards(server: ServeCommand) -> list[dict[str, Any]]:
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    return [httpx.get(f"{server.url}/admin/models/{name}", headers=admin).json() for name in NAMES]


def ready(server: ServeCommand) -> list[dict[str, Any]]:
    """Return the cards of both models once they are measured."""
    assert wait_until(lambda: [card.get("state") for card in cards(server)] == ["ready"] * 2), server.log
    return cards(server)


def write_config(path: Path, upstream: ScriptedUpstream) -> Path:
    params = {"model": "openai/scripted", "api_base": upstream.url}
    model = {"model_name": "configured", "litellm_params": params, "model_info": {"free": True}}
    path.write_text(yaml.safe_dump({"model_list": [model], "uniroute": {"profile": {"prompts": 24}}}))
    return path


def test_after_a_restart_on_another_map_models_are_ready_without_new_prompts(
    tmp_path: Path, embedder_cache: Path, embedder: StaticEmbedder
) -> None:
    maps = {name: tmp_path / name for name in ("one", "other")}
    ids = [a_map(maps["one"], embedder, FAMILIES), a_map(maps["other"], embedder, ("north east", "south west", "say"))]
    more = {
        "UNIROUTE_ADMIN_KEY": ADMIN_KEY,
        "UNIROUTE_VALIDATION_SET": str(write_validation_set(tmp_path / "prompts.jsonl")),
    }
    environ = environment(tmp_path / "data", embedder_cache, **more)
    with ScriptedUpstream(knows("north", "east")) as upstream:
        config = write_config(tmp_path / "config.yaml", upstream)
        on_one, on_other = ({**environ, "UNIROUTE_MAP": str(folder)} for folder in maps.values())
        with ServeCommand("--config", config, environ=on_one, log=tmp_path / "one.txt") as server:
            adding = ("models", "add", "added", "--model", "openai/added", "--api-base", upstream.url, "--free")
            ended = run_command(*adding, "--prompts", "30", environ={**environ, "UNIROUTE_URL": server.url})
            assert ended.returncode == 0, ended.stderr
            before = ready(server)
        requests = len(upstream.history)
        with ServeCommand("--config", config, environ=on_other, log=tmp_path / "other.txt") as server:
            after = ready(server)
    assert (requests, len(upstream.history)) == (54, 54)
    assert [[card["profile"]["map"] for card in found] for found in (before, after)] == [[i] * 2 for i in ids]
    labels = [[sum(card["profile"]["labels"]) for card in found] for found in (before, after)]
    assert labels == [pytest.approx([30, 24], abs=1e-4)] * 2
    assert [card["profile"]["measured_at"] for card in before] == [card["profile"]["measured_at"] for card in after]
    assert [card["job"]["spent_usd"] for card in after] == [0, 0]
