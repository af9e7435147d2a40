"""End every process that a test run started once the run itself has ended, however it ended.

A run that is killed closes nothing. So each run sets a mark that all its processes inherit, and holds the only writing
end of a pipe. A small process reads the other end. Once that is closed, it kills every process with the mark. Process
groups would not do, as the embedded store leaves them; nor would environment variables, which Valkey overwrites. The
mark is the soft limit of RLIMIT_RTTIME, which has no effect on processes that are not scheduled in real time. Linux.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

GIVE_UP_S = 10.0
_LINE = "Max realtime timeout"


class Reaper:
    """Reap for one process that runs tests. `close` ends the marked processes before this one has ended."""

    def __init__(self) -> None:
        mark = int.from_bytes(os.urandom(7), "big") + 1
        reading, self._writing = os.pipe()
        command = [sys.executable, "-I", "-S", __file__, str(mark), str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=reading, start_new_session=True)
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_RTTIME, (mark, resource.RLIM_INFINITY))

    def close(self) -> None:
        os.close(self._writing)
        self._process.wait()


def own_mark() -> int:
    return resource.getrlimit(resource.RLIMIT_RTTIME)[0]


def marked(mark: int) -> list[int]:
    """Return the ids of the processes with this mark that are not zombies."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _bears(folder, mark)]


def _bears(folder: Path, mark: int) -> bool:
    try:
        limits = (folder / "limits").read_text()
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has just ended, or is another user's
        return False
    return state != "Z" and any(line.split()[3] == str(mark) for line in limits.splitlines() if line.startswith(_LINE))


def reap(mark: int, run: int) -> None:
    """Wait for the end of the run, then kill until nothing else with its mark is left."""
    resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdin.buffer.read()
    deadline = time.monotonic() + GIVE_UP_S
    while (left := [pid for pid in marked(mark) if pid != run]) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


if __name__ == "__main__":
    reap(int(sys.argv[1]), int(sys.argv[2]))
