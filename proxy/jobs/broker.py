"""taskiq over a Redis stream, with JSON only and no busy loop. It carries job ids; the lease decides who works."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.serializers import JSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from proxy.storage.complaints import Complaints
from proxy.storage.redis import json_object
from proxy.storage.redis_server import RedisServer

log = logging.getLogger("uniroute.jobs")

STREAM = "uniroute:tasks"
GROUP = "uniroute"
RESULTS = "uniroute:result"
LONGEST_STREAM = 1000
RESULT_KEPT_S = 3600
BLOCK_MS = 2000
AGAIN_S = 1.0
TASK = "uniroute.profile"
LARGEST_MESSAGE = 10_000
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
            maxlen=LONGEST_STREAM,
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
                    await asyncio.sleep(AGAIN_S)
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
        message = TaskiqMessage.model_validate(json_object(data.decode()) if len(data) <= LARGEST_MESSAGE else {})
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
