from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from router_core.artifact import builtin_map
from tests.support.program import ROOT, Process, start_program
from tests.support.waiting import until_taken

ADMIN_KEY = "admin-key-of-the-tests"
START_S = 300.0
# Circuit-breaker settings for tests of other things: a cooldown is over before the next request.
NO_COOLDOWN = {"cooldown_s": 0.001, "longest_cooldown_s": 0.001}
POLL_S = 0.05


class ProxyProcess:
    """Start it, call it at `url`, stop it. `log` is what it wrote."""

    def __init__(
        self,
        folder: Path,
        embedder_cache: Path,
        config: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(dict(config)))
        for table in embedder_cache.glob("static-*"):
            if not (folder / table.name).exists():
                (folder / table.name).symlink_to(table)
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")},
            "PYTHONPATH": str(ROOT),
            "UNIROUTE_CONFIG": str(self._config),
            "UNIROUTE_DATA_DIR": str(folder),
            "UNIROUTE_ADMIN_KEY": ADMIN_KEY,
            "UNIROUTE_LOG_FORMAT": "text",
            **(environ or {}),
        }
        self._log = (folder / "log.txt").open("ab+")
        self._process: Process | None = None
        self.url = ""

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            self._process = start_program(
                "tests.support.serve",
                str(bound.fileno()),
                environ=self._environ,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[bound.fileno()],
                translates="translate" in self._config.read_text(),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, signal_: signal.Signals = signal.SIGTERM) -> int | None:
        """End it, and return its exit status; None: it does not run."""
        status = None
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal_)
            status = self._process.wait(120)
            self._process = None
        self._log.close()
        return status

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)

    def put_profile(self, name: str, error: float, *, output_tokens: float = 20.0) -> None:
        """Store a ready profile: the same error rate in every cluster, well supported."""
        document = uniform_profile(error, output_tokens=output_tokens)
        until_taken(lambda: self.admin("POST", f"/admin/models/{name}/profile", document))

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self._process is not None
            assert self._process.poll() is None, f"the proxy ended: {self.log}"
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)
        raise AssertionError(f"the proxy was not ready within {START_S} s: {self.log}")


def uniform_profile(error: float, *, output_tokens: float = 20.0) -> dict[str, Any]:
    cluster_map = builtin_map()
    return {
        "map": cluster_map.id,
        "errors": [error] * cluster_map.size,
        "labels": [50.0] * cluster_map.size,
        "mean_output_tokens": output_tokens,
        "mean_seconds": 0.5,
    }


def model_entry(name: str, api_base: str, *, price: float = 1e-6, **info: Any) -> dict[str, Any]:
    """Return one entry of model_list."""
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"openai/{name}-upstream",
            "api_base": api_base,
            "api_key": "os.environ/MODEL_API_KEY",
        },
        "model_info": {"input_cost_per_token": price, "output_cost_per_token": 4 * price, **info},
    }
