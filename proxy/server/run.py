from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from uvicorn.importer import import_from_string
from uvicorn.lifespan.off import LifespanOff

from proxy.concurrency import raise_open_files_limit
from proxy.server.log_handler import LogFormat, formatter_class
from proxy.server.metrics import SharedValues, Values, shared_folder, worker_deaths
from proxy.server.startup import START_FAILED, Startup
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings
from proxy.storage.valkey import EmbeddedStoreFailed, EmbeddedValkey

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("uniroute.workers")

_BACKLOG = 2048

_KEEP_ALIVE_S = 75  # longer than a load balancer's 60, so that it is never we who close first

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "proxy.server.log_handler.LineFormatter"}},
    "handlers": {"stderr": {"class": "proxy.server.log_handler.NonBlockingHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uniroute": {"level": "INFO"}},
}


def logging_config(log_format: LogFormat) -> dict[str, Any]:
    """Return LOGGING with lines of this format."""
    chosen = formatter_class(log_format)
    return {**LOGGING, "formatters": {"line": {"()": f"{chosen.__module__}.{chosen.__qualname__}"}}}


# Makes the app of a server with these settings: `module:function`, an AppFactory. The process that supervises workers
# does not import it.
APP = "proxy.app:from_settings"

PROTOCOL = "proxy.server.protocol:LimitedHTTPProtocol"

# Imported before the first request, also those that a start imports late.
PRELOADED = ("faiss", "nanotoken", "proxy.preload")


class AppFactory(Protocol):
    def __call__(self, settings: Settings, *, counts: Path | None) -> FastAPI:
        """Make the app, in the process that serves it.

        Args:
            counts: the folder in which several workers count.
        """


def run_server(settings: Settings, bound: socket.socket) -> None:
    """Serve until a signal ends it, then let requests finish.

    Raises:
        SystemExit: the server did not start; the log says why.
    """
    raise_open_files_limit()
    if settings.workers > 1:
        start_context()
    make_config = partial(server_config, settings, logging=logging_config(settings.log_format))
    # It starts while this process imports the app.
    with embedded_store(settings):
        if settings.workers > 1:
            Supervisor(settings, make_config, bound).run()
            return
        import_module("proxy.preload")
        try:
            run_until_exit(Server(make_config()), bound)
        except SystemExit:
            raise SystemExit(1) from None


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes a free one. Raises SettingsError where that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"port: cannot listen on {host}:{port} ({error.strerror}); choose another with --port"
        ) from None
    bound.set_inheritable(True)
    return bound


def inherited_socket(descriptor: int) -> socket.socket:
    """Return the bound TCP socket that the parent process handed over. Raises SettingsError if it is none."""
    try:
        bound = socket.socket(fileno=descriptor)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--fd: {descriptor} is not an open socket ({error})") from None
    if bound.family not in (socket.AF_INET, socket.AF_INET6) or bound.type != socket.SOCK_STREAM:
        bound.detach()
        raise SettingsError(f"--fd: {descriptor} is not a TCP socket")
    if not bound.getsockname()[1]:
        bound.detach()
        raise SettingsError(f"--fd: {descriptor} is a socket that is not bound to a port")
    bound.set_inheritable(True)
    return bound


def address(bound: socket.socket) -> str:
    """Return the URL by which a client on this machine calls it."""
    host, port = bound.getsockname()[:2]
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the reverse of listening
    return f"http://[{named}]:{port}" if ":" in named else f"http://{named}:{port}"


def server_config(
    settings: Settings,
    counts: Path | None = None,
    *,
    logging: dict[str, Any] | None = LOGGING,
) -> uvicorn.Config:
    """Return uvicorn's configuration. The settings travel to worker processes, secrets and all, through a pipe."""
    return uvicorn.Config(
        partial(make_app, settings, counts),
        factory=True,
        loop="uvloop" if os.name == "posix" else "auto",
        http=PROTOCOL,
        ws="none",
        lifespan="on",
        workers=settings.workers,
        log_config=logging,
        log_level=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
    )


def make_app(settings: Settings, counts: Path | None) -> FastAPI:
    factory: AppFactory = import_from_string(APP)
    return factory(settings, counts=counts)


