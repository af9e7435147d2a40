"""Map a function over items in worker processes, one thread each.

Why not concurrent.futures: its pool waits for ever if a process is killed while it starts or returns a result, and it
cannot be abandoned halfway. Here each process has a pipe of its own, and the process is gone when its pipe ends.
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
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

from router_core.errors import WorkerLost

Item = TypeVar("Item")

Found = TypeVar("Found")

# A result, or the exception that was raised.
Outcome = tuple[Any, Exception | None]


def parallel_map(work: Callable[[Item], Found], items: Iterable[Item], workers: int) -> Iterator[Found]:
    """Yield `work(item)` for each item, in order. With several workers, `work` and its results are pickled.

    Each process computes in one thread: small matrices gain nothing from more, results do not depend on their number,
    and two processes of two threads on two cores wait for each other. Workers end with this process, and when the
    iterator is closed.

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
    """Limit NumPy's and FAISS's libraries to one thread while the context lasts."""
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
    """Start the worker processes and yield a connection to each. They are killed in the end, busy or not."""
    team: list[tuple[SpawnProcess, Connection]] = []
    try:
        with _interrupts_deferred():
            for _ in range(workers):
                team.append(_start_worker())
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
def _interrupts_deferred() -> Iterator[None]:
    """Keep SIGINT from processes started in the context, and from this one until its end.

    A terminal sends it to all. A process that loses its parent while it starts would print a traceback.
    """
    # Starting the tracker unblocks SIGINT, so it is started first.
    resource_tracker.ensure_running()
    arrived: list[int] = []
    # Another thread may take the signal that this one blocks, and Python would raise KeyboardInterrupt here.
    is_main = current_thread() is main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number)) if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, handler)
            if arrived:
                signal.raise_signal(signal.SIGINT)


def _start_worker() -> tuple[SpawnProcess, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    # The worker alone holds its end now, so that it is closed when the worker ends.
    theirs.close()
    return process, ours


def _in_order(connections: Sequence[Connection], items: Iterable[Any]) -> Iterator[Any]:
    waiting, results, next_result = enumerate(items), dict[int, Outcome](), 0
    running: dict[Connection, int] = {}

    def submit(connection: Connection) -> None:
        if following := next(waiting, None):
            running[connection] = following[0]
            connection.send(following[1])

    for connection in connections:
        submit(connection)
    while running:
        ready = set(wait(list(running)))
        for connection in [connection for connection in running if connection in ready]:
            results[running.pop(connection)] = connection.recv()
            submit(connection)
        while next_result in results:
            yield _value(results.pop(next_result))
            next_result += 1


def _value(outcome: Outcome) -> Any:
    value, error = outcome
    if error:
        raise error
    return value


def _serve(connection: Connection) -> None:
    """Run in a worker process: receive the work, then its items."""
    Thread(target=_exit_with_parent, daemon=True).start()
    try:
        work = connection.recv()
        with single_threaded():
            while True:
                connection.send(_outcome(work, connection.recv()))
    except (EOFError, ConnectionError):
        return  # the parent is gone


def _exit_with_parent() -> None:
    """End this process, in the middle of its work, when the parent has ended, however it did."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _outcome(work: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return work(item), None
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        return None, error
