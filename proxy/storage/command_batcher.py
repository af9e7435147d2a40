from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.exceptions import NoScriptError, ReadOnlyError, RedisError

from proxy.concurrency import BackgroundTasks, StallTolerantTimer, cancel_and_wait
from proxy.storage.redis import Availability, Store, StoreUnavailable, encode_command
from proxy.storage.redis_connections import PipelinedConnection

# The limit of a round trip is counted in slices of this length.
SLICE_S = 0.01

RETRY_INTERVAL_S = 1.0

# Calls of one round trip. Redis runs all of them before it answers the first: more would look like a silence.
MAX_BATCH_SIZE = 32


class StoreUnavailableNow(StoreUnavailable):
    """Redis was silent a moment ago. Nothing was sent to it."""


@dataclass(slots=True, eq=False)
class PendingCall:
    what: str
    command: bytes
    answer: asyncio.Future[Any]
    on_abandoned: Callable[[], None]

    def end(self, outcome: Any) -> None:
        """Hand over the answer, or the error, unless the caller was cancelled meanwhile."""
        if self.answer.done():
            self.on_abandoned()
        elif isinstance(outcome, StoreUnavailable):
            self.answer.set_exception(outcome)
        elif isinstance(outcome, RedisError):
            error = StoreUnavailable(f"could not {self.what}: Redis says {outcome}")
            error.__cause__ = outcome
            self.answer.set_exception(error)
        else:
            self.answer.set_result(outcome)


def _nobody() -> None:
    """Take notice of an answer that nobody waits for."""


