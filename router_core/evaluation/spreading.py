"""Independent pieces of work over the cores of this machine, one thread each. Knows nothing of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_work: Callable[[Any], Any]
"""In a worker process: what it was started for."""


def spread(work: Callable[[Item], Found], items: Iterable[Item], workers: int) -> Iterator[Found]:
    """`work` of each item, in their order. With several workers `work` and what it returns are pickled.

    Each process does its sums in one thread: small matrices gain nothing by more, figures do not depend on how many
    there are, and two processes of two threads on two cores wait for each other.
    """
    if workers == 1:
        with one_thread():
            yield from map(work, items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(work,)) as pool:
        yield from pool.map(_do, items)


@contextmanager
def one_thread() -> Iterator[None]:
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


def _start(work: Callable[[Any], Any]) -> None:
    global _work  # sent once: with every item, the data would be pickled each time
    _work = work


def _do(item: Any) -> Any:
    with one_thread():
        return _work(item)
