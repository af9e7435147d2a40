"""One connection of a store's pool, read by callbacks: a round trip takes no task, no timer and no stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import RedisError

from proxy.concurrency import run_uncancelled
from proxy.storage.redis_connections import SentinelPool

# Gets a reply for each command, or the error that ended the connection before all had arrived.
OnReplies = Callable[[list[Any] | RedisError], None]

MAX_NESTING = 8


class PipelinedConnection(asyncio.Protocol):
    """Send commands, and get their replies in one call. The next commands may be sent after that.

    redis-py opens the connection: address, TLS, password, sentinels and the check of what answers are its own. It is
    held until `dispose`.
    """

    def __init__(self, pool: Any, connection: Any) -> None:
        self._pool = pool
        self._connection = connection
        self._transport: Any = connection._writer.transport
        # Of redis-py, which must still hear of the end.
        self._former: asyncio.BaseProtocol = self._transport.get_protocol()
        self._transport.set_protocol(self)
        self._unread = b""
        self._replies: list[Any] = []
        self._expected = 0
        self._on_replies: OnReplies = _ignore
        self._lost = False

    @classmethod
    async def open(cls, client: Redis) -> PipelinedConnection:
        """Take a connection from the client's pool. Raise RedisError, OSError."""
        pool: Any = client.connection_pool
        return cls(pool, await pool.get_connection())

    @property
    def is_open(self) -> bool:
        """Whether it leads to the server, and to the one that is the primary for all that is known."""
        connection, pool = self._connection, self._pool
        if self._lost or self._transport.is_closing():
            return False
        return not self.has_sentinels or (connection.host, connection.port) == pool.master_address

    @property
    def has_sentinels(self) -> bool:
        return isinstance(self._pool, SentinelPool)

    def send(self, commands: bytes, count: int, on_replies: OnReplies) -> None:
        """Send so many encoded commands."""
        self._replies, self._expected, self._on_replies = [], count, on_replies
        self._transport.write(commands)

    def abort(self) -> None:
        """Close the connection now. Replies that are on the way reach nobody."""
        self._on_replies, self._lost = _ignore, True
        self._transport.abort()

    async def dispose(self) -> None:
        """Close the connection, and give its place back to the pool."""
        self.abort()
        await run_uncancelled(self._give_back())

    def data_received(self, data: bytes) -> None:
        unread, place = self._unread + data if self._unread else data, 0
        try:
            while (read := self._read(unread, place, MAX_NESTING)) is not None:
                reply, place = read
                if reply is not PUSHED:
                    self._replies.append(reply)
        except (ValueError, LookupError):
            self._end(ConnectionFailed("Redis sent what is no reply"))
            self._transport.abort()
            return
        self._unread = unread[place:]
        if self._expected and len(self._replies) >= self._expected:
            self._expected = 0
            self._on_replies(self._replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self._former.connection_lost(exc)
        self._end(ConnectionFailed(f"the connection was lost: {exc or 'Redis closed it'}"))

    async def _give_back(self) -> None:
        await self._connection.disconnect(nowait=True)
        await self._pool.release(self._connection)

    def _end(self, error: RedisError) -> None:
        self._lost = True
        if self._expected:
            self._expected = 0
            self._on_replies(error)

    def _read(self, data: bytes, start: int, depth: int) -> tuple[Any, int] | None:
        """Parse the reply that begins at `start`; return it and where it ends, or None if more of it is to come.

        Raises:
            ValueError, LookupError: it is no reply of Redis.
        """
        end = data.find(b"\r\n", start)
        if end < 0:
            return None
        kind, line, after = data[start], data[start + 1 : end], end + 2
        if kind == _BULK:
            size = int(line)
            if size < 0:
                return None, after
            if len(data) < after + size + 2:
                return None
            return data[after : after + size].decode("utf-8", "replace"), after + size + 2
        if kind == _INTEGER:
            return int(line), after
        if kind == _SIMPLE:
            return line.decode("utf-8", "replace"), after
        if kind == _ERROR:
            return self._connection._parser.parse_error(line.decode("utf-8", "replace")), after
        if kind == _NULL:
            return None, after
        return self._read_list(data, after, int(line) * _LISTS[kind], kind, depth)

    def _read_list(self, data: bytes, place: int, size: int, kind: int, depth: int) -> tuple[Any, int] | None:
        if not depth:
            raise ValueError("too deep")
        members: list[Any] = []
        for _ in range(size):
            read = self._read(data, place, depth - 1)
            if read is None:
                return None
            member, place = read
            members.append(member)
        return PUSHED if kind == _PUSH else members, place


# What Redis says unasked.
PUSHED = object()

_BULK, _INTEGER, _SIMPLE, _ERROR, _NULL, _PUSH = b"$:+-_>"

# How many members each one that is announced stands for: those of a map are pairs.
_LISTS = {ord("*"): 1, ord("~"): 1, _PUSH: 1, ord("%"): 2}


def _ignore(_: object) -> None:
    """Take replies that nobody waits for."""
