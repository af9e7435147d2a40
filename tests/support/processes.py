from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

from proxy.storage.valkey import socket_path
from tests.support.program import ROOT


class ProcessGroup:
    """Run a process group. Its descendants hold its stdout and stderr open as long as they live."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        assert process.stderr
        self.stdout: IO[str] = process.stdout
        self.stderr: IO[str] = process.stderr
        self.pid = process.pid
        self._process = process

    def interrupt(self) -> None:
        """Send Ctrl-C to all of the group."""
        os.killpg(self.pid, signal.SIGINT)

    def end(self) -> tuple[str, str, int]:
        """Return output, errors and exit status once all of the group have ended."""
        output, errors = self._process.communicate(timeout=120)
        return output, errors, self._process.returncode

    def workers(self) -> list[int]:
        return children_of(self.pid)


def children_of(pid: int) -> list[int]:
    """Return the ids of the workers of a server, which are forked from a child of it or are its children."""
    parents = fork_servers(pid) or [pid]
    return [child for parent in parents for child in _children(parent, "spawn_main|multiprocessing.forkserver")]


def fork_servers(pid: int) -> list[int]:
    """Return the ids of the processes that the workers of a server are forked from."""
    return _children(pid, "multiprocessing.forkserver")


def _children(pid: int, command: str) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", command], capture_output=True, text=True)
    return [int(found_pid) for found_pid in found.stdout.split()]


def owners_of(response: httpx.Response, pids: Sequence[int]) -> list[int]:
    """Return those of the processes that serve the connection of an open response."""
    client_port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if int(row[2].split(":")[1], 16) == client_port}
    return [pid for pid in pids if sockets & open_files(pid)]


def open_files(pid: int) -> set[str]:
    """Return the paths of what a process has open, and the names of its sockets."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.add(str(file.readlink()))
    return found


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


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def store_answers(data_dir: Path) -> bool:
    """Tell whether the embedded store of this data folder takes connections."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(socket_path(data_dir / "valkey"))) == 0
