"""What asyncio leaves out: sure cancellation, work in threads, background loops, a fair queue, a bounded dictionary."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
import resource
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

log = logging.getLogger("uniroute")

CANCEL_INTERVAL_S = 0.1

# How long a library that was cancelled may take to close what it holds, before it is cancelled once more.
GRACE_PERIOD_S = 5.0

# Between the failure of a background loop and its next start.
RESTART_INTERVAL_S = 1.0

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


async def cancel_until_done(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they are done, even if the caller is cancelled meanwhile.

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


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks until they are done. Log the error of a task that had failed before."""
    started = [task for task in tasks if task is not None]
    await cancel_until_done(started)
    for task in started:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s failed", task.get_name(), exc_info=error)


async def run_uncancelled(work: Coroutine[Any, Any, T], *, cancelled_again_s: float | None = None) -> T:
    """Run `work` to completion even if the caller is cancelled, then re-raise the cancellation.

    Use it to close things: a connection that is half closed leaks.

    Args:
        cancelled_again_s: cancel `work` too, and once more after so many seconds. None: never.
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
        working.exception()  # mark as retrieved: the caller gets the cancellation instead
    raise interrupted


@asynccontextmanager
async def child_process(*command: str, **options: Any) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Start a process, and kill it at the end, however often the caller is cancelled.

    Args:
        options: those of `asyncio.create_subprocess_exec`.

    Raises:
        OSError: it cannot be started.
    """
    started: list[asyncio.subprocess.Process] = []

    async def start() -> None:
        started.append(await asyncio.create_subprocess_exec(*command, **options))

    try:
        await run_uncancelled(start())
        yield started[0]
    finally:
        for child in started:
            await run_uncancelled(end_process(child))


