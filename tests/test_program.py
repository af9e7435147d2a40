from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import ROOT, ForkedProcess, Process, start_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are forked on Linux alone")
MODULE = "tests.support.described_process"
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "TZ": "Etc/GMT+5", "A_NAME": "a\nvalue"}
Start = Callable[..., Process]


def start_really(module: str, *arguments: str, environ: Any, folder: Path = ROOT, **options: Any) -> Process:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=environ, cwd=folder, **options)


def ended(start: Start, *arguments: str, **options: Any) -> tuple[Any, str, int]:
    """Return what the program printed of its process, the last line of its errors, and its status."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(MODULE, *arguments, environ=ENVIRON, stdout=stdout, stderr=stderr, **options)
        status = process.wait(120)
        for file in (stdout, stderr):
            file.seek(0)
        return json.loads(stdout.read()), stderr.read().decode().strip().rpartition("\n")[2], status


@pytest.mark.parametrize("ending", ["end", "status", "error", "interrupt", "kill"])
def test_a_forked_program_has_what_its_own_interpreter_would_give_it_and_ends_alike(ending: str) -> None:
    assert ended(start_program, ending, "two words") == ended(start_really, ending, "two words")


def test_folder_session_and_descriptors_are_those_that_were_asked_for(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    options: Any = {"folder": tmp_path, "start_new_session": True, "pass_fds": [reading, writing]}
    forked, real = (ended(start, "end", **options) for start in (start_program, start_really))
    os.close(reading)
    os.close(writing)
    assert forked == real
    assert {reading, writing} <= set(forked[0]["descriptors"])


def test_signals_that_are_ignored_here_are_ignored_there() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(start_program, "end") == ended(start_really, "end")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_programs_are_forked_until_their_interpreter_would_differ(tmp_path: Path) -> None:
    def started(**more: str) -> Process:
        with (tmp_path / "log.txt").open("wb") as log:
            process = start_program(MODULE, "end", environ={**ENVIRON, **more}, stdout=log, stderr=log)
        process.wait(120)
        return process

    assert isinstance(started(), ForkedProcess)
    assert not isinstance(started(PYTHONHASHSEED="1"), ForkedProcess)
