from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.acks import AcknowledgeType
from taskiq.exceptions import SendTaskError
from taskiq.receiver import Receiver
from taskiq.serializers import JSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from proxy.concurrency import cancel_and_wait
from proxy.profiling.job import OPEN, Lease, LeaseLost, Leases, job_key, kick_key, lease_key
from proxy.profiling.job_store import JobStore
from proxy.storage.complaints import Complaints
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, json_object
from proxy.storage.redis_server import RedisServer

log = logging.getLogger("uniroute.jobs")

STREAM = "uniroute:tasks"

GROUP = "uniroute"

RESULTS = "uniroute:result"

MAX_STREAM = 1000

RESULT_KEPT_S = 3600

BLOCK_MS = 2000

RETRY_INTERVAL_S = 1.0

TASK = "uniroute.profile"

MAX_MESSAGE = 10_000

UNUSED = "redis://127.0.0.1"
"""taskiq wants a URL for pools of its own, which connect to nothing before they are used: ours take their place."""

Fetched = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


class JobBroker(RedisStreamBroker):  # type: ignore[misc]  # taskiq_redis is not checked: its stubs name old redis types
    """Delivers at most once and without acknowledgement: a message that is lost is sent again by the sweeper.

    The base class claims what others left unacknowledged after ten minutes, under a lock that costs two writes every
    two seconds; it also ends at the first error of Redis, whereupon taskiq calls it again at once, without end.
    """

    def __init__(self, server: RedisServer) -> None:
        limits: dict[str, Any] = {"socket_timeout": 2 * BLOCK_MS / 1000, "socket_connect_timeout": 1.0, "protocol": 2}
        consumer = f"{socket.gethostname()}-{os.getpid()}"
        super().__init__(
            UNUSED,
            STREAM,
            consumer_group_name=GROUP,
            consumer_name=consumer,
            consumer_id="0",
            maxlen=MAX_STREAM,
        )
        self.connection_pool = server.pool(**limits)
        results = _Results(UNUSED, serializer=JSONSerializer(), result_ex_time=RESULT_KEPT_S, prefix_str=RESULTS)
        results.redis_pool = server.pool(**limits)
        self.with_result_backend(results).with_serializer(JSONSerializer())
        self.closing = False
        self._complaints = Complaints(log, "the job stream holds what is not ours")

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """Job messages, until `closing`."""
        async with Redis(connection_pool=self.connection_pool) as client:
            while not self.closing:
                try:
                    fetched = await client.xreadgroup(
                        GROUP, self.consumer_name, {STREAM: ">"}, count=1, block=BLOCK_MS, noack=True
                    )
                except (RedisError, OSError) as error:
                    if "WRONGTYPE" in str(error):
                        self._complaints.make(STREAM, error)
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
                            self._complaints.make(STREAM, f"an entry that is no job of ours: {data[:60]!r}")

    async def declare_group(self) -> None:
        """Also after the store was emptied. Redis away: the next round tries again."""
        try:
            await self._declare_consumer_group()
        except (RedisError, OSError) as error:
            log.debug("the job stream cannot be declared: %s", error)


def _is_ours(data: bytes) -> bool:
    """Anybody may write to the stream, and taskiq would log a traceback for each entry that it cannot read."""
    try:
        message = TaskiqMessage.model_validate(json_object(data.decode()) if len(data) <= MAX_MESSAGE else {})
        message.parse_labels()
    except (ValueError, TypeError, LookupError):  # InvalidRecord is a ValueError
        return False
    one_job = len(message.args) == 1 and isinstance(message.args[0], str)
    return one_job and message.task_name == TASK and not message.kwargs


class _Results(RedisAsyncResultBackend):  # type: ignore[misc]  # as JobBroker
    """Of no use to us but required. Where one is not kept, taskiq would log a traceback."""

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        try:
            await super().set_result(task_id, result)
        except (RedisError, OSError) as error:
            log.debug("the result of a task is not kept: %s", error)


SWEEP_S = 2.0

KICKED_S = 5.0
"""How long a job that was put on the stream is given to be taken up, before it is put there again."""

MAX_CONCURRENT_JOBS = 4

STOPPING_S = 3.0

Measure = Callable[[Lease], Awaitable[None]]