class Server(uvicorn.Server):
    """uvicorn's server, with exit status 0 after a signal, and with an orderly end also after a second Ctrl-C."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.signals: dict[int, Any] = dict.fromkeys(ending_signals(), self.handle_exit)

    @property
    def app_startup(self) -> Startup | None:
        """Return the progress of the app's start; None before the app is made."""
        found: Startup | None = self.config.loaded_app.state.startup if self.config.loaded else None
        return found

    @property
    def is_ready(self) -> bool:
        return self.app_startup is not None and self.app_startup.app_state is not None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # The handlers stay: the process ends with its server, and a second signal must not interrupt its last steps.
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.app_startup is not None:
            self.app_startup.shutting_down = True
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the store and the journals as they are
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


def run_until_exit(server: Server, bound: socket.socket) -> None:
    """Run the server of a process that ends with it."""
    try:
        server.run([bound])
    finally:
        gc.freeze()  # the interpreter would look through all that was imported once more before it ends: for seconds


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a process in order: not SIGHUP, of a closed terminal, where `nohup` ignores it."""
    signals = [signal.SIGINT, signal.SIGTERM]
    return signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*signals, signal.SIGHUP]


def exit_on_signals() -> None:
    """End this process in order when it is told to: otherwise the embedded store would be left running."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    for number in ending_signals():
        if number != signal.SIGINT:  # which Python turns into KeyboardInterrupt
            signal.signal(number, leave)


TICK_S = 0.25

POLL_INTERVAL_S = 0.05

# A worker that dies younger than this is started again after a pause, which doubles each time.
EARLY_DEATH_S = 10.0

MAX_PAUSE_S = 30.0

# Where workers are not forked, the first sign of life comes after the imports.
MIN_FIRST_REPLY_TIMEOUT_S = 120.0

# Beyond the time that open answers have.
KILL_GRACE_PERIOD_S = 10.0

multiprocessing.allow_connection_pickling()

# Blocked until a worker has handlers for them. Ctrl-C would interrupt imports; and a process that workers are forked
# from, and that a signal to the whole group ended, could not tell how they ended.
HELD_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block HELD_SIGNALS in the processes that are started in this context, and here until it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def start_context() -> ForkServerContext | SpawnContext:
    """Return how workers are started: forked from a process that begins to import now, and ends after the last of them.

    Forked workers start sooner, and share the memory of what was imported. On macOS, system libraries that were loaded
    before a fork may not be used after it; with Python 3.11.0 every local user could have a process forked.
    """
    resource_tracker.ensure_running()  # its start would unblock signals
    if sys.platform == "linux" and sys.version_info >= (3, 11, 1):
        multiprocessing.set_forkserver_preload(list(PRELOADED))
        try:
            with signals_held():
                forkserver.ensure_running()
        except OSError as error:  # no folder for temporary files, or its name is too long for that of a socket
            log.warning("workers are not forked, which takes time and memory: %s", error)
        else:
            return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


class WorkerServer(Server):
    """End when the supervisor says so. Ctrl-C, which a terminal sends to every process, then makes it hurry."""

    def __init__(self, config: uvicorn.Config, *, listens_at_once: bool) -> None:
        super().__init__(config)
        self.signals[signal.SIGINT] = self._hurry
        self.signals[signal.SIGHUP] = signal.SIG_IGN  # the supervisor decides what it means
        self.may_listen = self._listens_at_once = listens_at_once

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen at once, or only when ready: while other workers serve, they had better take new connections."""
        if self._listens_at_once:
            await super().startup(sockets)
            return
        lifespan = self.lifespan
        await lifespan.startup()
        # A thread sets `may_listen` when the supervisor says so.
        while not (lifespan.should_exit or self.should_exit or (self.is_ready and self.may_listen)):  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL_S)
        if lifespan.should_exit or self.should_exit:
            self.should_exit = True
            await lifespan.shutdown()
            return
        self.lifespan = LifespanOff(self.config)  # uvicorn would start it again
        try:
            await super().startup(sockets)
        finally:
            self.lifespan = lifespan

    def _hurry(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self.force_exit = self.should_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
            yield


class Worker:
    """A process, and the pipe over which the supervisor asks it for signs of life."""

    def __init__(self, config: uvicorn.Config, bound: socket.socket, *, listens_at_once: bool = False) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self.listens_at_once = listens_at_once
        self.process = start_context().Process(target=_work, args=(config, bound, theirs, listens_at_once))
        self.began = time.monotonic()
        self.is_ready = self.was_heard = False
        self.unanswered_s = 0.0
        """Counted in the supervisor's own ticks: a machine that slept counts against no worker."""
        self._asked = False
        with signals_held():
            self.process.start()
        theirs.close()

    def ask(self, *, may_listen: bool) -> None:
        """Ask for a sign of life, unless one is still awaited. To be called once a tick."""
        with contextlib.suppress(OSError, EOFError):  # the process has just ended
            if self._asked and self._pipe.poll():
                self.is_ready, self.was_heard = self._pipe.recv(), True
                self._asked, self.unanswered_s = False, 0.0
            if self._asked:
                self.unanswered_s += TICK_S
            else:
                self._pipe.send(may_listen)
                self._asked = True

    def send_signal(self, number: signal.Signals) -> None:
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self.began


