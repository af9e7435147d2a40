"""Start Python modules from a process that has already imported what they import.

A run of the tests starts hundreds of servers and commands, and the imports cost most of their time. The fork server
imports once; each start is then a fork. Linux alone, as it needs pidfd.

    client  -> server   control socket: one message a start, with descriptors: the channel of the new process, its
                        stdin, stdout and stderr, and those that it is passed
    client  -> process  channel: the Request
    process -> client   channel: STARTED, or why the process could not start
    server  -> client   channel: ENDED and the exit status. The server reaps the process once the client has closed the
                        channel, so that no other process gets its id before the client knows that it has ended.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import io
import json
import os
import random
import re
import resource
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, Self

ROOT = Path(__file__).parent.parent.parent
START_S = 120.0
MAX_REQUEST_BYTES = 2**20
MAX_DESCRIPTORS = 64
STARTED = b"started"
ENDED = b"ended "

# What servers and commands import. litellm, torch and sentence_transformers are not among it: tests check that a server
# loads them only when it needs them.
PACKAGES = ("proxy", "router_core")
LIBRARIES = (
    "faiss",
    "httptools",
    "orjson",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.main",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
)
# Functions whose results many of them read, which a cache keeps and nothing changes.
DATA = (
    "proxy.storage.price_map.bundled_price_map",
    "router_core.artifact.builtin_map",
    "router_core.validation.families.registry.builtin_validation_set",
)
LAZY = ("litellm", "torch", "sentence_transformers")

# Variables that nothing reads before a command runs. The interpreter and the libraries read others when they start.
READ_LATE = re.compile(r"UNIROUTE_\w+|PYTEST_\w+|\w+_API_KEY|COLUMNS|LITELLM_\w+|TIKTOKEN_\w+")


class ForkServerError(Exception):
    pass


class PythonProcess(Protocol):
    """The part of `subprocess.Popen[bytes]` that a forked process has too."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    stderr: IO[bytes] | None

    @property
    def returncode(self) -> Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: Any) -> None: ...

    @property
    def communicate(self) -> Any: ...


def start_module(
    module: str,
    *arguments: str | Path,
    environ: Mapping[str, str],
    cwd: Path = ROOT,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
    fresh: bool = False,
) -> PythonProcess:
    """Run `python -m module`, from the fork server of this run where that makes no difference to the process.

    Args:
        fresh: start an interpreter, for tests of how it starts, of its command line and of its limits.
    """
    words = [str(argument) for argument in arguments]
    if not fresh and shared is not None and shared.suits(environ):
        return shared.start(
            module,
            *words,
            environ=environ,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=start_new_session,
        )
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=dict(environ),
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=start_new_session,
    )


@dataclass(frozen=True)
class Request:
    """What the new process shall be.

    Args:
        passed: the numbers that the passed descriptors have in the new process.
        blocked, ignored: signals, as the process that asks has them.
    """

    module: str
    arguments: list[str]
    environ: dict[str, str]
    cwd: str
    passed: list[int]
    umask: int
    limits: dict[int, tuple[int, int]]
    blocked: list[int]
    ignored: list[int]
    new_session: bool


class ForkedProcess:
    """A process that the fork server started, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, args: list[str], channel: socket.socket, pid: int, pipes: Sequence[IO[bytes] | None]) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = pipes
        self._channel = channel
        self._reading = threading.Lock()

    def poll(self) -> int | None:
        with self._reading:
            if self.returncode is None:
                try:
                    message = self._channel.recv(MAX_REQUEST_BYTES)
                except BlockingIOError:
                    return None
                except OSError:  # closed by an earlier call, or reset
                    message = b""
                self._channel.close()
                if not message.startswith(ENDED):
                    raise ForkServerError(f"the fork server ended before process {self.pid} did")
                self.returncode = int(message.removeprefix(ENDED))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            waiting = select.poll()
            with suppress(ValueError):  # another thread has just read the end
                waiting.register(self._channel, select.POLLIN)
                waiting.poll(None if left is None else left * 1000 + 1)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[bytes | None, bytes | None]:
        """Return what the pipes of stdout and stderr had, once they are closed and the process has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        read: dict[IO[bytes], list[bytes]] = {pipe: [] for pipe in (self.stdout, self.stderr) if pipe is not None}
        with selectors.DefaultSelector() as selector:
            for pipe in read:
                selector.register(pipe, selectors.EVENT_READ, pipe)
            while selector.get_map():
                ready = selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
                if deadline is not None and time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in ready:
                    if chunk := os.read(key.fd, 65536):
                        read[key.data].append(chunk)
                    else:
                        selector.unregister(key.fileobj)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._close_pipes()
        output, errors = (None if pipe is None else b"".join(read[pipe]) for pipe in (self.stdout, self.stderr))
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_pipes()
        self.wait()

    def _close_pipes(self) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()


