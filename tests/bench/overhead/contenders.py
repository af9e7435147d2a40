"""Start and ask each server that stands between the load and the upstream."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import yaml

from proxy.settings.model_config import ModelInfo
from router_core.artifact import load_map
from tests.bench.overhead.processes import started, until_it_answers
from tests.support.client_apis import APIName
from tests.support.command import ADMIN_KEY, environment
from tests.support.ports import free_port
from tests.support.program import ROOT
from tests.support.proxy_process import model_entry, uniform_profile

ROUTED, PINNED, TRANSLATED = "ours, routed", "ours, pinned", "ours, routed, translated"
MESSAGES, RESPONSES = "ours, routed, Messages", "ours, routed, Responses"
FLOOR, LITELLM, PORTKEY = "FastAPI + litellm SDK", "LiteLLM proxy", "Portkey"
# The API in which a row is asked, where that is not chat.
API_OF_ROW: Mapping[str, APIName] = {MESSAGES: "messages", RESPONSES: "responses"}
MODELS = 2
BATCH_SIZE = 32
# Whether a model says if it is relayed or translated. Else there is one way, and one row for it.
HAS_FORWARD_MODES = "forward" in ModelInfo.model_fields
PERMIT_NO_KEY = "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"


@dataclass(frozen=True)
class Server:
    """Describe one program; its rows differ in the model that is requested."""

    rows: Mapping[str, str]
    command: Sequence[object]
    port: int
    log: Path
    environ: Mapping[str, str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By model, to be put once: they are kept from one start to the next."""


@dataclass(frozen=True)
class Running:
    process: Popen[bytes]
    ready_s: float
    """Until it has answered a first completion."""


@contextmanager
def running(server: Server, core: int) -> Iterator[Running]:
    with started(server.command, core=core, environ=server.environ, log=server.log, cwd=ROOT) as process:
        yield Running(process, until_it_answers(lambda: answers(server), process, server.log))


def is_ready(server: Server) -> bool:
    return _status(server.port, "GET", "/readyz") == 200


def answers(server: Server) -> bool:
    body = {"model": next(iter(server.rows.values())), "messages": [{"role": "user", "content": "Are you there?"}]}
    headers = {"content-type": "application/json", **server.headers}
    return _status(server.port, "POST", "/v1/chat/completions", json.dumps(body), headers) == 200


def _status(
    port: int, method: str, path: str, body: str | None = None, headers: Mapping[str, str] | None = None
) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except http.client.HTTPException as broken:
        raise OSError(str(broken)) from broken
    finally:
        connection.close()


def ours(
    folder: Path,
    upstream_url: str,
    rows: Mapping[str, str],
    *,
    models: int = MODELS,
    embedder_cache: Path | None = None,
    cluster_map: Path | None = None,
    info: Mapping[str, object] | None = None,
    **settings: object,
) -> Server:
    """Describe our server. `cluster_map`: a folder, else the built-in one; `info`: more of each model."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{n}" for n in range(models)]
    model_list = [model_entry(name, upstream_url, price=1e-7 * (n + 1), **(info or {})) for n, name in enumerate(names)]
    mapped = {"map": str(cluster_map)} if cluster_map else {}
    config = {"model_list": model_list, "uniroute": {"profile": {"on_start": False}, **mapped, **settings}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environ = environment(folder / "data", embedder_cache, MODEL_API_KEY="sk-bench", UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    port = free_port()
    command = [sys.executable, "-m", "proxy.cli", "serve", "--port", str(port), "--config", folder / "config.yaml"]
    profiles = {name: a_profile(0.2 + 0.5 * n / models, cluster_map) for n, name in enumerate(names)}
    return Server(rows, command, port, folder / "log.txt", environ, profiles=profiles)


def a_profile(error: float, folder: Path | None) -> Mapping[str, object]:
    if folder is None:
        return uniform_profile(error)
    fitted = load_map(folder)
    rates = {"errors": [error] * fitted.size, "labels": [50.0] * fitted.size}
    return {**uniform_profile(error), "map": fitted.id, **rates}


@contextmanager
def profiled(server: Server, core: int | None = None) -> Iterator[Running]:
    """Start a server and measure its models. Not timed: this start may also have made the embedding table."""
    with started(server.command, core=core, environ=server.environ, log=server.log, cwd=ROOT) as process:
        ready_s = until_it_answers(lambda: is_ready(server), process, server.log)
        with ThreadPoolExecutor(BATCH_SIZE) as pool:
            list(pool.map(lambda name: _put_profile(server, name), server.profiles))
        yield Running(process, ready_s)


def _put_profile(server: Server, name: str) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}", "content-type": "application/json"}
    path, document = f"/admin/models/{name}/profile", json.dumps(server.profiles[name])
    status = _status(server.port, "POST", path, document, headers)
    if status != 200:
        raise SystemExit(f"the profile of {name} was answered with {status}")


def sdk_floor(folder: Path, upstream_url: str) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.overhead.floor", upstream_url, str(port)]
    return Server({FLOOR: "bench"}, command, port, folder / "log.txt")


def litellm_proxy(folder: Path, upstream_url: str, program: Path) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    params = {"model": "openai/bench", "api_base": upstream_url, "api_key": "-"}
    entry = {"model_name": "bench", "litellm_params": params}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_list": [entry]}))
    port = free_port()
    command = [program, "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", PERMIT_NO_KEY: "true"}
    return Server({LITELLM: "bench"}, command, port, folder / "log.txt", environ)


def portkey(folder: Path, upstream_url: str, script: Path) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": upstream_url,
        "authorization": "Bearer -",
    }
    environ = {**os.environ, "NODE_ENV": "production"}
    command = ["node", script, "--headless", f"--port={port}"]
    return Server({PORTKEY: "bench"}, command, port, folder / "log.txt", environ, headers)
