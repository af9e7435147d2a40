from __future__ import annotations

import asyncio
import contextlib
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
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.lifespan.off import LifespanOff

from proxy.app import START_FAILED
from proxy.cli.serve import kept_store
from proxy.server.metrics import SharedValues, Values, shared_folder, worker_deaths
from proxy.server.run import Server, run_to_the_end
from proxy.settings.schema import Settings

log = logging.getLogger("uniroute.workers")

TICK_S = 0.25

POLL_INTERVAL_S = 0.05

QUICK_S = 10.0
"""A worker that dies younger than this is started again after a pause, which doubles each time."""

MAX_PAUSE_S = 30.0

FIRST_SIGN_S = 120.0
"""For a worker that is still importing what it needs."""

KILL_AFTER_S = 10.0
"""Beyond the time that open answers have."""

_spawn = multiprocessing.get_context("spawn")
multiprocessing.allow_connection_pickling()


class WorkerServer(Server):
    """Ends when its supervisor says so. Ctrl-C, which a terminal sends to all, only makes it hurry with that."""

    def __init__(self, config: uvicorn.Config, *, listens_at_once: bool) -> None:
        super().__init__(config)
        self.signals[signal.SIGINT] = self._hurry
        self.may_listen = self._listens_at_once = listens_at_once

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen at once, or only when ready: a connection that comes while others serve is better taken by them."""
        if self._listens_at_once:
            await super().startup(sockets)
            return
        lifespan = self.lifespan
        await lifespan.startup()
        # the supervisor's word comes by a thread
        while not (lifespan.should_exit or self.should_exit or (self.is_ready and self.may_listen)):  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL_S)
        if lifespan.should_exit or self.should_exit:
            self.should_exit = True
            await lifespan.shutdown()
            return
        self.lifespan = LifespanOff(self.config)  # it has started
        try:
            await super().startup(sockets)
        finally:
            self.lifespan = lifespan

    def _hurry(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self.force_exit = self.should_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as it was started by Worker
            yield


class Worker:
    """A process, and the pipe over which it is asked for a sign of life."""

    def __init__(self, config: uvicorn.Config, bound: socket.socket, *, listens_at_once: bool = False) -> None:
        self._pipe, theirs = _spawn.Pipe()
        self.listens_at_once = listens_at_once
        self.process = _spawn.Process(target=_work, args=(config, bound, theirs, listens_at_once))
        self.began = time.monotonic()
        self.is_ready = self.was_heard = False
        self.unanswered_s = 0.0
        """Of the time in which the supervisor itself ran: a machine that slept counts against nobody."""
        self._asked = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()  # with SIGINT blocked: its imports would be interrupted by Ctrl-C
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def ask(self, *, may_listen: bool) -> None:
        """Ask for a sign of life, if the last one was given; called once a tick."""
        with contextlib.suppress(OSError, EOFError):  # it has just ended
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
class Place:
    """Of one worker: who has it, who is to have it next, and when it is filled again."""

    worker: Worker | None = None
    successor: Worker | None = None
    is_stale: bool = False
    """Its worker is to be replaced by a new one."""
    quick_deaths: int = 0
    due: float = 0.0


class Supervisor:
    """`run` serves until SIGTERM or Ctrl-C. SIGHUP replaces the workers one after the other."""

    def __init__(self, settings: Settings, make_config: Callable[[Path | None], uvicorn.Config], bound: socket.socket):
        self._settings = settings
        self._make_config = make_config
        self._bound = bound
        self._places = [Place() for _ in range(settings.workers)]
        self._ending = threading.Event()
        self._hurried = self._failed = self._ever_ready = False
        self._memory_kills = memory_kills()

    def run(self) -> None:
        """Raises SystemExit where no worker could start; the log says why."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._replace_all)
        with kept_store(self._settings), shared_folder() as folder:
            self._deaths = worker_deaths(SharedValues(folder) if folder else Values())
            self._config = self._make_config(folder)
            while not self._ending.is_set():
                for place in self._places:
                    self._look_after(place)
                self._ending.wait(TICK_S)
            self._end_all()
        if self._failed:
            raise SystemExit(1)

    def _end(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self._hurried = self._ending.is_set()
        self._ending.set()

    def _replace_all(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        for place in self._places:
            place.is_stale = True

    def _look_after(self, place: Place) -> None:
        if place.worker is None:
            if time.monotonic() >= place.due:
                first = place is self._places[0] and not self._ever_ready
                place.worker = Worker(self._config, self._bound, listens_at_once=first)
                place.is_stale = False
            return
        if (cause := self._cause_of_death(place.worker)) is not None:
            self._died(place, *cause)
            return
        self._ever_ready |= place.worker.is_ready
        self._replace(place, place.worker)

    def _replace(self, place: Place, worker: Worker) -> None:
        """One place at a time, and only once the new worker is ready."""
        if place.successor is None:
            if place.is_stale and not any(other.successor for other in self._places):
                place.is_stale = False
                place.successor = Worker(self._config, self._bound)
        elif (cause := self._cause_of_death(place.successor)) is not None:
            log.warning("worker %s keeps its place: its successor died, %s", worker.process.pid, cause[1])
            place.successor = None
        elif place.successor.is_ready:
            worker.send_signal(signal.SIGTERM)
            worker.process.join(self._settings.drain_s + KILL_AFTER_S)
            worker.kill()
            place.worker, place.successor = place.successor, None

    @property
    def _may_listen(self) -> bool:
        """Whether workers that are ready may take connections: until the first one is, it alone says how far it is."""
        first = self._places[0].worker
        return first is None or first.is_ready or not first.listens_at_once

    def _cause_of_death(self, worker: Worker) -> tuple[str, str] | None:
        """For the counter and in words; None while it lives. One that gives no sign of life is killed."""
        code = worker.process.exitcode
        if code is None:
            worker.ask(may_listen=self._may_listen)
            patience_s = self._settings.worker_health_timeout_s
            if not worker.was_heard:
                patience_s = max(patience_s, FIRST_SIGN_S)
            if worker.unanswered_s < patience_s:
                return None
            worker.kill()
            return "unresponsive", f"killed, for it gave no sign of life for {patience_s:g} s"
        if code >= 0:
            return f"status {code}", f"ended with status {code}"
        name = signal.Signals(-code).name
        return name, f"killed by {name}{self._why_killed() if name == 'SIGKILL' else ''}"

    def _why_killed(self) -> str:
        before, self._memory_kills = self._memory_kills, memory_kills()
        if before is not None and self._memory_kills is not None and self._memory_kills > before:
            return ": memory ran out, says the kernel"
        return ", by hand or for want of memory"

    def _died(self, place: Place, cause: str, words: str) -> None:
        worker, place.worker = place.worker, None
        assert worker is not None
        self._deaths.add((cause,))
        if worker.process.exitcode == START_FAILED and not self._ever_ready:
            self._failed = True  # it would fail the same way again
            self._ending.set()
            return
        place.quick_deaths = place.quick_deaths + 1 if worker.lived_s < QUICK_S else 0
        pause_s = min(MAX_PAUSE_S, 2.0 ** (place.quick_deaths - 1)) if place.quick_deaths else 0.0
        place.due = time.monotonic() + pause_s
        log.warning(
            "worker %s died after %.0f s: %s; another is started %s",
            worker.process.pid,
            worker.lived_s,
            words,
            f"in {pause_s:g} s" if pause_s else "now",
        )

    def _end_all(self) -> None:
        workers = [worker for place in self._places for worker in (place.worker, place.successor) if worker]
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.drain_s + KILL_AFTER_S
        while any(worker.process.exitcode is None for worker in workers) and time.monotonic() < deadline:
            if self._hurried:
                self._hurried = False
                for worker in workers:
                    worker.send_signal(signal.SIGINT)
            time.sleep(0.05)
        for worker in workers:
            worker.kill()


def _work(config: uvicorn.Config, bound: socket.socket, pipe: Connection, listens_at_once: bool) -> None:  # noqa: FBT001
    """What a worker process runs."""
    config.configure_logging()
    server = WorkerServer(config, listens_at_once=listens_at_once)
    threading.Thread(target=_answer, args=(pipe, server), name="uniroute-supervised", daemon=True).start()
    try:
        run_to_the_end(server, bound)
    except SystemExit:
        sys.exit(START_FAILED)


def _answer(pipe: Connection, server: WorkerServer) -> None:
    """Give signs of life. Without a supervisor, whose end of the pipe is then closed, a worker ends."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            server.may_listen = pipe.recv()
            pipe.send(server.is_ready)
    os.kill(os.getpid(), signal.SIGTERM)


def memory_kills() -> int | None:
    """How many processes of this machine the kernel has killed for want of memory; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