class JobWorker:
    """Puts jobs on the stream, and once started takes them from there."""

    def __init__(self, store: Store, ledger: JobStore, measure: Measure, map_id: str) -> None:
        self._store = store
        self._ledger = ledger
        self._measure = measure
        self._leases = Leases(store, map_id)
        self._broker = JobBroker(store.server)
        self._task = self._broker.register_task(_function(self._work_on), task_name=TASK)
        self._stopping = asyncio.Event()
        self._background: tuple[asyncio.Task[Any], ...] = ()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._complaints = Complaints(log, "unfinished jobs are not looked after")

    @property
    def working_on(self) -> frozenset[str]:
        """Ids of the jobs that this process holds now."""
        return frozenset(self._working)

    async def kick(self, job_id: str) -> None:
        """Put a job on the stream. If that fails, the sweeper does it later: the job itself is stored."""
        try:
            async with self._store.asking("start a job") as client:
                await client.set(kick_key(job_id), "1", px=int(KICKED_S * 1000))
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
            wait_tasks_timeout=STOPPING_S,
        )
        self._background = (
            asyncio.create_task(receiver.listen(self._stopping), name="uniroute-jobs"),
            asyncio.create_task(self._sweep(), name="uniroute-job-sweeper"),
        )

    async def stop(self) -> None:
        """Give the jobs back: another worker goes on with them at once."""
        if not self._background:
            return
        self._broker.closing = True
        self._stopping.set()
        given_back = tuple(self._working)
        await cancel_and_wait(*self._working.values())
        await cancel_and_wait(*self._background)
        self._background = ()
        for job_id in given_back:
            await self.kick(job_id)

    async def close(self) -> None:
        await self.stop()
        await self._broker.shutdown()

    async def _work_on(self, job_id: str) -> None:
        """taskiq's task. It never fails: what can go wrong ends in the job, or is tried again by the sweeper."""
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
                await self._held(lease)
            finally:
                with contextlib.suppress(StoreUnavailable):  # then it runs out by itself
                    await self._leases.release(lease)
        except (LeaseLost, StoreUnavailable) as reason:
            log.warning("job %s is left to be taken up again: %s", job_id, reason)

    async def _held(self, lease: Lease) -> None:
        work = asyncio.ensure_future(self._measure(lease))
        await self._leases.hold(lease, work)
        error = work.exception()
        if isinstance(error, StoreUnreadable):  # it would be so each time, and each time cost a prompt
            await self._ledger.fail(lease, str(error))
            return
        if isinstance(error, LeaseLost | StoreUnavailable):
            raise error
        if error is not None:  # a fault of ours: trying again would fail, and cost, for ever
            log.error("job %s failed unexpectedly", lease.job_id, exc_info=error)
            await self._ledger.fail(lease, f"unexpected {type(error).__name__}; the log of the worker says more")

    async def _sweep(self) -> None:
        while not self._stopping.is_set():
            try:
                for job_id in await self._abandoned():
                    await self.kick(job_id)
            except StoreUnreadable as error:
                self._complaints.make(OPEN, error)
            except StoreUnavailable as error:
                log.debug("jobs are not looked after for now: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_S):
                    await self._stopping.wait()

    async def _abandoned(self) -> list[str]:
        """Unfinished jobs that nobody works on and that wait on no stream for all we know."""
        async with self._store.asking("look after jobs") as client:
            job_ids = await _plain(client.smembers(OPEN))
            async with client.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    for key in (lease_key(job_id), kick_key(job_id)):
                        pipe.pttl(key)
                    pipe.hexists(job_key(job_id), "state")
                known = await pipe.execute(raise_on_error=False)
            states = list(zip(job_ids, known[0::3], known[1::3], known[2::3], strict=True))
            if gone := [job_id for job_id, _, _, stored in states if stored is not True]:  # or it is no job
                await _plain(client.srem(OPEN, *gone))
        return [job_id for job_id, held, kicked, stored in states if stored is True and max(held, kicked) <= 0]


def _function(method: Callable[[str], Awaitable[None]]) -> Callable[[str], Coroutine[Any, Any, None]]:
    """taskiq renames what it registers, and a method cannot be renamed."""

    async def profile(job_id: str) -> None:
        await method(job_id)

    return profile


async def _plain(reply: Any) -> Any:
    # redis-py types one method for its blocking and its asyncio client: "Awaitable[T] | T".
    return await reply
