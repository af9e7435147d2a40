"""A process from the fork server is like one of a fresh interpreter."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import fork_server
from tests.support.command import environment
from tests.support.fork_server import ForkedProcess, ForkServer, ForkServerError, PythonProcess, start_module
from tests.support.processes import is_running
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the fork server needs pidfd")

WAIT_S = 60

STATE = """
import faiss, json, numpy, os, resource, signal, sys, threading, threadpoolctl
from pathlib import Path
from __main__ import __spec__ as spec

limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
streams = [sys.stdin, sys.stdout, sys.stderr, sys.__stdout__]
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "flags": list(sys.flags), "path": sys.path,
    "main": [__name__, spec.name, sys.modules["__main__"].__spec__.name, __file__, __package__],
    "environ": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0),
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
    "streams": [[s.name, s.mode, s.encoding, s.errors, s.newlines, s.line_buffering, s.isatty()] for s in streams],
    "descriptors": [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")],
    "leader": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "handlers": {int(number): repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": [threading.active_count(), threading.current_thread() is threading.main_thread()],
    "pools": sorted([pool["user_api"], pool["num_threads"]] for pool in threadpoolctl.threadpool_info()),
    "lazy": [name for name in ("litellm", "torch", "sentence_transformers") if name in sys.modules],
}))
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path / "data", UNIROUTE_LAMBDA="0.3", MODEL_API_KEY="sk-x")


@pytest.fixture
def own_server() -> Iterator[ForkServer]:
    """Start a fork server that a test may kill."""
    server = ForkServer({**os.environ, "PYTHONPATH": str(fork_server.ROOT)})
    yield server
    server.close()


def start(folder: Path, program: str, *arguments: str, **options: Any) -> PythonProcess:
    """Start a program as a module of the working directory."""
    (folder / "program.py").write_text(program)
    return start_module("program", *arguments, cwd=folder, **options)


def forked(folder: Path, program: str, **options: Any) -> ForkedProcess:
    process = start(folder, program, **options)
    assert isinstance(process, ForkedProcess)
    return process


