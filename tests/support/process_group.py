"""A command in a process group of its own, as a terminal starts it; nothing of it is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from tests.support.command import ROOT


class ProcessGroup:
    """Whatever it started holds its stdout and stderr open as long as it lives."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        assert process.stderr
        self.stdout: IO[str] = process.stdout
        self.stderr: IO[str] = process.stderr
        self.pid = process.pid
        self._process = process

    def interrupt(self) -> None:
        """Ctrl-C: all of the group get it."""
        os.killpg(self.pid, signal.SIGINT)

    def end(self) -> tuple[str, str, int]:
        """What it still says, once all of the group have left, and the exit status."""
        told, complained = self._process.communicate(timeout=20)
        return told, complained, self._process.returncode

    def workers(self) -> list[int]:
        """The ids of the processes that multiprocessing started for it."""
        return children_of(self.pid)


def children_of(pid: int) -> list[int]:
    """The ids of the processes that multiprocessing started for it."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True, text=True)
    return [int(found_pid) for found_pid in found.stdout.split()]


@contextmanager
def process_group(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Iterator[ProcessGroup]:
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored: inherited
    process = subprocess.Popen(
        command,
        env=environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, heeded)
    with process:
        try:
            yield ProcessGroup(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
