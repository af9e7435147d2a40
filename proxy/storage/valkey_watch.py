"""Stop the embedded Valkey once no process uses it any more, also where its users were killed. A program of its own.

Its users hold a shared lock on users.lock, which the kernel releases when they die; the server holds server.lock for as
long as it lives. The standard library is all that is imported here: the process stays as small as Python is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path

POLL_INTERVAL_S = 0.5

STOP_TIMEOUT_S = 5.0


def watch(folder: Path, socket_path: str, server: int) -> None:
    """Wait until the server of `folder`, process `server`, has no users or has ended, and stop it if it lives."""
    with (folder / "users.lock").open("ab") as users, (folder / "server.lock").open("ab") as alive:
        while not _locks(users.fileno()):
            if _locks(alive.fileno()):
                return
            time.sleep(POLL_INTERVAL_S)
        # While we hold users.lock nobody can join a server that is about to end.
        _shut_down(socket_path)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not _locks(alive.fileno()):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
                return
            time.sleep(0.02)


def _locks(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _shut_down(socket_path: str) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(socket_path)
        connection.sendall(b"SHUTDOWN\r\n")
        connection.recv(256)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
