"""What stands between the load and the upstream: ours, litellm's SDK alone, gateways of others. Measures nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.bench.overhead.processes import free_port, started, until_listening
from tests.support.command import ADMIN_KEY, ROOT, environment
from tests.support.server import arm, uniform_profile

GATEWAY_CORE = 0
MODELS = 2
PERMIT_NO_KEY = "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"


@dataclass(frozen=True)
class Contender:
    """Something that answers OpenAI's calls on a port."""

    name: str
    port: int
    pid: int
    ready_s: float
    model: str = "auto"
    headers: Mapping[str, str] = field(default_factory=dict)


Opened = AbstractContextManager[Contender]
Opener = Callable[[Path, int], Opened]
"""A folder to work in and the upstream's port."""


def ours(
    name: str, model: str, *, models: int = MODELS, embedder_cache: Path | None = None, **settings: object
) -> Opener:
    @contextmanager
    def opened(folder: Path, upstream: int) -> Iterator[Contender]:
        url = f"http://127.0.0.1:{upstream}/v1"
        config = {
            "model_list": [arm(f"model-{n}", url, price=1e-7 * (n + 1)) for n in range(models)],
            "uniroute": {"profile": {"on_start": False}, **settings},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        more = {"ARM_API_KEY": "sk-bench", "UNIROUTE_ADMIN_KEY": ADMIN_KEY}
        environ = environment(folder / "data", embedder_cache, **more)
        port, log = free_port(), folder / "log.txt"
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "proxy.cli",
            "serve",
            "--port",
            str(port),
            "--config",
            folder / "config.yaml",
        ]
        with started(command, core=GATEWAY_CORE, environ=environ, log=log, cwd=ROOT) as process:
            ready_s = until_listening(port, process, log)
            for n in range(models):
                _profile(f"http://127.0.0.1:{port}", f"model-{n}", 0.2 + 0.5 * n / models)
            yield Contender(name, port, process.pid, ready_s, model)

    return opened


def _profile(url: str, name: str, error: float) -> None:
    import httpx

    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    reply = httpx.post(f"{url}/admin/models/{name}/profile", json=uniform_profile(error), headers=headers, timeout=60)
    reply.raise_for_status()


@contextmanager
def sdk_floor(folder: Path, upstream: int) -> Iterator[Contender]:
    port, log = free_port(), folder / "log.txt"
    command: list[str | Path] = [sys.executable, "-m", "tests.bench.overhead.floor", str(upstream), str(port)]
    with started(command, core=GATEWAY_CORE, log=log, cwd=ROOT) as process:
        yield Contender("FastAPI + litellm SDK", port, process.pid, until_listening(port, process, log), "bench")


def litellm_proxy(cache: Path) -> Opener:
    """From PyPI into an environment of its own, at the pinned version."""

    @contextmanager
    def opened(folder: Path, upstream: int) -> Iterator[Contender]:
        python = _environment(cache / "litellm", "litellm[proxy]==1.106.2")
        entry = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "-"}
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"model_list": [{"model_name": "bench", "litellm_params": entry}]})
        )
        port, log = free_port(), folder / "log.txt"
        command: list[str | Path] = [
            python.with_name("litellm"),
            "--config",
            folder / "config.yaml",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", PERMIT_NO_KEY: "true"}
        with started(command, core=GATEWAY_CORE, environ=environ, log=log) as process:
            yield Contender("LiteLLM proxy", port, process.pid, until_listening(port, process, log), "bench")

    return opened


def portkey(cache: Path) -> Opener:
    """From npm."""

    @contextmanager
    def opened(folder: Path, upstream: int) -> Iterator[Contender]:
        home = cache / "portkey"
        script = home / "node_modules/@portkey-ai/gateway/build/start-server.js"
        if not script.exists():
            home.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "install", "--prefix", str(home), "@portkey-ai/gateway"], check=True)
        port, log = free_port(), folder / "log.txt"
        command: list[str | Path] = ["node", script, "--headless", f"--port={port}"]
        headers = {
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1",
            "authorization": "Bearer -",
        }
        with started(command, core=GATEWAY_CORE, log=log, environ={**os.environ, "NODE_ENV": "production"}) as process:
            yield Contender("Portkey", port, process.pid, until_listening(port, process, log), "bench", headers)

    return opened


def _environment(folder: Path, *packages: str) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
