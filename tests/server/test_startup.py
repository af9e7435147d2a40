from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.command import ADMIN_KEY, environment
from tests.support.ports import free_port
from tests.support.processes import open_files, store_answers
from tests.support.program import ROOT
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

CHAT = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
ROOT_KEY = {"authorization": f"Bearer {ADMIN_KEY}"}


class Starting:
    """Start a server in a process of its own, which may not be ready yet."""

    def __init__(self, folder: Path, *command: str | Path, **environ: str) -> None:
        self._log = folder / "log.txt"
        self.data_dir = folder / "data"
        variables = {**environment(self.data_dir), "UNIROUTE_ADMIN_KEY": ADMIN_KEY, **environ}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                env=variables,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def listening(self, url: str = "") -> httpx.Client:
        """Return a client once /healthz answers. `url`: if the server does not print it."""

        def answers() -> bool:
            nonlocal url
            assert self.process.poll() is None, self.log
            found = re.search(r"UniRoute at (http://\S+)/v1", self.log)
            url = found[1] if found else url
            try:
                return bool(url) and httpx.get(f"{url}/healthz", timeout=60).status_code == 200
            except httpx.TransportError:
                return False

        assert wait_until(answers, 90), self.log
        return httpx.Client(base_url=url, timeout=60)

    def end(self, *signals: signal.Signals) -> int:
        """Send the signals of a terminal to every process of it, and return the exit status."""
        for number in signals or (signal.SIGTERM,):
            os.killpg(self.process.pid, number)
        return self.process.wait(120)


@contextmanager
def starting(folder: Path, *command: str | Path, **environ: str) -> Iterator[Starting]:
    server = Starting(folder, *command, **environ)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(120)


@contextmanager
def distilling_elsewhere(data_dir: Path, progress: str = "4096 30522") -> Iterator[None]:
    """Hold the lock of another process that distils the embedding table and has come so far."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / ".static-1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(progress)
        lock.flush()
        yield


def members(group: int) -> list[str]:
    """Return the command lines of a process group that still run."""
    found = subprocess.run(["pgrep", "-a", "-g", str(group)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if line]


def quiet(log: str) -> bool:
    return not any(word in log for word in ("Traceback", "ERROR", "CRITICAL"))


SERVE = ("proxy.cli", "serve", "--port", "0")
TWO = (*SERVE, "--workers", "2")
ONCE, TWICE = (signal.SIGINT,), (signal.SIGINT, signal.SIGINT)


@pytest.mark.parametrize(
    ("command", "signals"),
    [
        pytest.param(SERVE, TWICE, id="one worker, Ctrl-C twice"),
        pytest.param(TWO, ONCE, id="two workers, Ctrl-C"),
        pytest.param(SERVE, ONCE, id="one worker, Ctrl-C", marks=pytest.mark.slow),
        pytest.param(TWO, TWICE, id="two workers, Ctrl-C twice", marks=pytest.mark.slow),
        pytest.param(TWO, (signal.SIGTERM,), id="two workers, SIGTERM to all", marks=pytest.mark.slow),
    ],
)
def test_a_starting_server_reports_progress_refuses_requests_and_stops_when_asked(
    tmp_path: Path, command: tuple[str, ...], signals: tuple[signal.Signals, ...]
) -> None:
    with distilling_elsewhere(tmp_path / "data"), starting(tmp_path, *command) as server, server.listening() as client:
        assert wait_until(lambda: "30522" in client.get("/readyz").text)
        unready = client.get("/readyz")
        step = {"what": "distilling the embedding table", "done": 4096, "total": 30522}
        assert (unready.status_code, step in unready.json()["under_way"]) == (503, True)

        refusal = client.post("/v1/chat/completions", json=CHAT, headers=ROOT_KEY)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "starting")
        assert int(refusal.headers["retry-after"]) >= 1
        assert "4096 of 30522 tokens" in refusal.json()["error"]["message"]
        others = [client.get(path, headers=ROOT_KEY).status_code for path in ("/metrics", "/admin/models", "/nowhere")]
        assert others == [503, 503, 503]

        assert server.end(*signals) == 0
        assert quiet(server.log), server.log
        assert wait_until(lambda: not members(server.process.pid)), members(server.process.pid)
    assert not store_answers(tmp_path / "data")


def test_a_profiling_worker_stops_when_asked_while_it_starts(tmp_path: Path) -> None:
    with distilling_elsewhere(tmp_path / "data"), starting(tmp_path, "proxy.cli", "worker") as worker:
        lock = tmp_path / "data" / ".static-1.lock"
        assert wait_until(lambda: str(lock.resolve()) in open_files(worker.process.pid)), worker.log
        assert worker.end(signal.SIGINT) == 0
        assert quiet(worker.log), worker.log


def test_uvicorn_with_the_app_factory_listens_at_once_too(tmp_path: Path) -> None:
    port = free_port()
    command = ("uvicorn", "proxy.app:from_environment", "--factory", "--port", str(port))
    with distilling_elsewhere(tmp_path / "data"), starting(tmp_path, *command) as server:
        with server.listening(f"http://127.0.0.1:{port}") as client:
            assert wait_until(lambda: "30522" in client.get("/readyz").text)
        server.end(signal.SIGINT, signal.SIGINT)
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("command", "status"),
    [
        pytest.param(TWO, 1, id="two workers", marks=pytest.mark.slow),
        pytest.param(("uvicorn", "proxy.app:from_environment", "--factory", "--port", "0"), 3, id="uvicorn"),
    ],
)
def test_a_start_that_fails_ends_the_process_and_says_why(
    tmp_path: Path, command: tuple[str, ...], status: int
) -> None:
    with starting(tmp_path, *command, UNIROUTE_EMBEDDER="transformer") as server:
        assert server.process.wait(90) == status
        assert "is not what the map was fitted with" in server.log
        assert "Traceback" not in server.log


def test_without_redis_a_starting_server_waits_logs_it_once_and_continues(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    away = free_port()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"uniroute": {"profile": {"on_start": False}}}))
    command = (*SERVE, "--config", tmp_path / "config.yaml")
    url = f"redis://127.0.0.1:{away}/0"
    with starting(tmp_path, *command, **environ, UNIROUTE_REDIS_URL=url) as server, server.listening() as client:
        assert wait_until(lambda: "waiting for Redis" in client.get("/readyz").text)
        refusals: list[Any] = [client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
        assert {reply.status_code for reply in refusals} == {503}
        assert "Redis, does not answer" in refusals[0].json()["error"]["message"]
        assert refusals[0].headers["retry-after"]

        with ValkeyServer(tmp_path / "valkey", away):
            assert wait_until(lambda: client.get("/readyz").status_code == 200)
            assert server.log.count("WARNING uniroute.state") == 1, server.log
            assert server.end(signal.SIGINT) == 0