def outcome(
    folder: Path, program: str, *arguments: str, fresh: bool, **options: Any
) -> tuple[int, bytes, list[bytes], bool]:
    """Return the exit status, stdout, the lines of stderr that are not of a traceback, and whether there is one."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with start(folder, program, *arguments, fresh=fresh, **pipes) as process:
        output, errors = process.communicate(WAIT_S)
    lines = [line for line in errors.splitlines() if not line.startswith(b" ")]
    assert isinstance(process, ForkedProcess) is not fresh
    return process.returncode, output, lines, b"Traceback" in errors


def test_the_state_of_a_process_is_that_of_a_fresh_one(tmp_path: Path, environ: dict[str, str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), os.umask(0o027), resource.getrlimit(resource.RLIMIT_CORE)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[2][1]))
    try:
        with (tmp_path / "passed").open("wb") as passed:
            number = passed.fileno()
            options: dict[str, Any] = {"environ": environ, "pass_fds": [number], "start_new_session": True}
            options["stdin"] = subprocess.DEVNULL
            found = [outcome(tmp_path, STATE, "a b", "ü", fresh=fresh, **options) for fresh in (True, False)]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        os.umask(before[1])
        resource.setrlimit(resource.RLIMIT_CORE, before[2])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    fresh, state = (json.loads(output) for _, output, _, _ in found)
    assert state == fresh
    assert (state["environ"], state["leader"], state["umask"]) == (environ, [True, True], 0o027)
    assert (state["descriptors"], state["blocked"]) == (["0", "1", "2", str(number)], [signal.SIGUSR2])


@pytest.mark.parametrize(
    "program",
    [
        "print('unfinished line', end='')",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('what went wrong')",
        "import sys; sys.exit(-1)",
        "raise ValueError('what went wrong')",
        "raise KeyboardInterrupt",
        "import os; print('lost', end=''); os._exit(4)",
        "import os; os.abort()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit; atexit.register(print, 'at the end'); raise SystemExit(5)",
        "import threading; threading.Thread(target=lambda: print('in a thread')).start()",
        "import sys; sys.stdout = open('/dev/full', 'w'); print('lost')",
        "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost')",
        "import nothing_of_this_name",
        "x = (",
    ],
)
def test_a_process_ends_as_a_fresh_one_does(tmp_path: Path, environ: dict[str, str], program: str) -> None:
    fresh, found = (outcome(tmp_path, program, fresh=fresh, environ=environ) for fresh in (True, False))
    assert found == fresh
    assert fresh != (0, b"", [], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_ends_a_process(tmp_path: Path, environ: dict[str, str], number: signal.Signals) -> None:
    process = forked(tmp_path, "import time; time.sleep(600)", environ=environ, stderr=subprocess.DEVNULL)
    try:
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(WAIT_S) == -number
        process.send_signal(number)  # nobody gets it
        assert process.returncode == -number
    finally:
        process.kill()


def test_pipes_and_passed_descriptors_lead_to_the_process(tmp_path: Path, environ: dict[str, str]) -> None:
    ours, theirs = socket.socketpair()
    program = f"import os; print(input()); os.write({theirs.fileno()}, b'through the descriptor')"
    with ours, theirs:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = forked(tmp_path, program, environ=environ, pass_fds=[theirs.fileno()], **pipes)
        theirs.close()
        assert process.stdin is not None
        process.stdin.write(b"through the pipe\n")
        process.stdin.close()
        assert process.communicate(WAIT_S) == (b"through the pipe\n", None)
        assert (ours.recv(100), ours.recv(100)) == (b"through the descriptor", b"")


def test_waits_for_a_process_end_in_time(tmp_path: Path, environ: dict[str, str]) -> None:
    process = forked(tmp_path, "import time; time.sleep(600)", environ=environ, stdout=subprocess.PIPE)
    for waiting in (process.wait, process.communicate):
        with pytest.raises(subprocess.TimeoutExpired):
            waiting(0.05)
    process.kill()
    assert process.communicate(WAIT_S) == (b"", None)
    assert process.wait() == process.poll() == -signal.SIGKILL


def test_a_process_keeps_its_id_until_its_end_is_known(tmp_path: Path, environ: dict[str, str]) -> None:
    process = forked(tmp_path, "", environ=environ)
    assert wait_until(lambda: not is_running(process.pid))
    assert Path(f"/proc/{process.pid}").exists()
    assert process.wait(WAIT_S) == 0
    assert wait_until(lambda: not Path(f"/proc/{process.pid}").exists())


def test_processes_draw_other_random_numbers_than_each_other(tmp_path: Path, environ: dict[str, str]) -> None:
    program = "import random, uuid, numpy; print(random.random(), numpy.random.random(), uuid.uuid4(), sep='\\n')"
    first, second = (outcome(tmp_path, program, fresh=False, environ=environ)[1].splitlines() for _ in range(2))
    assert len({*first, *second}) == 6


def test_a_process_may_start_processes_by_multiprocessing(tmp_path: Path, environ: dict[str, str]) -> None:
    program = """
        import multiprocessing, numpy

        def work(number):
            return number * number, multiprocessing.parent_process() is not None

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [2, 3]))
    """
    status, output, errors, _ = outcome(tmp_path, _dedent(program), fresh=False, environ=environ)
    assert (status, output) == (0, b"[(4, True), (9, True)]\n"), errors


def _dedent(program: str) -> str:
    return "\n".join(line[8:] for line in program.splitlines())


def test_what_an_interpreter_reads_when_it_starts_needs_a_fresh_one(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["PYTHONHASHSEED"] = "1"
    with start(tmp_path, "import sys; sys.exit(hash('a') % 100)", environ=environ) as process:
        assert isinstance(process, subprocess.Popen)
    expected = subprocess.run([sys.executable, "-c", "import sys; sys.exit(hash('a') % 100)"], env=environ, check=False)
    assert process.returncode == expected.returncode


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ForkServerError, match="FileNotFoundError"):
        start_module("program", environ=environ, cwd=tmp_path / "nowhere")
    assert outcome(tmp_path, "print('next')", fresh=False, environ=environ)[:2] == (0, b"next\n")


def test_the_fork_server_forks_no_process_while_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "count_threads", lambda: 2)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it forked"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, client, channel:
        socket.send_fds(ours, [b"\0"], [channel.fileno(), 0, 1, 2])
        channel.close()
        ours.close()
        assert fork_server.Server(theirs).run() is None
        assert client.recv(100) == b"the fork server has 2 other threads"


def test_without_a_fork_server_every_process_starts_by_itself(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {**environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "faiss.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    with closing(ForkServer(broken)) as server:
        monkeypatch.setattr(fork_server, "shared", server)
        with start(tmp_path, "print('by itself')", environ=broken, stdout=subprocess.PIPE) as process:
            assert process.communicate(WAIT_S) == (b"by itself\n", None)
    assert isinstance(process, subprocess.Popen)
    assert "an import started 1 threads" in capfd.readouterr().err


def test_the_end_of_the_fork_server_is_an_error_and_no_endless_wait(
    tmp_path: Path, own_server: ForkServer, environ: dict[str, str]
) -> None:
    process = own_server.start("http.server", "0", environ=environ, cwd=tmp_path, stderr=subprocess.DEVNULL)
    os.kill(own_server.pid, signal.SIGKILL)
    try:
        for work in (process.wait, process.poll, lambda: own_server.start("program", environ=environ)):
            with pytest.raises(ForkServerError):
                work()
    finally:
        os.kill(process.pid, signal.SIGKILL)


def test_the_fork_server_ends_with_the_process_that_started_it(environ: dict[str, str]) -> None:
    program = (
        "import os, time; from tests.support.fork_server import ForkServer; server = ForkServer(os.environ);"
        "assert server.suits(os.environ); print(server.pid, flush=True); time.sleep(600)"
    )
    client = subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE)
    with client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert is_running(pid)
        client.kill()
    assert wait_until(lambda: not is_running(pid))
