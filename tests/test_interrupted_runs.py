"""A run of the tests that is interrupted or killed leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.program import ROOT
from tests.support.reaper import marked, own_mark
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are marked on Linux alone")

# Besides the store of the run itself, one in a session of its own whose starter is in another, with no environment.
ENDLESS = """
import json, os, subprocess, sys, threading, time
from pathlib import Path
from proxy.storage.valkey import EmbeddedValkey
from tests.support.reaper import own_mark

STARTER = "import sys; from pathlib import Path; from proxy.storage.valkey import EmbeddedValkey as V;"
STARTER += "store = V(Path(sys.argv[1])); store.ensure(); print(flush=True); sys.stdin.read()"

def test_without_end(tmp_path, valkey):
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    starter = subprocess.Popen(command, env={"PYTHONPATH": os.getcwd()}, start_new_session=True, **pipes)
    assert starter.stdout.readline()
    report = Path(os.environ["REPORT"])
    report.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "mark": own_mark()}))
    report.with_suffix(".new").rename(report)
    threading.Event().wait()
"""


@contextmanager
def endless_run(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Start a run; yield its process, the one that runs its only test, and the mark of all its processes."""
    (folder / "test_endless.py").write_text(ENDLESS)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "REPORT": str(folder / "report.json")}
    plugins = ("-p", "tests.conftest", "-p", "no:cacheprovider", *options)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(ROOT / "pyproject.toml"),
        f"--rootdir={folder}",
        *plugins,
    ]
    with (folder / "log.txt").open("wb") as log:
        run = subprocess.Popen(
            [*command, str(folder / "test_endless.py")], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
    try:
        assert wait_until(lambda: run.poll() is not None or (folder / "report.json").exists(), 180)
        assert run.poll() is None, (folder / "log.txt").read_text()
        report = json.loads((folder / "report.json").read_text())
        yield run, report["pid"], report["mark"]
    finally:
        run.kill()
        run.wait()


def names_of(pids: list[int]) -> list[str]:
    return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]


@pytest.mark.parametrize(
    ("options", "whole_run", "signal_"),
    [
        ((), True, signal.SIGINT),
        (("--numprocesses", "1"), True, signal.SIGTERM),
        (("--numprocesses", "1"), False, signal.SIGKILL),
    ],
    ids=["interrupted", "terminated with its workers", "one worker killed"],
)
def test_nothing_outlives_a_run_that_a_signal_ends(
    tmp_path: Path, options: tuple[str, ...], whole_run: bool, signal_: signal.Signals
) -> None:
    with endless_run(tmp_path, *options) as (run, running, mark):
        started = marked(mark)
        assert names_of(started).count("valkey-server") == 2
        os.kill(run.pid if whole_run else running, signal_)
        assert wait_until(lambda: marked(mark) == [], 120)


def test_what_a_run_starts_bears_its_mark() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True, env={}) as child:
        assert {os.getpid(), child.pid} <= set(marked(own_mark()))
        child.kill()
