"""The one way to Redis: its connection, its time limits, and one error for all that can go wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import RedisError

from proxy.settings import Settings
from proxy.state.embedded import EmbeddedStoreFailed, EmbeddedValkey

ANSWER_S = 1.0
OPERATION_S = 1.2
"""All of an operation: a silent server is not asked again after the first ANSWER_S, whatever redis-py retries."""
CONNECTIONS = 32
AGAIN_S = 0.5


class StoreUnavailable(Exception):
    """Redis did not take a write or give a reading. What was asked may be asked again."""


class Store:
    """Redis, or the embedded Valkey where no URL was given."""

    def __init__(self, url: str, embedded: EmbeddedValkey | None = None) -> None:
        self.url = url
        self.embedded = embedded
        self.client: Redis = Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",  # a foreign writer's broken bytes must not break the connection
            socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S,
            max_connections=CONNECTIONS,
            # For a pooled connection that went stale; our writes may be repeated.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionFailed,)),
        )

    @classmethod
    async def open(cls, settings: Settings) -> Store:
        """Connect, starting the embedded server if it is needed.

        Raises:
            StoreUnavailable: the embedded server cannot run here. A given URL is not tried yet: it may come up later.
        """
        if settings.redis_url:
            return cls(settings.redis_url)
        embedded = EmbeddedValkey(settings.data_dir)
        try:
            await asyncio.to_thread(embedded.ensure)
        except EmbeddedStoreFailed as error:
            raise StoreUnavailable(str(error)) from error
        return cls(f"unix://{quote(str(embedded.socket_path))}", embedded)

    @property
    def name(self) -> str:
        """Where it is, without any password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

    @asynccontextmanager
    async def asking(self, what: str) -> AsyncIterator[Redis]:
        """The client, for one operation. `what` completes "could not …".

        Raises:
            StoreUnavailable: in place of every failure of Redis.
        """
        try:
            async with asyncio.timeout(OPERATION_S):
                yield self.client
        except (RedisError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise StoreUnavailable(f"could not {what}: Redis at {self.name} says {reason}") from error

    async def available(self) -> bool:
        try:
            async with self.asking("reach the store") as client:
                return bool(await _awaited(client.ping()))
        except StoreUnavailable:
            return False

    async def keep_up(self, *, answering: bool) -> None:
        """Take over an embedded server whose owner has gone; start it again if it is not answering.

        Raises:
            StoreUnavailable: it cannot be started.
        """
        if self.embedded is None:
            return
        try:
            if answering:
                self.embedded.take_ownership()
            else:
                await asyncio.to_thread(self.embedded.ensure)
        except EmbeddedStoreFailed as error:
            raise StoreUnavailable(str(error)) from error

    async def close(self) -> None:
        await self.client.aclose()
        if self.embedded is not None:
            await asyncio.to_thread(self.embedded.stop)


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
