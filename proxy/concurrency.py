from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import resource
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

log = logging.getLogger("uniroute")

CANCEL_INTERVAL_S = 0.1

GRACE_PERIOD_S = 5.0
"""With a library that was cancelled, until it is once more."""

T = TypeVar("T")


async def cancel_until_done(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel until they are over, even if we are cancelled meanwhile.

    Once is not enough: under Python 3.11 `asyncio.wait_for`, through which redis-py sends, swallows a cancellation
    that arrives together with its result.
    """
    interrupted: asyncio.CancelledError | None = None
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=CANCEL_INTERVAL_S)
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


async def run_uncancelled(work: Coroutine[Any, Any, T], *, cancelled_again_s: float | None = None) -> T:
    """What came of `work`, which is over when this returns, however often we are cancelled meanwhile: that is told
    afterwards. What is closed halfway stays open for ever.

    Args:
        cancelled_again_s: `work` is cancelled with us, once, and once more when this has passed. None: never.
    """
    working = asyncio.create_task(work)
    interrupted: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait({working}, timeout=cancelled_again_s if interrupted else None)
            again = cancelled_again_s is not None
        except asyncio.CancelledError as error:
            again = cancelled_again_s is not None and interrupted is None
            interrupted = error
        if again:
            working.cancel()
    if interrupted is None:
        return working.result()
    if not working.cancelled():
        working.exception()  # nobody is left to tell
    raise interrupted


async def iterate_uncancelled(source: AsyncIterator[T]) -> AsyncGenerator[T]:
    """`source`, each reading of which is cancelled once: most libraries then close what they hold, and are interrupted
    in that by a second time."""
    while True:
        try:
            item = await run_uncancelled(_next(source), cancelled_again_s=GRACE_PERIOD_S)
        except StopAsyncIteration:
            return
        yield item


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel until they are over. What one of them failed with before is logged, not raised."""
    started = [task for task in tasks if task is not None]
    await cancel_until_done(started)
    for task in started:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s failed", task.get_name(), exc_info=error)


class _Abandoned(BaseException):
    """Raised in a thread whose work nobody waits for any more."""


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run what takes seconds, such as an import. Cancelled, end it at its next step in Python.

    An executor's thread would be waited for at the end of the process, however long its work takes.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[T] = loop.create_future()
    thread = threading.Thread(target=_run, args=(work, loop, over), name="uniroute-loading", daemon=True)
    thread.start()
    try:
        return await asyncio.shield(over)
    except asyncio.CancelledError:
        await run_uncancelled(_abandon(thread))
        raise


async def in_stoppable_thread(work: Callable[[threading.Event], T]) -> T:
    """Run work that looks at an event and ends soon after it was set, which is when we are cancelled."""
    stop = threading.Event()
    working = asyncio.create_task(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await run_uncancelled(_settled(working))
        raise


def _run(work: Callable[[], T], loop: asyncio.AbstractEventLoop, over: asyncio.Future[T]) -> None:
    tell: Callable[[], None]
    try:
        result = work()
    except _Abandoned:
        return
    except BaseException as error:  # noqa: BLE001  it is raised where the work is waited for
        failure = error
        tell = lambda: None if over.done() else over.set_exception(failure)  # noqa: E731
    else:
        tell = lambda: None if over.done() else over.set_result(result)  # noqa: E731
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(tell)


async def _abandon(thread: threading.Thread) -> None:
    """Again and again: libraries catch what they do not know. Between its steps C code may take long: it is left."""
    ident = ctypes.c_ulong(thread.ident or 0)
    for _ in range(round(GRACE_PERIOD_S / CANCEL_INTERVAL_S)):
        if not thread.is_alive():
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Abandoned))
        await asyncio.sleep(CANCEL_INTERVAL_S)


async def _settled(working: asyncio.Task[Any]) -> None:
    await asyncio.wait({working})
    if not working.cancelled():
        working.exception()  # nobody is left to tell


RESERVED = 120
"""For everything but clients and models: the store's connections, files, pipes, jobs. About 60 are in use when idle."""

MIN_CLIENTS = 8

MAX_CLIENTS = 20_000
"""Of one process, however many descriptors there are: a connection takes memory too."""


@dataclass(frozen=True)
class ConnectionBudget:
    """A request holds a client's connection and a model's: half of what is left goes to each."""

    clients: int
    upstreams: int


def raise_open_files_limit() -> None:
    """The soft limit to the hard one: many systems set the soft one to 1,024 for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CLIENTS + RESERVED
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses what is above its kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def connection_budget() -> ConnectionBudget:
    """As the limit is now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = MAX_CLIENTS if soft == resource.RLIM_INFINITY else (soft - RESERVED) // 2
    count = min(MAX_CLIENTS, max(MIN_CLIENTS, each))
    return ConnectionBudget(clients=count, upstreams=count)
