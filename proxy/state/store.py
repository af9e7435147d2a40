"""The one way to Redis: its connection, its time limits, and one error for all that can go wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.settings import Settings
from proxy.state.embedded import EmbeddedStoreFailed, EmbeddedValkey
from proxy.state.silence import Silence
from proxy.tasks import to_its_end

OPERATION_S = 0.75
"""All of an operation, whatever redis-py retries: an admin call that meets a silent server answers within a second."""
READING_S = 0.05
CONNECTIONS = 16
"""At most: a server of one thread answers no faster over more. Further operations wait for one, within OPERATION_S."""
AGAIN_S = 0.5


class StoreUnavailable(Exception):
    """Redis did not take a write or give a reading. What was asked may be asked again."""


class Store:
    """Redis, or the embedded Valkey where no URL was given."""

    def __init__(self, url: str, embedded: EmbeddedValkey | None = None) -> None:
        self.url = url
        self.embedded = embedded
        self._silence = Silence(url)
        self._starting: asyncio.Task[None] | None = None
        pool = BlockingConnectionPool.from_url(
            url,
            timeout=None,
            decode_responses=True,
            encoding_errors="replace",  # a foreign writer's broken bytes must not break the connection
            socket_timeout=OPERATION_S,
            socket_connect_timeout=OPERATION_S,
            max_connections=CONNECTIONS,
            # For a pooled connection that went stale; our writes may be repeated.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionFailed,)),
        )
        self.client: Redis = Redis.from_pool(pool)

    @classmethod
    async def open(cls, settings: Settings) -> Store:
        """Connect, starting the embedded server if it is needed.

        Raises:
            StoreUnavailable: the embedded server cannot run here. A given URL is not tried yet: it may come up later.
        """
        if settings.redis_url:
            return cls(settings.redis_url)
        embedded = EmbeddedValkey(settings.data_dir)
        starting = asyncio.create_task(asyncio.to_thread(embedded.ensure))
        try:
            await asyncio.shield(starting)
        except EmbeddedStoreFailed as error:
            raise StoreUnavailable(str(error)) from error
        except asyncio.CancelledError:
            embedded.closing = True  # its thread goes on without us, and would start a server for nobody
            await to_its_end(_stopped(embedded, starting))
            raise
        return cls(f"unix://{quote(str(embedded.socket_path))}", embedded)

    @property
    def name(self) -> str:
        """Where it is, without any password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

    @asynccontextmanager
    async def asking(self, what: str) -> AsyncIterator[Redis]:
        """The client, for one operation. `what` completes "could not …".

        A server that was silent is not waited for a second time: until it answers a ping, all are refused at once.

        Raises:
            StoreUnavailable: in place of every failure of Redis.
        """
        if (silent_s := self._silence.seconds) is not None:
            raise StoreUnavailable(f"could not {what}: Redis at {self.name} has not answered for {silent_s:.1f} s")
        try:
            async with _within(OPERATION_S):
                yield self.client
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, NoAnswer | TimeoutError):
                self._silence.begin()
            reason = str(error) or type(error).__name__
            raise StoreUnavailable(f"could not {what}: Redis at {self.name} says {reason}") from error

    async def available(self) -> bool:
        try:
            async with self.asking("reach the store") as client:
                return bool(await _awaited(client.ping()))
        except StoreUnavailable:
            return False

    async def keep_up(self) -> None:
        """Start an embedded server again that does not answer.

        Raises:
            StoreUnavailable: it cannot be started.
        """
        if self.embedded is None:
            return
        self._starting = asyncio.create_task(asyncio.to_thread(self.embedded.ensure))
        try:
            await asyncio.shield(self._starting)
        except (EmbeddedStoreFailed, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def close(self) -> None:
        await self._silence.close()
        await self.client.aclose()
        if self.embedded is not None:
            self.embedded.closing = True
            if self._starting is not None:  # a thread ends when it likes; after us it would start a server for nobody
                await asyncio.wait({self._starting})
                _ = self._starting.exception()  # looked at, so that asyncio does not log it as forgotten
            await asyncio.to_thread(self.embedded.stop)


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout; but where this process itself was kept busy, what has arrived meanwhile is read first."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        ending = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + READING_S))
        try:
            yield
        finally:
            ending.cancel()


async def _stopped(embedded: EmbeddedValkey, starting: asyncio.Task[None]) -> None:
    await asyncio.wait({starting})
    _ = starting.exception()  # looked at, so that asyncio does not log it as forgotten
    await asyncio.to_thread(embedded.stop)


async def until_it_answers(operation: Callable[[], Awaitable[None]]) -> None:
    """Again and again while the store is away. Whoever cannot wait for ever ends us."""
    while True:
        try:
            return await operation()
        except StoreUnavailable:
            await asyncio.sleep(AGAIN_S)


async def _awaited(reply: Any) -> Any:
    # redis-py types one method for its blocking and its asyncio client: "Awaitable[T] | T".
    return await reply
