"""Independent pieces of work over the cores of this machine, one thread each. Knows nothing of the work.

Not by concurrent.futures: its pool waits for ever when a process is killed while it starts or hands over what it found,
and cannot be left in the middle. Here each process has a pipe of its own, and its end is the end of the pipe.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any, TypeVar

from router_core.errors import WorkerLost

Item = TypeVar("Item")

Found = TypeVar("Found")

# What was found, or what was raised.
Tried = tuple[Any, Exception | None]


def parallel_map(work: Callable[[Item], Found], items: Iterable[Item], workers: int) -> Iterator[Found]:
    """`work` of each item, in their order. With several workers `work` and what it returns are pickled.

    Each process does its sums in one thread: small matrices gain nothing by more, figures do not depend on how many
    there are, and two processes of two threads on two cores wait for each other. None outlives this one, or an iterator
    that is closed.

    Raises:
        WorkerLost: one of several workers was killed.
    """
    if workers == 1:
        with single_threaded():
            yield from map(work, items)
        return
    try:
        with _team(work, workers) as connections:
            yield from _in_order(connections, items)
    except (EOFError, ConnectionError):
        raise WorkerLost("a worker process was killed, as when memory runs out; give fewer workers") from None


@contextmanager
def single_threaded() -> Iterator[None]:
    """Of NumPy's and FAISS's libraries, for as long as it lasts."""
    import faiss
    from threadpoolctl import threadpool_limits

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _team(work: Callable[[Any], Any], workers: int) -> Iterator[list[Connection]]:
    """A connection to each process. Whatever they are at, they are dropped in the end."""
    team: list[tuple[SpawnProcess, Connection]] = []
    try:
        with _interrupts_wait():
            for _ in range(workers):
                team.append(_started())
        packed = pickle.dumps(work)
        for _, connection in team:
            connection.send_bytes(packed)
        yield [connection for _, connection in team]
    finally:
        for process, connection in team:
            process.kill()
            process.join()
            connection.close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all: whoever started them ends them."""
    resource_tracker.ensure_running()  # which unblocks it, where it is not running yet
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started() -> tuple[SpawnProcess, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that it is theirs alone, and closed when they are gone
    return process, ours


def _in_order(connections: Sequence[Connection], items: Iterable[Any]) -> Iterator[Any]:
    waiting, found, told = enumerate(items), dict[int, Tried](), 0
    asked: dict[Connection, int] = {}

    def ask(connection: Connection) -> None:
        if following := next(waiting, None):
            asked[connection] = following[0]
            connection.send(following[1])

    for connection in connections:
        ask(connection)
    while asked:
        ready = set(wait(list(asked)))
        for connection in [connection for connection in asked if connection in ready]:
            found[asked.pop(connection)] = connection.recv()
            ask(connection)
        while told in found:
            yield _value(found.pop(told))
            told += 1


def _value(tried: Tried) -> Any:
    value, error = tried
    if error:
        raise error
    return value


def _serve(connection: Connection) -> None:
    """In a worker process: first the work comes, then its items."""
    Thread(target=_leave_with_who_started, daemon=True).start()
    try:
        work = connection.recv()
        with single_threaded():
            while True:
                connection.send(_tried(work, connection.recv()))
    except (EOFError, ConnectionError):
        return  # nobody is there any more


def _leave_with_who_started() -> None:
    """In the middle of the work, however that one ended."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _tried(work: Callable[[Any], Any], item: Any) -> Tried:
    try:
        return work(item), None
    except Exception as error:  # noqa: BLE001  # whatever it is, it is raised where the work was asked for
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        return None, error