@dataclass
class Slot:
    """The place of one worker: who has it, who takes it over, and when it is filled again."""

    worker: Worker | None = None
    successor: Worker | None = None
    is_stale: bool = False
    """Its worker is to be replaced by a new one."""
    early_deaths: int = 0
    due: float = 0.0
    """Monotonic seconds."""


class Supervisor:
    """Keep worker processes running until a signal ends them. SIGHUP replaces them one after the other."""

    def __init__(self, settings: Settings, make_config: Callable[[Path | None], uvicorn.Config], bound: socket.socket):
        self._settings = settings
        self._make_config = make_config
        self._bound = bound
        self._slots = [Slot() for _ in range(settings.workers)]
        self._ending = threading.Event()
        self._hurried = self._failed = self._ever_ready = False
        self._has_terminal = signal.SIGHUP in ending_signals() and os.isatty(0)
        self._memory_kills = memory_kills()

    def run(self) -> None:
        """Serve until the end. Raises SystemExit where no worker could start; the log says why."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._hang_up)
        with embedded_store(self._settings), shared_folder() as folder:
            self._deaths = worker_deaths(SharedValues(folder) if folder else Values())
            self._config = self._make_config(folder)
            while not self._ending.is_set():
                for slot in self._slots:
                    self._look_after(slot)
                self._ending.wait(TICK_S)
            self._end_all()
        if self._failed:
            raise SystemExit(1)

    def _end(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self._hurried = self._ending.is_set()
        self._ending.set()

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        """Replace all workers, or end if the signal says that our terminal was closed."""
        if self._has_terminal and not os.isatty(0):
            self._end(sig, frame)
            return
        for slot in self._slots:
            slot.is_stale = True

    def _look_after(self, slot: Slot) -> None:
        if slot.worker is None:
            if time.monotonic() >= slot.due:
                first = slot is self._slots[0] and not self._ever_ready
                slot.worker = Worker(self._config, self._bound, listens_at_once=first)
                slot.is_stale = False
            return
        if (cause := self._cause_of_death(slot.worker)) is not None:
            self._died(slot, *cause)
            return
        self._ever_ready |= slot.worker.is_ready
        self._replace(slot, slot.worker)

    def _replace(self, slot: Slot, worker: Worker) -> None:
        """Replace the worker of one slot at a time, and only once the new one is ready."""
        if slot.successor is None:
            if slot.is_stale and not any(other.successor for other in self._slots):
                slot.is_stale = False
                slot.successor = Worker(self._config, self._bound)
        elif (cause := self._cause_of_death(slot.successor)) is not None:
            log.warning("worker %s keeps its place: its successor died, %s", worker.process.pid, cause[1])
            slot.successor = None
        elif slot.successor.is_ready:
            worker.send_signal(signal.SIGTERM)
            worker.process.join(self._settings.drain_s + KILL_GRACE_PERIOD_S)
            worker.kill()
            slot.worker, slot.successor = slot.successor, None

    @property
    def _may_listen(self) -> bool:
        """Whether ready workers may take connections. Until the first one is ready, it alone answers /readyz."""
        first = self._slots[0].worker
        return first is None or first.is_ready or not first.listens_at_once

    def _cause_of_death(self, worker: Worker) -> tuple[str, str] | None:
        """Return the cause for the counter and for the log, None while it lives. Kill a worker that does not answer."""
        code = worker.process.exitcode
        if code is None:
            worker.ask(may_listen=self._may_listen)
            timeout_s = self._settings.worker_health_timeout_s
            if not worker.was_heard:
                timeout_s = max(timeout_s, MIN_FIRST_REPLY_TIMEOUT_S)
            if worker.unanswered_s < timeout_s:
                return None
            worker.kill()
            return "unresponsive", f"killed, for it gave no sign of life for {timeout_s:g} s"
        if code >= 0:
            return f"status {code}", f"ended with status {code}"
        name = signal.Signals(-code).name
        return name, f"killed by {name}{self._why_killed() if name == 'SIGKILL' else ''}"

    def _why_killed(self) -> str:
        before, self._memory_kills = self._memory_kills, memory_kills()
        if before is not None and self._memory_kills is not None and self._memory_kills > before:
            return ": memory ran out, says the kernel"
        return ", by hand or for want of memory"

    def _died(self, slot: Slot, cause: str, words: str) -> None:
        worker, slot.worker = slot.worker, None
        assert worker is not None
        self._deaths.add((cause,))
        if worker.process.exitcode == START_FAILED and not self._ever_ready:
            self._failed = True  # it would fail the same way again
            self._ending.set()
            return
        slot.early_deaths = slot.early_deaths + 1 if worker.lived_s < EARLY_DEATH_S else 0
        pause_s = min(MAX_PAUSE_S, 2.0 ** (slot.early_deaths - 1)) if slot.early_deaths else 0.0
        slot.due = time.monotonic() + pause_s
        log.warning(
            "worker %s died after %.0f s: %s; another is started %s",
            worker.process.pid,
            worker.lived_s,
            words,
            f"in {pause_s:g} s" if pause_s else "now",
        )

    def _end_all(self) -> None:
        workers = [worker for slot in self._slots for worker in (slot.worker, slot.successor) if worker]
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.drain_s + KILL_GRACE_PERIOD_S
        while any(worker.process.exitcode is None for worker in workers) and time.monotonic() < deadline:
            if self._hurried:
                self._hurried = False
                for worker in workers:
                    worker.send_signal(signal.SIGINT)
            time.sleep(0.05)
        for worker in workers:
            worker.kill()


@contextlib.contextmanager
def embedded_store(settings: Settings) -> Iterator[None]:
    """Hold the embedded store open, if it is used, so that it outlives workers that die. They start it themselves."""
    if settings.redis_url:
        yield
        return
    valkey = EmbeddedValkey(settings.data_dir)
    joining = threading.Thread(target=_join, args=(valkey,), name="uniroute-store")
    joining.start()
    try:
        yield
    finally:
        valkey.closing = True
        joining.join()
        valkey.stop()


def _join(valkey: EmbeddedValkey) -> None:
    with contextlib.suppress(EmbeddedStoreFailed):  # those who serve meet the same failure, and log it
        valkey.ensure()


def _work(config: uvicorn.Config, bound: socket.socket, pipe: Connection, listens_at_once: bool) -> None:  # noqa: FBT001
    """Serve, in a worker process."""
    gc.freeze()  # a collection writes to what it looks through, and so unshares the memory of what was imported
    config.configure_logging()
    server = WorkerServer(config, listens_at_once=listens_at_once)
    threading.Thread(target=_answer, args=(pipe, server), name="uniroute-supervised", daemon=True).start()
    try:
        run_until_exit(server, bound)
    except SystemExit:
        sys.exit(START_FAILED)
    finally:
        logging.shutdown()  # a forked process ends without it


def _answer(pipe: Connection, server: WorkerServer) -> None:
    """Answer the supervisor. End the worker when the supervisor is gone, which closes its end of the pipe."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            server.may_listen = pipe.recv()
            pipe.send(server.is_ready)
    os.kill(os.getpid(), signal.SIGTERM)


def memory_kills() -> int | None:
    """Return how many processes the kernel has killed because memory ran out; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
