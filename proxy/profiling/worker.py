from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from proxy.concurrency import BackgroundTasks, cancel_and_wait, in_own_thread
from proxy.profiling.job_store import OPEN, JobStore, Lease, LeaseLost, Leases, enqueued_key, job_key, lease_key
from proxy.storage.records import WarnOnce
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, awaited

if TYPE_CHECKING:
    from proxy.profiling.broker import JobBroker

log = logging.getLogger("uniroute.jobs")

REQUEUE_INTERVAL_S = 2.0

# How long a job that was put on the stream may wait there before it is put there again.
ENQUEUED_S = 5.0

Measure = Callable[[Lease], Awaitable[None]]


class JobWorker:
    """Put jobs on the stream, and once started take them from there."""

    def __init__(self, store: Store, job_store: JobStore, measure: Measure, map_id: str) -> None:
        self._store = store
        self._job_store = job_store
        self._measure = measure
        self._leases = Leases(store, map_id)
        self._broker: JobBroker | None = None
        self._importing = asyncio.Lock()
        self._has_jobs = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._warn_once = WarnOnce(log, "unfinished jobs are not looked after")

    @property
    def running(self) -> int:
        """Return how many jobs this process works on."""
        return len(self._working)

    async def enqueue(self, job_id: str) -> None:
        """Put a job on the stream. If that fails, the requeue loop does it later: the job itself is stored."""
        self._has_jobs.set()
        try:
            broker = await self._opened()
            async with self._store.operation("start a job") as client:
                await client.set(enqueued_key(job_id), "1", px=int(ENQUEUED_S * 1000))
                await broker.put(job_id)
        except StoreUnavailable as error:
            log.warning("job %s starts later: %s", job_id, error)

    def start(self) -> None:
        """Take jobs from now on, in this event loop. Redis may be away for now."""
        self._stopping.clear()
        self._tasks.start("uniroute-jobs", self._take_jobs)
        self._tasks.start("uniroute-job-sweeper", self._requeue_loop)

    async def stop(self) -> None:
        """Give the jobs back: another worker continues them at once."""
        self._stopping.set()
        if self._broker is not None:
            self._broker.closing = True
        given_back = tuple(self._working)
        await cancel_and_wait(*self._working.values())
        await self._tasks.close()
        for job_id in given_back:
            await self.enqueue(job_id)

    async def close(self) -> None:
        await self.stop()
        if self._broker is not None:
            await self._broker.shutdown()

    async def _take_jobs(self) -> None:
        """Take jobs from the stream, from the first time on that there may be one."""
        await self._has_jobs.wait()
        await (await self._opened()).work(self._stopping)

    async def _opened(self) -> JobBroker:
        """Return the broker. Only here it is imported: most servers measure nothing, and it takes time and memory."""
        async with self._importing:
            if self._broker is None:
                make = await in_own_thread(_import_broker)
                self._broker = make(self._store.server, self._work_on)
            return self._broker

    async def _work_on(self, job_id: str) -> None:
        """Run taskiq's task. It never fails: an error ends the job, or the requeue loop tries it again."""
        if self._stopping.is_set() or job_id in self._working:
            return
        work = asyncio.create_task(self._attempt(job_id), name=f"uniroute-job-{job_id}")
        self._working[job_id] = work
        try:
            await asyncio.wait({work})
            await cancel_and_wait(work)
        finally:
            del self._working[job_id]

    async def _attempt(self, job_id: str) -> None:
        try:
            lease = await self._leases.take(job_id)
            if lease is None:
                return
            try:
                await self._measure_under(lease)
            finally:
                with contextlib.suppress(StoreUnavailable):  # then it expires
                    await self._leases.release(lease)
        except (LeaseLost, StoreUnavailable) as reason:
            log.warning("job %s is left to be taken up again: %s", job_id, reason)

    async def _measure_under(self, lease: Lease) -> None:
        work = asyncio.ensure_future(self._measure(lease))
        await self._leases.hold(lease, work)
        error = work.exception()
        if isinstance(error, StoreUnreadable):  # it would fail each time, and each time cost a prompt
            await self._job_store.fail(lease, str(error))
            return
        if isinstance(error, LeaseLost | StoreUnavailable):
            raise error
        if error is not None:  # a bug: another attempt would fail, and cost, again and again
            log.error("job %s failed unexpectedly", lease.job_id, exc_info=error)
            await self._job_store.fail(lease, f"unexpected {type(error).__name__}; the log of the worker says more")

    async def _requeue_loop(self) -> None:
        while not self._stopping.is_set():
            try:
                for job_id in await self._orphaned():
                    await self.enqueue(job_id)
            except StoreUnreadable as error:
                self._warn_once(OPEN, error)
            except StoreUnavailable as error:
                log.debug("jobs are not looked after for now: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REQUEUE_INTERVAL_S):
                    await self._stopping.wait()

    async def _orphaned(self) -> list[str]:
        """Return the unfinished jobs that no worker holds and that are not known to wait on the stream."""
        async with self._store.operation("look after jobs") as client:
            job_ids = await awaited(client.smembers(OPEN))
            if job_ids:
                self._has_jobs.set()
            async with client.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    for key in (lease_key(job_id), enqueued_key(job_id)):
                        pipe.pttl(key)
                    pipe.hexists(job_key(job_id), "state")
                known = await pipe.execute(raise_on_error=False)
            states = list(zip(job_ids, known[0::3], known[1::3], known[2::3], strict=True))
            if gone := [job_id for job_id, _, _, stored in states if stored is not True]:  # or it is no job
                await awaited(client.srem(OPEN, *gone))
        return [job_id for job_id, held, enqueued, stored in states if stored is True and max(held, enqueued) <= 0]


def _import_broker() -> type[JobBroker]:
    from proxy.profiling.broker import JobBroker

    return JobBroker