class CommandBatcher:
    """Send commands over one connection, in one round trip what is called within a turn of the event loop.

    One round trip is on its way at a time; what is called meanwhile goes with the next. For requests, which may wait
    for Redis only so long.
    """

    def __init__(self, store: Store, what: str, timeout_s: float, scripts: Collection[str] = ()) -> None:
        """
        Args:
            what: completes "could not …".
            scripts: those that `call_script` calls.
        """
        self._store = store
        self._what = what
        self._timeout_s = timeout_s
        self._digests = {script: store.client.register_script(script).sha for script in scripts}
        self._waiting: deque[PendingCall] = deque()
        self._availability = Availability(retry_interval_s=RETRY_INTERVAL_S)
        self._connection: PipelinedConnection | None = None
        self._tasks = BackgroundTasks()
        self._closed = False
        # Of the round trip that is on its way.
        self._busy = False
        self._batch: list[PendingCall] = []
        self._commands = b""
        self._sent_again = False
        self._timer: StallTolerantTimer | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Return False from the first silence of Redis until it answers again."""
        return self._availability.available

    def call_script(
        self, script: str, key: str, arguments: Sequence[str], on_abandoned: Callable[[], None] = _nobody
    ) -> asyncio.Future[Any]:
        """Call one of the scripts, as `call` does."""
        return self.call(("EVALSHA", self._digests[script], "1", key, *arguments), on_abandoned)

    def call(self, words: Sequence[str], on_abandoned: Callable[[], None] = _nobody) -> asyncio.Future[Any]:
        """Send a command. It is sent, once it is passed here, even if the future is cancelled.

        Args:
            on_abandoned: is called after its reply, or after its failure, if the future was cancelled.

        Raises:
            StoreUnavailableNow: at once, after a silence, until Redis answers again.
            StoreUnavailable: by the future: an error instead of an answer, or none in time. It may have been run.
        """
        if self._closed or not self._availability.available:
            raise StoreUnavailableNow(self._closing if self._closed else self._availability.reason)
        loop = asyncio.get_running_loop()
        call = PendingCall(self._what, encode_command(words), loop.create_future(), on_abandoned)
        self._waiting.append(call)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._send_batch)
        return call.answer

    @property
    def _closing(self) -> str:
        return f"could not {self._what}: the server is shutting down"

    async def close(self) -> None:
        """Stop. Calls that have no answer yet fail."""
        self._closed = True
        self._fail(StoreUnavailable(self._closing), StoreUnavailableNow(self._closing))
        await cancel_and_wait(self._opening)
        await self._tasks.close()
        if self._connection is not None:
            await self._connection.dispose()
            self._connection = None

    def _send_batch(self) -> None:
        waiting = self._waiting
        if not waiting:
            self._busy = False
            return
        self._batch = [waiting.popleft() for _ in range(min(MAX_BATCH_SIZE, len(waiting)))]
        self._commands = b"".join([call.command for call in self._batch])
        self._sent_again = False
        self._timer = StallTolerantTimer(self._timeout_s, SLICE_S, self._end_silence)
        connection = self._connection
        if connection is not None and connection.is_open and not self._store.is_silent:
            connection.send(self._commands, len(self._batch), self._receive)
        else:
            self._send_anew()

    def _receive(self, replies: list[Any] | RedisError) -> None:
        if self._is_to_be_sent_again(replies):
            self._sent_again = True
            self._send_anew()
            return
        if isinstance(replies, RedisError):
            error = StoreUnavailable(f"could not {self._what}: Redis at {self._store.name} says {replies}")
            error.__cause__ = replies
            self._give_up(error)
            return
        batch = self._end_batch()
        for call, reply in zip(batch, replies, strict=True):
            call.end(reply)
        self._send_batch()

    def _is_to_be_sent_again(self, replies: list[Any] | RedisError) -> bool:
        """Whether a new connection may help: the scripts may be run twice. A script is loaded with each connection."""
        if isinstance(replies, RedisError):
            return not self._sent_again
        for reply in replies:
            if isinstance(reply, NoScriptError):
                return True
            if isinstance(reply, ReadOnlyError) and self._connection is not None and self._connection.has_sentinels:
                return not self._sent_again
        return False

    def _send_anew(self) -> None:
        """Send the batch over a new connection."""
        self._opening = asyncio.create_task(self._open_and_send(), name="uniroute-batch-opening")

    async def _open_and_send(self) -> None:
        former, self._connection = self._connection, None
        try:
            if former is not None:
                await former.dispose()
            async with self._store.operation(self._what) as client:
                connection = await PipelinedConnection.open(client)
                try:
                    await self._load_scripts(connection)
                except BaseException:
                    await connection.dispose()
                    raise
        except StoreUnavailable as error:
            self._give_up(error)
            return
        self._connection = connection
        connection.send(self._commands, len(self._batch), self._receive)

    async def _load_scripts(self, connection: PipelinedConnection) -> None:
        """Raise RedisError."""
        if not self._digests:
            return
        loaded: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        commands = [encode_command(("SCRIPT", "LOAD", script)) for script in self._digests]
        connection.send(b"".join(commands), len(commands), partial(_set_if_pending, loaded))
        replies = await loaded
        for reply in [replies] if isinstance(replies, RedisError) else replies:
            if isinstance(reply, RedisError):
                raise reply

    def _end_silence(self) -> None:
        waited = f"{self._timeout_s * 1000:.0f} ms"
        self._give_up(
            StoreUnavailable(f"could not {self._what}: Redis at {self._store.name} did not answer within {waited}")
        )

    def _give_up(self, error: StoreUnavailable) -> None:
        """Fail what is on its way and what waits, and ask until Redis answers again."""
        if self._opening is not None and self._opening is not asyncio.current_task():
            self._opening.cancel()
        if self._connection is not None:
            self._connection.abort()  # a late answer would be taken for another's
        self._availability.mark_unavailable(str(error))
        self._fail(error, StoreUnavailableNow(str(error)))
        if self._closed:
            return
        poll = partial(self._availability.poll, self._answers_in_time)
        self._tasks.start("uniroute-batch-listening", poll, restart=False)

    def _end_batch(self) -> list[PendingCall]:
        if self._timer is not None:
            self._timer.cancel()
        batch, self._batch = self._batch, []
        return batch

    def _fail(self, error: StoreUnavailable, unsent: StoreUnavailableNow) -> None:
        for call in self._end_batch():
            call.end(error)
        while self._waiting:
            self._waiting.popleft().end(unsent)
        self._busy = False

    async def _answers_in_time(self) -> bool:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        return await self._store.available() and loop.time() - asked_at <= self._timeout_s


def _set_if_pending(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        future.set_result(outcome)
