"""The stream of jobs, by taskiq. The worker imports this with the first job: it takes as long as all of FastAPI."""

from __future__ import annotations

import asyncio
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

from proxy.storage.records import WarnOnce, json_object
from proxy.storage.redis import StoreUnavailable
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

MAX_CONCURRENT_JOBS = 4

STOP_TIMEOUT_S = 3.0

# taskiq wants a URL for pools of its own, which connect to nothing before they are used: ours take their place.
UNUSED_URL = "redis://127.0.0.1"

Fetched = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


class JobBroker(RedisStreamBroker):  # type: ignore[misc]  # taskiq_redis is not checked: its stubs name old redis types
    """Deliver at most once and without acknowledgement: the worker's requeue loop sends a lost message again.

    The base class claims what others left unacknowledged after ten minutes, under a lock that costs two writes every
    two seconds. It also ends at the first error of Redis; taskiq then calls it again at once, without end.
    """

    def __init__(self, server: RedisServer, work_on: Callable[[str], Awaitable[None]]) -> None:
        """`work_on`: is called with the id of each job that comes; it never fails."""
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
        self._task = self.register_task(_function(work_on), task_name=TASK)

    async def put(self, job_id: str) -> None:
        """Put a job on the stream. Raise StoreUnavailable if that fails."""
        try:
            await self._task.kiq(job_id)
        except SendTaskError as error:
            raise StoreUnavailable(str(error)) from error

    async def work(self, stopping: asyncio.Event) -> None:
        """Work on the jobs of the stream until `stopping`. Redis may be away for now."""
        self.closing = False
        self.is_worker_process = True
        await self.declare_group()
        receiver = Receiver(
            self,
            max_async_tasks=MAX_CONCURRENT_JOBS,
            run_startup=False,
            ack_type=AcknowledgeType.WHEN_RECEIVED,
            wait_tasks_timeout=STOP_TIMEOUT_S,
        )
        await receiver.listen(stopping)

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


def _function(method: Callable[[str], Awaitable[None]]) -> Callable[[str], Coroutine[Any, Any, None]]:
    """Wrap a method in a function: taskiq renames what it registers, and a method cannot be renamed."""

    async def profile(job_id: str) -> None:
        await method(job_id)

    return profile
