"""Start programs under test as `python -m MODULE` would, but forked from a process that has imported them.

They have the arguments, environment, folder, descriptors, ignored signals and session that they would have, and their
exit status or the signal that killed them is known. What differs: their parent is the fork server, and `ps` shows its
command line. Where the environment differs in what an interpreter or a library reads when it is loaded, the program is
started by an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent.parent
READ_AT_LOADING = re.compile("PYTHON|LD_|LC_|LANG|GLIBC_|MALLOC_|OMP_|OPENBLAS_|MKL_|OTEL_PYTHON_|PYDANTIC_")
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)


class ForkedProcess:
    """Stand for a process that is a child of the fork server. It has what tests use of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], reply: socket.socket, server: ForkServerProcess) -> None:
        self._server = server
        self.args = arguments
        self.returncode: int | None = None
        self._reply = reply
        self._lock = threading.Lock()
        word, number = self._received()
        assert word == "pid", f"{arguments} did not start: {self._server.log}"
        self.pid = number

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                self._reply.settimeout(timeout)
                try:
                    _, status = self._received()
                except (BlockingIOError, TimeoutError):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
                self.returncode = os.waitstatus_to_exitcode(status)
                self._reply.close()
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _received(self) -> tuple[str, int]:
        message = self._reply.recv(64).decode()
        assert message, f"the fork server has ended: {self._server.log}"
        word, _, number = message.partition(" ")
        return word, int(number)


Process = ForkedProcess | subprocess.Popen[bytes]


class ForkServerProcess:
    """Hold the process that forks. It is started by the first program, and again should it end."""

    def __init__(self, *more: str) -> None:
        self._more = more
        # As it was before any test changed it.
        self._environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: IO[bytes] | None = None

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text() if self._log else ""

    def suits(self, environ: Mapping[str, str]) -> bool:
        """Tell whether an interpreter and its libraries would be loaded the same way with this environment."""
        return sys.platform == "linux" and _read_at_loading(environ) == _read_at_loading(self._environ)

    def fork(self, request: Mapping[str, object], descriptors: Sequence[int]) -> socket.socket:
        """Ask for a process. Return the socket that says how it goes on."""
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._lock:
            control = self._running()
            socket.send_fds(control, [json.dumps(request).encode()], [theirs.fileno(), *descriptors])
        return reply

    def close(self) -> None:
        if self._process is not None and self._control is not None and self._log is not None:
            self._control.close()
            self._process.wait()
            self._log.close()
            self._process = None

    def _running(self) -> socket.socket:
        if self._process is None or self._process.poll() is not None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._log = tempfile.NamedTemporaryFile(prefix="fork-server-")  # noqa: SIM115
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno()), *self._more],
                    env=self._environ,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        assert self._control is not None
        return self._control


# Most programs have no use for litellm, and would be larger with it.
fork_servers = {False: ForkServerProcess(), True: ForkServerProcess("litellm")}


def start_program(
    module: str,
    *arguments: str | Path,
    environ: Mapping[str, str],
    folder: Path = ROOT,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
    wrapper: Sequence[str] = (),
    translates: bool = False,
) -> Process:
    """Start `python -m module`. The descriptors of `pass_fds` keep their numbers.

    `wrapper`: a command that is to start the interpreter, as `prlimit` does. `translates`: it will import litellm.
    """
    words = [str(argument) for argument in arguments]
    fork_server = fork_servers[translates]
    if wrapper or not fork_server.suits(environ):
        return subprocess.Popen(
            [*wrapper, sys.executable, "-m", module, *words],
            env=environ,
            cwd=folder,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=start_new_session,
        )
    streams = [0, *(stream if isinstance(stream, int) else stream.fileno() for stream in (stdout, stderr))]
    request = {
        "module": module,
        "arguments": words,
        "environ": dict(environ),
        "folder": str(folder),
        "numbers": [0, 1, 2, *pass_fds],
        "new_session": start_new_session,
        "ignored_signals": [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
        "umask": _umask(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }
    reply = fork_server.fork(request, [*streams, *pass_fds])
    return ForkedProcess([module, *words], reply, fork_server)


def run_program(
    module: str, *arguments: str | Path, environ: Mapping[str, str], timeout_s: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, which is awaited for `timeout_s`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start_program(module, *arguments, environ=environ, folder=folder, stdout=stdout, stderr=stderr)
        try:
            status = process.wait(timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(process.args, status, _text(stdout), _text(stderr))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _read_at_loading(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if READ_AT_LOADING.match(name)}


def _umask() -> int:
    """Return it without changing it for the other threads for a moment."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
