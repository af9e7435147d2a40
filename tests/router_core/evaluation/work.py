"""Functions for worker processes, in a module that is quick to import there."""

from __future__ import annotations

import os
import signal
from threading import Event

import faiss
from threadpoolctl import threadpool_info

from router_core.errors import InvalidInput
from router_core.evaluation.parallel import parallel_map


def threads(_item: int) -> tuple[int, int]:
    return int(faiss.omp_get_max_threads()), max(library["num_threads"] for library in threadpool_info())


def refuse_three(item: int) -> int:
    if item == 3:
        raise InvalidInput("3 is not wanted")
    return item


def stuck(_item: int) -> None:
    """Write its process id and never end."""
    print(os.getpid(), flush=True)  # noqa: T201
    Event().wait()


def heeds_interrupts(_item: int) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def leave(_item: int) -> None:
    os._exit(9)


def stay_stuck() -> None:
    list(parallel_map(stuck, range(4), 2))
