from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.acks import AcknowledgeType
from taskiq.exceptions import SendTaskError
from taskiq.receiver import Receiver
from taskiq.serializers import JSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from proxy.concurrency import BackgroundTasks, cancel_and_wait
from proxy.profiling.job_store import OPEN, JobStore, Lease, LeaseLost, Leases, enqueued_key, job_key, lease_key
from proxy.storage.records import WarnOnce, json_object
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, awaited
from proxy.storage.redis_connections import RedisServer

log = logging.getLogger("uniroute.jobs")

STREAM = "uniroute:tasks"

GROUP = "uniroute"

RESULTS = "uniroute:result"

MAX_STREAM = 1000

RESULT_KEPT_S = 3600

BLOCK_MS = 2000

RETRY_INTERVAL_S = 1.0

TASK = "uniroute.profile"

MAX_MESSAGE_BYTES = 10_000

# taskiq wants a URL for pools of its own, which connect to nothing before they are used: ours take their place.
UNUSED_URL = "redis://127.0.0.1"

Fetched = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


class JobBroker(RedisStreamBroker):  # type: ignore[misc]  # taskiq_redis is not checked: its stubs name old redis types
    """Deliver at most once and without acknowledgement: the worker's requeue loop sends a lost message again.

    The base class claims what others left unacknowledged after ten minutes, under a lock that costs two writes every
    two seconds. It also ends at the first error of Redis; taskiq then calls it again at once, without end.
    """

    def __init__(self, server: RedisServer) -> None:
        limits: dict[str, Any] = {"socket_timeout": 2 * BLOCK_MS / 1000, "socket_connect_timeout": 1.0, "protocol": 2}
        consumer = f"{socket.gethostname()}-{os.getpid()}"
        super().__init__(
            UNUSED_URL,
            STREAM,
            consumer_group_name=GROUP,
            consumer_name=consumer,
            consumer_id="0",
            maxlen=MAX_STREAM,
        )
        self.connection_pool = server.pool(**limits)
        results = _Results(UNUSED_URL, serializer=JSONSerializer(), result_ex_time=RESULT_KEPT_S, prefix_str=RESULTS)
        results.redis_pool = server.pool(**limits)
        self.with_result_backend(results).with_serializer(JSONSerializer())
        self.closing = False
        self._warn_once = WarnOnce(log, "the job stream holds what is not ours")

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """Yield job messages, until `closing`."""
        async with Redis(connection_pool=self.connection_pool) as client:
            while not self.closing:
                try:
                    fetched = await client.xreadgroup(
                        GROUP, self.consumer_name, {STREAM: ">"}, count=1, block=BLOCK_MS, noack=True
                    )
                except (RedisError, OSError) as error:
                    if "WRONGTYPE" in str(error):
                        self._warn_once(STREAM, error)
                    log.debug("the job stream cannot be read: %s", error)
                    await asyncio.sleep(RETRY_INTERVAL_S)
                    await self.declare_group()
                    continue
                for _, entries in cast(Fetched, fetched):
                    for _, fields in entries:
                        data = fields.get(b"data", b"")
                        if _is_ours(data):
                            yield data
                        else:
                            self._warn_once(STREAM, f"an entry that is no job of ours: {data[:60]!r}")

    async def declare_group(self) -> None:
        """Declare the consumer group, also of an emptied store. If Redis is away, the next round tries again."""
        try:
            await self._declare_consumer_group()
        except (RedisError, OSError) as error:
            log.debug("the job stream cannot be declared: %s", error)


def _is_ours(data: bytes) -> bool:
    """Return whether it is a job message. Other programs may write to the stream too, and taskiq would log a traceback
    for each entry that it cannot read.
    """
    try:
        message = TaskiqMessage.model_validate(json_object(data.decode()) if len(data) <= MAX_MESSAGE_BYTES else {})
        message.parse_labels()
    except (ValueError, TypeError, LookupError):  # InvalidRecord is a ValueError
        return False
    one_job = len(message.args) == 1 and isinstance(message.args[0], str)
    return one_job and message.task_name == TASK and not message.kwargs


class _Results(RedisAsyncResultBackend):  # type: ignore[misc]  # as JobBroker
    """Keep what taskiq requires and nothing here reads. taskiq would log a traceback for one that cannot be kept."""

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        try:
            await super().set_result(task_id, result)
        except (RedisError, OSError) as error:
            log.debug("the result of a task is not kept: %s", error)


REQUEUE_INTERVAL_S = 2.0

# How long a job that was put on the stream may wait there before it is put there again.
ENQUEUED_S = 5.0

MAX_CONCURRENT_JOBS = 4

STOP_TIMEOUT_S = 3.0

Measure = Callable[[Lease], Awaitable[None]]


class JobWorker:
    """Put jobs on the stream, and once started take them from there."""

    def __init__(self, store: Store, job_store: JobStore, measure: Measure, map_id: str) -> None:
        self._store = store
        self._job_store = job_store
        self._measure = measure
        self._leases = Leases(store, map_id)
        self._broker = JobBroker(store.server)
        self._task = self._broker.register_task(_function(self._work_on), task_name=TASK)
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
        try:
            async with self._store.operation("start a job") as client:
                await client.set(enqueued_key(job_id), "1", px=int(ENQUEUED_S * 1000))
                await self._task.kiq(job_id)
        except (StoreUnavailable, SendTaskError) as error:
            log.warning("job %s starts later: %s", job_id, error)

    async def start(self) -> None:
        """Take jobs from now on, in this event loop. Redis may be away for now."""
        self._stopping.clear()
        self._broker.closing = False
        self._broker.is_worker_process = True
        await self._broker.declare_group()
        receiver = Receiver(
            self._broker,
            max_async_tasks=MAX_CONCURRENT_JOBS,
            run_startup=False,
            ack_type=AcknowledgeType.WHEN_RECEIVED,
            wait_tasks_timeout=STOP_TIMEOUT_S,
        )
        self._tasks.start("uniroute-jobs", partial(receiver.listen, self._stopping))
        self._tasks.start("uniroute-job-sweeper", self._requeue_loop)

    async def stop(self) -> None:
        """Give the jobs back: another worker continues them at once."""
        self._broker.closing = True
        self._stopping.set()
        given_back = tuple(self._working)
        await cancel_and_wait(*self._working.values())
        await self._tasks.close()
        for job_id in given_back:
            await self.enqueue(job_id)

    async def close(self) -> None:
        await self.stop()
        await self._broker.shutdown()

    async def _work_on(self, job_id: str) -> None:
        """Run taskiq's task. It never fails: an error ends the job, or the requeue loop tries it again."""
        if self._broker.closing or job_id in self._working:
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


def _function(method: Callable[[str], Awaitable[None]]) -> Callable[[str], Coroutine[Any, Any, None]]:
    """Wrap a method in a function: taskiq renames what it registers, and a method cannot be renamed."""

    async def profile(job_id: str) -> None:
        await method(job_id)

    return profile