class ForkServer:
    """The client's side of a fork server, which starts with the first process and ends with this one.

    Args:
        environ: the environment of the fork server. The new processes get their own.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)
        self._starting = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._failed = False

    def suits(self, environ: Mapping[str, str]) -> bool:
        """Tell whether this can start a process with these variables that is like one of a fresh interpreter."""
        names = {name for name in environ.keys() | self.environ.keys() if not READ_LATE.fullmatch(name)}
        if any(environ.get(name) != self.environ.get(name) for name in names):
            return False
        with self._starting:
            return self._opened() is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(
        self,
        module: str,
        *arguments: str,
        environ: Mapping[str, str],
        cwd: Path = ROOT,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ) -> ForkedProcess:
        """Start `python -m module` as `subprocess.Popen` does. Raises ForkServerError where that fails."""
        request = Request(
            module,
            list(arguments),
            dict(environ),
            str(cwd),
            list(pass_fds),
            _umask(),
            {number: resource.getrlimit(number) for number in _limits()},
            [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
            [int(number) for number in _signals() if signal.getsignal(number) is signal.SIG_IGN],
            start_new_session,
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = [_Stream(given, number) for number, given in enumerate((stdin, stdout, stderr))]
        try:
            with theirs:
                descriptors = [theirs.fileno(), *(stream.number for stream in streams), *pass_fds]
                ours.settimeout(START_S)
                with self._starting:
                    if (control := self._opened()) is None:
                        raise ForkServerError("there is no fork server")
                    socket.send_fds(control, [b"\0"], descriptors)
            ours.send(json.dumps(asdict(request)).encode())
            reply = ours.recv(MAX_REQUEST_BYTES)
            ours.setblocking(False)
        except (OSError, ForkServerError) as error:
            reply = str(error).encode() or repr(error).encode()
        finally:
            for stream in streams:
                stream.close_theirs()
        if not reply.startswith(STARTED):
            ours.close()
            for stream in streams:
                stream.close_ours()
            raise ForkServerError(f"python -m {module} was not started: {reply.decode() or 'the fork server ended'}")
        command = [sys.executable, "-m", module, *arguments]
        return ForkedProcess(command, ours, int(reply.removeprefix(STARTED)), [stream.pipe for stream in streams])

    def close(self) -> None:
        """End the fork server. Processes that it started go on."""
        with self._starting:
            self._close()

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _opened(self) -> socket.socket | None:
        """Return the control socket, or None if the imports cannot be shared on this machine, which stderr says."""
        if self._control is None and not self._failed:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", __name__, str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], env=self.environ, cwd=ROOT, stdin=subprocess.DEVNULL
                )
            self._control.settimeout(START_S)
            try:
                reply = self._control.recv(MAX_REQUEST_BYTES)
            except TimeoutError:
                reply = b"its imports take too long"
            if reply != STARTED:
                sys.stderr.write(f"no fork server, every process starts by itself: {reply.decode()}\n")
                self._failed = True
                self._close()
        return self._control


# The fork server of this run of the tests. Outside a run every process is a fresh interpreter.
shared: ForkServer | None = None


def share() -> None:
    """Let this process start modules from a fork server, which starts with the first of them."""
    global shared
    if hasattr(os, "pidfd_open"):
        shared = ForkServer({**os.environ, "PYTHONPATH": str(ROOT)})


def close() -> None:
    """End the fork server that this process shares."""
    global shared
    if shared is not None:
        shared.close()
        shared = None


class _Stream:
    """One of stdin, stdout and stderr: the descriptor of the new process, and the end of a pipe that stays here."""

    def __init__(self, given: int | IO[Any] | None, standard: int) -> None:
        self.pipe: IO[bytes] | None = None
        self._owned = given in (subprocess.PIPE, subprocess.DEVNULL)
        if given == subprocess.PIPE:
            reading, writing = os.pipe()
            self.number, kept = (reading, writing) if standard == 0 else (writing, reading)
            self.pipe = open(kept, "wb" if standard == 0 else "rb")  # noqa: PTH123, SIM115  a descriptor; the caller closes it
        elif given == subprocess.DEVNULL:
            self.number = os.open(os.devnull, os.O_RDWR)
        elif given is None:
            self.number = standard
        else:
            self.number = given if isinstance(given, int) else given.fileno()

    def close_theirs(self) -> None:
        if self._owned:
            os.close(self.number)

    def close_ours(self) -> None:
        if self.pipe is not None:
            self.pipe.close()


def _umask() -> int:
    """Return the umask without changing it, as `os.umask` would for all threads."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")]
    return int(line.split()[1], 8)