async def end_process(child: asyncio.subprocess.Process) -> None:
    """Kill a process if it runs, wait for its end, and close its pipes."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    await child.communicate()


async def await_cancellable(work: Awaitable[T]) -> T:
    """Await work of a library that may take a cancellation for a failure of its own, and raise that all the same."""
    task = asyncio.current_task()
    assert task is not None  # a coroutine always runs in a task
    cancels_before = task.cancelling()
    try:
        result = await work
    except Exception:
        if task.cancelling() > cancels_before:
            raise asyncio.CancelledError from None
        raise
    if task.cancelling() > cancels_before:
        raise asyncio.CancelledError
    return result


class BackgroundTasks:
    """Own the background tasks of one object: name them, log their failures, restart loops, end them at close.

    An error that is never retrieved is silent until the garbage collector finds its task, and a loop that a bug has
    ended stays ended. Here a failure is logged when it happens.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, run: Callable[[], Coroutine[Any, Any, None]], *, restart: bool = True) -> None:
        """Run `run()` in a task until it returns or `close` ends it.

        Args:
            restart: run it again RESTART_INTERVAL_S after it has failed.
        """
        task = asyncio.create_task(_supervise(name, run, restart=restart), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel the tasks and wait for their end. More may be started afterwards."""
        await cancel_until_done(list(self._tasks))


async def _supervise(name: str, run: Callable[[], Coroutine[Any, Any, None]], *, restart: bool) -> None:
    while True:
        try:
            return await run()
        except Exception:
            log.exception("background task %s failed", name)
            if not restart:
                return None
        await asyncio.sleep(RESTART_INTERVAL_S)


@asynccontextmanager
async def background(
    name: str, run: Callable[[], Coroutine[Any, Any, None]], *, restart: bool = True
) -> AsyncIterator[None]:
    """Run a task beside the body of `async with`, as `BackgroundTasks.start` does; end it with the body."""
    tasks = BackgroundTasks()
    tasks.start(name, run, restart=restart)
    try:
        yield
    finally:
        await tasks.close()


class _Limit(Protocol):
    def expire(self) -> None: ...


class DeadlineWheel:
    """Limit how long waits may take, with one timer for all of them. A limit strikes up to `tick_s` late, never early.

    `asyncio.timeout` starts and cancels a timer for every wait. To be used on one event loop.
    """

    def __init__(self, tick_s: float = 0.05) -> None:
        self._tick_s = tick_s
        # The number of a tick → the deadlines that it ends.
        self._due: dict[int, set[_Limit]] = {}
        self._ticks = 0
        self._running = False

    def within(self, seconds: float) -> Deadline:
        """Return a context manager that raises TimeoutError after so many seconds, as `asyncio.timeout` does."""
        return Deadline(self, seconds)

    def _add(self, deadline: _Limit, seconds: float) -> int:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._running:
            self._running, self._ticks = True, int(now / self._tick_s)
            self._start_timer(loop)
        tick = max(int((now + seconds) / self._tick_s), self._ticks) + 1
        self._due.setdefault(tick, set()).add(deadline)
        return tick

    def _remove(self, deadline: _Limit, tick: int) -> None:
        if (due := self._due.get(tick)) is not None:
            due.discard(deadline)
            if not due:
                del self._due[tick]

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        before, self._ticks = self._ticks, int(loop.time() / self._tick_s)
        try:
            for tick in range(before + 1, self._ticks + 1):
                for deadline in self._due.pop(tick, ()):
                    deadline.expire()
        finally:
            self._running = bool(self._due)
            if self._running:
                self._start_timer(loop)

    def _start_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop that counts whole milliseconds may be early by one.
        loop.call_at((self._ticks + 1) * self._tick_s + 0.001, self._tick, loop)


class Deadline:
    """One wait that a DeadlineWheel limits."""

    __slots__ = ("_cancelling", "_expired", "_seconds", "_task", "_tick", "_wheel")

    def __init__(self, wheel: DeadlineWheel, seconds: float) -> None:
        self._wheel = wheel
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # a coroutine always runs in a task
        self._task = task
        self._cancelling = task.cancelling()
        self._tick = self._wheel._add(self, self._seconds)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._expired:
            self._wheel._remove(self, self._tick)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        self._expired = True
        self._task.cancel()


class SilenceTimer:
    """Call back once nothing has happened for so many seconds, or at a certain time. It is one of a wheel's limits.

    What happens is told by setting `since` to the monotonic time, which costs less than to start a timer again.
    """

    __slots__ = ("_callback", "_latest", "_seconds", "_tick", "_wheel", "since")

    def __init__(
        self, wheel: DeadlineWheel, seconds: float, callback: Callable[[], None], *, latest: float = math.inf
    ) -> None:
        """`latest`: when it calls back, in monotonic seconds, whatever happens."""
        self._wheel = wheel
        self._seconds = seconds
        self._callback = callback
        self._latest = latest
        self._tick: int | None = None
        self.since = 0.0

    def start(self) -> None:
        """Wait for the next silence, which begins now."""
        self.since = monotonic()
        if self._tick is None:
            self._wait()

    def stop(self) -> None:
        if self._tick is not None:
            self._wheel._remove(self, self._tick)
            self._tick = None

    def close(self) -> None:
        """Stop for good, and forget the callback: with a method of the timer's owner it is a cycle of references."""
        self.stop()
        self._callback = _do_nothing

    def expire(self) -> None:
        if self._tick is None:
            return  # another limit of the same tick has stopped it
        if min(self.since + self._seconds, self._latest) > monotonic():
            self._wait()
        else:
            self._tick = None
            self._callback()

    def _wait(self) -> None:
        ends = min(self.since + self._seconds, self._latest)
        self._tick = self._wheel._add(self, max(0.0, ends - monotonic()))


def _do_nothing() -> None:
    """Stand for a callback that is no longer wanted."""


class StallTolerantTimer:
    """Call back once the event loop has run for so many seconds, unless it is cancelled before.

    The time is counted in slices, each of which ends only after the loop has looked for what has arrived. While this
    process is kept busy a slice takes longer, and that is no silence of whoever is waited for.
    """

    __slots__ = ("_callback", "_loop", "_slice", "_slice_s", "_slices_left")

    def __init__(self, seconds: float, slice_s: float, callback: Callable[[], object]) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._slice_s = slice_s
        self._slices_left = max(1, round(seconds / slice_s))
        self._slice = self._loop.call_later(slice_s, self._end_slice)

    def cancel(self) -> None:
        self._slice.cancel()

    def _end_slice(self) -> None:
        self._slices_left -= 1
        if self._slices_left:
            self._slice = self._loop.call_later(self._slice_s, self._end_slice)
        else:
            self._callback()


class FairQueue:
    """Let `limit` callers in at once, and the others in the order in which they came.

    A slot belongs to the next caller from the moment it is free, so a newcomer cannot overtake those that wait. To be
    used on one event loop.
    """

    __slots__ = ("_waiters", "limit", "taken")

    def __init__(self, limit: int | None) -> None:
        """`limit` None: no limit."""
        self.limit = limit
        self.taken = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Return how many callers wait for a slot."""
        return len(self._waiters)

    @property
    def has_free_slot(self) -> bool:
        return self.limit is None or self.taken < self.limit

    def acquire_nowait(self) -> bool:
        """Take a free slot; return False where the caller would have to wait."""
        if self._waiters or (self.limit is not None and self.taken >= self.limit):
            return False
        self.taken += 1
        return True

    async def acquire(self) -> None:
        """Take a slot, after all who came before. A caller that is cancelled meanwhile has none."""
        if self.acquire_nowait():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # the slot was given to us in this moment
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.taken -= 1
        if self._waiters:
            self.admit()

    def admit(self) -> None:
        """Let in as many as now fit: after `release`, or after `limit` was raised."""
        while self._waiters and self.has_free_slot:
            waiter = self._waiters.popleft()
            if not waiter.done():  # else its caller was cancelled in this moment
                self.taken += 1
                waiter.set_result(None)


class LRU(Generic[K, V]):
    """A dictionary of at most `max_size` entries that drops the least recently used one.

    Reading an entry takes about 0.1 µs, a missing one three times as long: it is made for entries that are there.
    """

    __slots__ = ("_entries", "_touch", "max_size")

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._touch = self._entries.move_to_end

    def get(self, key: K) -> V | None:
        """Return the value and count this as a use; None if there is none."""
        try:
            self._touch(key)
        except KeyError:
            return None
        return self._entries[key]

    def __setitem__(self, key: K, value: V) -> None:
        entries = self._entries
        entries[key] = value
        self._touch(key)
        if len(entries) > self.max_size:
            entries.popitem(last=False)

    def __delitem__(self, key: K) -> None:
        del self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, from the least to the most recently used."""
        return iter(self._entries)


class _Abandoned(BaseException):
    """Raised in a thread whose result is no longer needed."""


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run work that takes seconds, such as an import. If cancelled, end it at its next step in Python.

    The process would wait at its end for a thread of an executor, however long its work takes.
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
    """Run work that looks at an event and ends soon after it is set; a cancellation sets it."""
    stop = threading.Event()
    working = asyncio.create_task(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await run_uncancelled(_settled(working))
        raise


def _run(work: Callable[[], T], loop: asyncio.AbstractEventLoop, over: asyncio.Future[T]) -> None:
    report: Callable[[], None]
    try:
        result = work()
    except _Abandoned:
        return
    except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
        failure = error
        report = lambda: None if over.done() else over.set_exception(failure)  # noqa: E731
    else:
        report = lambda: None if over.done() else over.set_result(result)  # noqa: E731
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(report)


async def _abandon(thread: threading.Thread) -> None:
    """Raise in the thread, again and again, because libraries catch what they do not know.

    C code may run for long between two steps of Python; after GRACE_PERIOD_S the thread is left to itself.
    """
    ident = ctypes.c_ulong(thread.ident or 0)
    with _unreported(thread):
        for _ in range(round(GRACE_PERIOD_S / CANCEL_INTERVAL_S)):
            if not thread.is_alive():
                return
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Abandoned))
            await asyncio.sleep(CANCEL_INTERVAL_S)


