"""Commands in the bytes of Redis' protocol, and a round trip for many of them: a pipeline of redis-py at half the cost.

What makes a pipeline dear is done for every command: its options, its observation and a time limit of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError


def packed(words: Iterable[str]) -> bytes:
    """One command of these words: an array of bulk strings."""
    bulk = [b"$%d\r\n%b\r\n" % (len(data), data) for data in (word.encode("utf-8", "replace") for word in words)]
    return b"*%d\r\n" % len(bulk) + b"".join(bulk)


async def exchange(client: Redis, commands: Sequence[bytes]) -> list[Any]:
    """A reply to each, or the ResponseError in its place, as a pipeline gives them that is no transaction; and where a
    pooled connection went stale it tries again, as that does.

    Without a time limit: whoever asks has one for the whole. Where that cuts it off, the connection is closed.

    Raises:
        RedisError, OSError: of the connection.
    """
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    try:
        replies: list[Any] = await connection.retry.call_with_retry(
            lambda: _exchange(connection, commands), lambda _: connection.disconnect(nowait=True)
        )
        return replies
    finally:
        await pool.release(connection)


async def _exchange(connection: Any, commands: Sequence[bytes]) -> list[Any]:
    await connection.send_packed_command(list(commands))
    return [await _reply(connection) for _ in commands]


async def _reply(connection: Any) -> Any:
    try:
        return await connection.read_response(timeout=math.inf)
    except ResponseError as error:
        return error