def _limits() -> list[int]:
    return sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


def _signals() -> list[int]:
    return sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class Server:
    """Fork a process for each message on the control socket, and report the ends of those processes."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.poll()
        self._children: list[_Child] = []

    def run(self) -> tuple[socket.socket, list[int]] | None:
        """Return None once the client is gone; in a new process its channel and its descriptors."""
        self._poll.register(self._control, select.POLLIN)
        while True:
            ready = {number for number, _ in self._poll.poll()}
            for child in self._children:
                child.hear(ready, self._poll)
            self._children = [child for child in self._children if not child.reaped]
            if self._control.fileno() in ready:
                message, descriptors, _, _ = socket.recv_fds(self._control, 1, MAX_DESCRIPTORS)
                if not message:
                    return None
                channel = socket.socket(fileno=descriptors[0])
                if self._fork(channel, descriptors[1:]):
                    return channel, descriptors[1:]

    def _fork(self, channel: socket.socket, descriptors: list[int]) -> bool:
        """Tell whether this is the new process."""
        if threads := count_threads():
            _send(channel, f"the fork server has {threads} other threads".encode())
            channel.close()
        elif pid := os.fork():
            self._children.append(_Child(pid, channel, self._poll))
        else:
            # An object that is left would close another file of the same number later.
            self._control.close()
            for child in self._children:
                child.close()
            return True
        for number in descriptors:
            os.close(number)
        return False


class _Child:
    def __init__(self, pid: int, channel: socket.socket, poll: select.poll) -> None:
        self.reaped = False
        self._pid = pid
        self._channel: socket.socket | None = channel
        self._end: int | None = os.pidfd_open(pid)
        poll.register(self._end, select.POLLIN)
        # Nothing but the end of the other side: what can be read is for the new process.
        poll.register(channel, 0)

    def hear(self, ready: set[int], poll: select.poll) -> None:
        """Report the end of the process. Reap it once the client has closed the channel."""
        if self._channel is not None and self._channel.fileno() in ready:
            poll.unregister(self._channel)
            self._channel.close()
            self._channel = None
        if self._end in ready:
            poll.unregister(self._end)
            os.close(self._end)
            self._end = None
            ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            if self._channel is not None:
                _send(self._channel, ENDED + str(status).encode())
        if self._end is None and self._channel is None:
            os.waitpid(self._pid, 0)
            self.reaped = True

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._end is not None:
            os.close(self._end)


def _send(channel: socket.socket, message: bytes) -> None:
    try:
        channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:  # the client is gone, which the closed channel tells
        return


def count_threads() -> int:
    """Count the threads beside this one, those of C libraries too."""
    return max(len(os.listdir("/proc/self/task")), threading.active_count()) - 1  # noqa: PTH208  quicker than objects


def preload() -> None:
    """Import and read what servers and commands do.

    Raises:
        ForkServerError: an import started a thread, or loaded what is loaded late.
    """
    # jsonschema imports it if it can, which takes two seconds. It is not used, and not among what serving installs.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if file.stem != "__main__":
                importlib.import_module(name)
    for name in LIBRARIES:
        importlib.import_module(name)
    del sys.modules["rfc3987_syntax"]
    for function in DATA:
        module, _, name = function.rpartition(".")
        getattr(importlib.import_module(module), name)()
    if loaded := [name for name in LAZY if name in sys.modules]:
        raise ForkServerError(f"imported what is loaded late: {loaded}")
    # OpenBLAS ends its threads before a fork, and starts them again in each process that needs them.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if threads := count_threads():
        raise ForkServerError(f"an import started {threads} threads")
    # Without it each process would look through all of this once more when it ends, for 0.3 s.
    gc.collect()
    gc.freeze()


def become(channel: socket.socket, descriptors: list[int]) -> str:
    """Make this new process what its request asks for, and return the name of the module to run."""
    try:
        channel.settimeout(START_S)
        request = json.loads(channel.recv(MAX_REQUEST_BYTES))
        channel = _place_descriptors(channel, descriptors, [0, 1, 2, *request["passed"]])
        if request["new_session"]:
            os.setsid()
        os.umask(request["umask"])
        for number, limits in request["limits"].items():
            if resource.getrlimit(int(number)) != tuple(limits):
                resource.setrlimit(int(number), limits)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environ"])
        _renew_interpreter(request["module"], request["arguments"], request["cwd"])
        _renew_handlers({*request["ignored"]})
        channel.send(STARTED + str(os.getpid()).encode())
    except BaseException as error:  # noqa: BLE001  whatever it is, the client is told
        _give_up(channel, error)
    channel.close()
    # Last, as a SIGINT that waits becomes a KeyboardInterrupt here.
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    return str(request["module"])


def _give_up(channel: socket.socket, error: BaseException) -> NoReturn:
    _send(channel, repr(error).encode())
    os._exit(1)


def _place_descriptors(channel: socket.socket, descriptors: list[int], numbers: list[int]) -> socket.socket:
    """Give each descriptor its number, and return the channel with a number that is not among them."""
    above = max(numbers) + 1
    moved = socket.socket(fileno=fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, above))
    channel.close()
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    return moved


def _renew_interpreter(module: str, arguments: list[str], cwd: str) -> None:
    """Put the interpreter where `python -m module` would start."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = _standard_stream(number, name, mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["-m", *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    sys.path[0] = cwd
    random.seed()
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


def _standard_stream(number: int, name: str, mode: str) -> io.TextIOWrapper:
    """Open it as the interpreter does."""
    old = getattr(sys, name)
    buffered = mode == "r" or not old.write_through
    opened: Any = open(number, f"{mode}b", -1 if buffered else 0, closefd=False)  # noqa: SIM115  closed with the process
    raw = opened.raw if buffered else opened
    raw.name = f"<{name}>"
    by_line = buffered and (name == "stderr" or raw.isatty())
    stream: Any = io.TextIOWrapper(opened, old.encoding, old.errors, "\n", by_line, write_through=not buffered)
    stream.mode = mode
    return stream  # type: ignore[no-any-return]


def _renew_handlers(ignored: set[int]) -> None:
    """Set what an interpreter has after its start: it ignores SIGPIPE and SIGXFSZ, and handles SIGINT."""
    ignored |= {signal.SIGPIPE, signal.SIGXFSZ}
    for number in _signals():
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    # A terminal sends it to the whole run. It waits for the new processes, which do not block it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    try:
        preload()
    except Exception as error:  # noqa: BLE001  the client is told
        control.send(repr(error).encode())
        return
    control.send(STARTED)
    started = Server(control).run()
    if started is not None:
        runpy.run_module(become(*started), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