@contextlib.contextmanager
def _unreported(thread: threading.Thread) -> Iterator[None]:
    """Report nothing that cannot be raised in this thread.

    That may be `_Abandoned` itself, as in the callback of a weak reference, or a warning that a file was left open: the
    exception may come between the opening of a file and the `with` that would have closed it.
    """
    report = sys.unraisablehook

    def report_others(found: sys.UnraisableHookArgs) -> None:
        if threading.get_ident() != thread.ident:
            report(found)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report


async def _settled(working: asyncio.Task[Any]) -> None:
    await asyncio.wait({working})
    if not working.cancelled():
        working.exception()  # mark as retrieved


# File descriptors for everything but clients and models: connections to the store, files, pipes, jobs. About 60 are in
# use when idle.
RESERVED_DESCRIPTORS = 120

MIN_CLIENTS = 8

# Of one process, however many descriptors there are: a connection takes memory too.
MAX_CLIENTS = 20_000


@dataclass(frozen=True)
class ConnectionBudget:
    """How many connections this process may have open.

    A request holds a connection of a client and one to a model, so each side gets half of the descriptors.
    """

    clients: int
    upstreams: int


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files towards the hard one.

    Many systems set the soft limit to 1,024, for programs that use select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CLIENTS + RESERVED_DESCRIPTORS
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses what is above its kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def connection_budget() -> ConnectionBudget:
    """Return what the current limit of open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = MAX_CLIENTS if soft == resource.RLIM_INFINITY else (soft - RESERVED_DESCRIPTORS) // 2
    count = min(MAX_CLIENTS, max(MIN_CLIENTS, each))
    return ConnectionBudget(clients=count, upstreams=count)
