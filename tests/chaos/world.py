from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
import yaml

from router_core.artifact import builtin_map
from tests.chaos.ledger import Attempt, read_ledger
from tests.chaos.processes import Restartable, a_store, an_upstream
from tests.chaos.questions import MODELS
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.ports import free_port
from tests.support.proxy_process import model_entry as entry_of

WORKERS = 2
# Mean error rates; those of the clusters lie around them, so that different prompts go to different models.
ERRORS = {"alder": 0.45, "birch": 0.35, "cedar": 0.25, "larch": 0.2}
SETTINGS: Mapping[str, Any] = {
    "connect_timeout_s": 1,
    "first_token_timeout_s": 3,
    "idle_timeout_s": 2,
    "request_timeout_s": 8,
    "stream_timeout_s": 15,
    "keep_alive_s": 1,
    "profile": {"on_start": False},
}
# How the models are called, by their place: each upstream in both modes.
FORWARD = ("translate", "relay", "relay", "translate")
USAGE_STREAM, USAGE_TOTALS = "uniroute:usage", "uniroute:usage:totals"
_LOGGED = re.compile(r"request=(?P<request>\S+) decision=(?P<decision>\S+) model=(?P<model>\S+)(?P<rest>[^\n]*)")
_ENDING = re.compile(r" ending=(\S+)")


@dataclass(frozen=True)
class Logged:
    """Hold one line of the request log. `ending` is None where the next model was tried."""

    question: str
    decision: str
    model: str
    ending: str | None


@dataclass(frozen=True)
class World:
    folder: Path
    store: Restartable
    upstreams: tuple[Restartable, ...]
    ledgers: tuple[Path, ...]
    server: ServeCommand
    keys: tuple[str, ...]

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.request(method, self.server.url + path, json=body, headers=headers, timeout=20, trust_env=False)

    def attempts(self) -> list[Attempt]:
        return read_ledger(*self.ledgers)

    def records(self) -> list[dict[str, Any]]:
        """Return the usage records, as they are stored."""
        with self._redis() as client:
            entries: Any = client.xrange(USAGE_STREAM)
        return [json.loads(fields["record"]) for _, fields in entries]

    def totals(self) -> dict[str, dict[str, str]]:
        """Return the sums per model, as they are stored."""
        with self._redis() as client:
            found: Any = {model: client.hgetall(f"{USAGE_TOTALS}:{model}") for model in MODELS}
        return dict(found)

    def logged(self) -> list[Logged]:
        lines = []
        for found in _LOGGED.finditer(self.server.log):
            ending = _ENDING.search(found["rest"])
            lines.append(
                Logged(found["request"], found["decision"], found["model"], ending[1] if ending else None),
            )
        return lines

    def _redis(self) -> redis.Redis:
        return redis.Redis(port=self.store.port, decode_responses=True, socket_timeout=20)


@contextmanager
def a_world(
    folder: Path, embedder_cache: Path, seed: int, *, mix: str = "chaos", workers: int = WORKERS
) -> Iterator[World]:
    """Start the processes, profile the models and make three keys."""
    with ExitStack() as closing:
        store = a_store(folder / "store")
        ledgers = tuple(folder / f"ledger-{number}.jsonl" for number in range(2))
        upstreams = tuple(an_upstream(ledger, seed, mix) for ledger in ledgers)
        for process in (store, *upstreams):
            process.start()
            closing.callback(process.stop)
        environ = environment(
            folder / "data",
            embedder_cache,
            UNIROUTE_REDIS_URL=f"redis://127.0.0.1:{store.port}",
            UNIROUTE_ADMIN_KEY=ADMIN_KEY,
            MODEL_API_KEY="sk-x",
        )
        config = _config(folder, upstreams)
        keys = tuple(_key(config, environ, f"client-{number}") for number in range(3))
        command = ServeCommand("--config", config, "--workers", str(workers), environ=environ, log=folder / "serve.log")
        server = closing.enter_context(command)
        world = World(folder, store, upstreams, ledgers, server, keys)
        for model, error in ERRORS.items():
            _measured(world, model, error)
        yield world


def serving_port(world: World) -> int:
    return int(world.server.url.rpartition(":")[2])


def unused_address() -> str:
    return f"http://127.0.0.1:{free_port()}/v1"


def _config(folder: Path, upstreams: tuple[Restartable, ...]) -> Path:
    entries = []
    for place, model in enumerate(MODELS.values()):
        base = f"http://127.0.0.1:{upstreams[place % len(upstreams)].port}/v1"
        entries.append(entry_of(model.name, base, forward=FORWARD[place], **model.model_info))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model_list": entries, "uniroute": dict(SETTINGS)}))
    return path


def _key(config: Path, environ: Mapping[str, str], name: str) -> str:
    made = run_command("keys", "create", name, "--json", "--config", config, environ=environ)
    assert made.returncode == 0, made.stderr
    return str(json.loads(made.stdout)["key"])


def _measured(world: World, model: str, error: float) -> None:
    """Wait for a ready profile."""
    cluster_map = builtin_map()
    place = list(MODELS).index(model)
    rates = [error + (0.1 if (cluster + place) % 3 else -0.15) for cluster in range(cluster_map.size)]
    profile = {"map": cluster_map.id, "errors": rates, "labels": [50.0] * cluster_map.size}
    reply = world.admin(
        "POST", f"/admin/models/{model}/profile", {**profile, "mean_output_tokens": 40.0, "mean_seconds": 0.1}
    )
    assert reply.status_code == 200, reply.text
