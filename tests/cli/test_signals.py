from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.command import ServeCommand, environment
from tests.support.processes import children_of, is_running, store_answers
from tests.support.program import ROOT, start_program
from tests.support.waiting import wait_until

ON_ITS_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def sighup_is_not_ignored() -> Iterator[None]:
    """Restore SIGHUP: a run under nohup ignores it, and so would all its processes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_server_whose_terminal_is_closed_ends_in_order(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    with ServeCommand(environ=environ, log=tmp_path / "log.txt") as server:
        assert server.stop(signal.SIGHUP) == 0
    assert not store_answers(tmp_path / "data")


def test_a_killed_server_leaves_no_process_behind(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    with ServeCommand(environ=environ, log=tmp_path / "log.txt") as server:
        found = subprocess.run(["pgrep", "-P", str(server.pid)], capture_output=True, text=True, check=True).stdout
        children = [int(pid) for pid in found.split()]
        server.stop(signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, children)), 60), children
    assert not store_answers(tmp_path / "data")


@contextmanager
def workers_on_a_terminal(data_dir: Path, embedder_cache: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """Start two workers on a terminal of their own; yield the process, the other end of the terminal, and the log."""
    controller, terminal = pty.openpty()
    log = data_dir.parent / "log.txt"
    command = [
        sys.executable,
        "-c",
        ON_ITS_TERMINAL,
        sys.executable,
        "-m",
        "proxy.cli",
        "serve",
        "--port",
        "0",
        "--workers",
        "2",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(data_dir, embedder_cache),
            cwd=ROOT,
            stdin=terminal,
            stdout=output,
            stderr=output,
        )
    os.close(terminal)
    try:
        assert wait_until(lambda: "ready after" in log.read_text(), 180), log.read_text()
        yield process, controller, log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_workers_are_replaced_by_sighup_and_end_when_their_terminal_is_closed(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with workers_on_a_terminal(tmp_path / "data", embedder_cache) as (process, controller, log):
        before = set(children_of(process.pid))
        process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: len(set(children_of(process.pid)) - before) >= 2, 180), log.read_text()
        os.close(controller)  # the kernel sends SIGHUP
        assert process.wait(120) == 0, log.read_text()
    assert not store_answers(tmp_path / "data")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_ends_in_order(tmp_path: Path, embedder_cache: Path, number: signal.Signals) -> None:
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        environ = environment(tmp_path / "data", embedder_cache)
        process = start_program("proxy.cli", "worker", environ=environ, stdout=output, stderr=output)
    try:
        assert wait_until(lambda: "measuring models for the store" in log.read_text(), 180), log.read_text()
        process.send_signal(number)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not store_answers(tmp_path / "data")
