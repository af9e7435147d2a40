"""The store: one Redis, or the embedded Valkey. Names of keys, Lua scripts, round trips, and whether it answers.

Commands are packed here, and a round trip for many of them costs half of what a pipeline of redis-py costs: that does
for every command what is needed once, its options, its observation and a time limit of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.concurrency import BackgroundTasks, StallTolerantTimer, run_uncancelled
from proxy.settings.model_config import SettingsError
from proxy.settings.redis_address import RedisAddress
from proxy.settings.schema import Settings
from proxy.storage.redis_connections import IS_REPLICA, RedisServer, SentinelPool, UnsuitableServer
from proxy.storage.valkey import EmbeddedStoreFailed, EmbeddedValkey

VERSION: Final = "uniroute:version"

MODELS: Final = "uniroute:models"

PROFILES: Final = "uniroute:profiles"

# The profile of a model on the map before, for processes that still use that map, or will again.
PREVIOUS_PROFILES: Final = f"{PROFILES}:earlier"

KEYS: Final = "uniroute:keys"

# Settings that are made while the server runs, in place of the configuration's.
SETTINGS: Final = "uniroute:settings"

# Model → since when it is paused.
PAUSED: Final = "uniroute:paused"

# Hash: model → id of its latest job.
LATEST_JOBS: Final = "uniroute:jobs:models"

# The channel on which the writer of a price publishes the model's name; with `:<model>` the hash itself.
PRICING: Final = "uniroute:pricing"

# The channel on which every other change publishes the new version.
CHANGED: Final = "uniroute:changed"


def price_key(model: str) -> str:
    return f"{PRICING}:{model}"


def load_script(package: str | None, *names: str, **constants: str | int) -> str:
    """Return one Lua script: `constants` as its locals, then the files `names` of `package`, without their `.lua`.

    Files whose functions the others use come first. Texts of `constants` are plain ASCII.
    """
    locals_ = [f"local {name} = {json.dumps(value)}\n" for name, value in constants.items()]
    folder = files(package or "")
    return "".join([*locals_, *(folder.joinpath(f"{name}.lua").read_text("utf-8") for name in names)])


def encode_command(words: Sequence[str]) -> bytes:
    """Return a command in Redis' protocol: an array of bulk strings."""
    text = "".join([f"${len(word)}\r\n{word}\r\n" for word in words])
    if text.isascii():
        return f"*{len(words)}\r\n{text}".encode()
    bulk = [b"$%d\r\n%b\r\n" % (len(data), data) for data in (word.encode("utf-8", "replace") for word in words)]
    return b"*%d\r\n" % len(bulk) + b"".join(bulk)


async def pipeline(client: Redis, commands: Sequence[bytes]) -> list[Any]:
    """Send encoded commands in one round trip; return the replies, with a ResponseError in the place of a failed one.

    As in a pipeline of redis-py that is no transaction, a pooled connection that went stale is tried again. There is
    no time limit: the caller has one for the whole. If that cuts it off, the connection is closed.

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


async def evaluate(client: Redis, script: AsyncScript, keys: Sequence[str], arguments: Sequence[str]) -> Any:
    """Run a registered script, and return its reply. Raise RedisError, OSError.

    A long list of arguments takes a quarter of the time that redis-py takes for it.
    """
    command = encode_command(("EVALSHA", script.sha, str(len(keys)), *keys, *arguments))
    (reply,) = await pipeline(client, [command])
    if isinstance(reply, NoScriptError):
        await client.script_load(script.script)
        (reply,) = await pipeline(client, [command])
    if isinstance(reply, RedisError):
        raise reply
    return reply


async def _exchange(connection: Any, commands: Sequence[bytes]) -> list[Any]:
    await connection.send_packed_command(list(commands))
    return [await _reply(connection) for _ in commands]


async def _reply(connection: Any) -> Any:
    try:
        return await connection.read_response(timeout=math.inf)
    except ResponseError as error:
        return error


# Between two attempts of what waits for the store.
RETRY_INTERVAL_S = 0.5


class Availability:
    """Keep whether the store answers within the time that one user of it has; log each change once.

    Users differ in what they can wait for: a store that takes 100 ms is available to the usage writer, and not to the
    limits of a request. So each user has its own, and all keep it in the same way.
    """

    def __init__(
        self,
        log: logging.Logger | None = None,
        *,
        back: str = "",
        known: bool = True,
        retry_interval_s: float = RETRY_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            log: gets a warning, the reason, when the store is lost, and `back` when it is there again.
            known: whether the store is taken to be available before it was asked.
            retry_interval_s: between two questions whether it answers again.
        """
        self.reason = ""  # why it is, or was last, unavailable
        self._log = log
        self._back = back
        self._retry_interval_s = retry_interval_s
        self._clock = clock
        self._lost_at = None if known else clock()
        self._logged_at: float | None = None

    @property
    def available(self) -> bool:
        return self._lost_at is None

    @property
    def unavailable_s(self) -> float | None:
        """Return for how long the store has been unavailable; None: it is available for all that is known."""
        return None if self._lost_at is None else self._clock() - self._lost_at

    def mark_unavailable(self, reason: str, *, log_interval_s: float = math.inf) -> None:
        """Note a failure. Log its reason if it is the first one, and again every `log_interval_s` while it lasts."""
        now = self._clock()
        if self._log and (self.available or self._logged_at is None or now - self._logged_at >= log_interval_s):
            self._log.warning("%s", reason)
            self._logged_at = now
        self.reason = reason
        self._lost_at = now if self._lost_at is None else self._lost_at

    def mark_available(self) -> None:
        if self._lost_at is not None and self._log and self._back:
            self._log.info("%s", self._back)
        self._lost_at = None

    async def poll(self, answers: Callable[[], Awaitable[bool]]) -> None:
        """Ask until the store answers, and mark it available."""
        while True:
            if await answers():
                return self.mark_available()
            await asyncio.sleep(self._retry_interval_s)


# A ping is answered as soon as the server is back, and few connections pile up in front of it.
PING_TIMEOUT_S = 2.0

PING_INTERVAL_S = 0.25

# All of an operation, with whatever redis-py retries: an admin call that meets a silent server answers within a second.
OPERATION_TIMEOUT_S = 0.75

# Its limit is counted in slices of this length.
SLICE_S = 0.05

# A server of one thread answers no faster over more. Further operations wait for one, within OPERATION_TIMEOUT_S.
MAX_CONNECTIONS = 16

# How long a replica may take to confirm an administrator's change.
REPLICA_TIMEOUT_MS = 200

log = logging.getLogger("uniroute.store")


class StoreUnavailable(Exception):
    """Redis did not take a write or give a reading. The operation may be repeated."""

    # Whether a write may have been done although no answer came.
    in_doubt = False


class StoreUnreadable(StoreUnavailable):
    """Redis answers, and holds something else than we would have written. Repeating changes nothing."""


class Store:
    """Run operations on Redis, or on the embedded Valkey where no URL is given."""

    def __init__(self, address: RedisAddress | str, embedded: EmbeddedValkey | None = None) -> None:
        """Raise SettingsError where a file of certificates cannot be used."""
        self.url = address
        self.server = RedisServer(RedisAddress.parse(address) if isinstance(address, str) else address)
        self.embedded = embedded
        self._availability = Availability(retry_interval_s=PING_INTERVAL_S)
        self._tasks = BackgroundTasks()
        self._starting: asyncio.Task[None] | None = None
        pool = self.server.pool(
            # To wait for a connection. redis-py's limits of a connection, 5 s, are for what runs outside an operation.
            timeout=None,
            decode_responses=True,
            encoding_errors="replace",  # a foreign writer's broken bytes must not break the connection
            max_connections=MAX_CONNECTIONS,
            # For a pooled connection that went stale; our writes may be repeated.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionFailed,)),
        )
        self.client: Redis = Redis.from_pool(pool)

    @classmethod
    async def open(cls, settings: Settings) -> Store:
        """Connect, and start the embedded server if it is needed.

        Raises:
            SettingsError: what answers at the given URL cannot be used. Where nothing answers, it may come up later.
            StoreUnavailable: the embedded server cannot run here.
        """
        if (address := settings.redis_address) is not None:
            try:
                return await cls._connected(address)
            except SettingsError as error:
                raise settings.refusal(str(error)) from None
        embedded = EmbeddedValkey(settings.data_dir)
        starting = asyncio.create_task(asyncio.to_thread(embedded.ensure))
        try:
            await asyncio.shield(starting)
        except EmbeddedStoreFailed as error:
            raise StoreUnavailable(str(error)) from error
        except asyncio.CancelledError:
            embedded.closing = True  # its thread goes on without us, and would start a server that nothing uses
            await run_uncancelled(_stopped(embedded, starting))
            raise
        return cls(f"unix://{quote(str(embedded.socket_path))}", embedded)

    @classmethod
    async def _connected(cls, address: RedisAddress) -> Store:
        """Raises SettingsError: what answers cannot be used, or a file of certificates."""
        store = cls(address)
        try:
            await store.check_kind()
        except SettingsError:
            await store.close()
            raise
        return store

    @property
    def name(self) -> str:
        """Return where it is, without a password."""
        return self.server.name

    @property
    def is_silent(self) -> bool:
        """Whether an operation got no answer in time, and the server has not answered since."""
        return not self._availability.available

    async def check_kind(self) -> None:
        """Raise SettingsError if a Cluster answers, or a Sentinel that was given as the server."""
        try:
            async with self.operation("reach the store") as client:
                await awaited(client.ping())
        except StoreUnavailable as error:
            if isinstance(error.__cause__, UnsuitableServer):
                raise SettingsError(f"redis_url: Redis at {self.name} {error.__cause__}") from None

    @asynccontextmanager
    async def operation(self, what: str) -> AsyncIterator[Redis]:
        """Give the client for one operation, with a time limit. `what` completes "could not …".

        After a timeout all operations fail at once until the server answers a ping.

        Raises:
            StoreUnavailable: in place of every failure of Redis.
        """
        if (silent_s := self._availability.unavailable_s) is not None:
            raise StoreUnavailable(f"could not {what}: Redis at {self.name} has not answered for {silent_s:.1f} s")
        try:
            async with _timeout(OPERATION_TIMEOUT_S):
                yield self.client
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, NoAnswer | TimeoutError) and self._availability.available:
                self._availability.mark_unavailable(str(error))
                self._tasks.start("uniroute-ping", self._ping_until_available, restart=False)
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> StoreUnavailable:
        kind = StoreUnreadable if _is_of_the_data(error) else StoreUnavailable
        failure = kind(f"could not {what}: Redis at {self.name} {_reason(error)}")
        heard = not isinstance(error, (ResponseError, UnsuitableServer)) and "connecting to" not in str(error)
        failure.in_doubt = heard and "no sentinel knows" not in str(error)
        return failure

    async def run_durably(self, what: str, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script whose change must outlive a failover, and return its answer. The script itself is sent.

        Where sentinels may make a replica the primary, wait for a replica; if none confirms, the log says so.

        Raises:
            StoreUnavailable: the script may have been run all the same.
        """
        pool = self.client.connection_pool
        async with self.operation(what) as client:
            if not isinstance(pool, SentinelPool):
                return await awaited(client.eval(script, len(keys), *keys, *arguments))
            await pool.look()
            primary = pool.master_address
            command = ["EVAL", script, str(len(keys)), *map(str, (*keys, *arguments))]
            # One connection for both: WAIT is for what its own connection wrote.
            answer, copies = await pipeline(
                client, [encode_command(command), encode_command(["WAIT", "1", str(REPLICA_TIMEOUT_MS)])]
            )
        if isinstance(answer, RedisError):
            raise self._failure(what, answer) from answer
        if copies != 0:  # also where this user may not ask
            return answer
        if await pool.is_disputed(primary):
            doubt = StoreUnavailable(f"could not {what}: the sentinels of {self.name} make another server the primary")
            doubt.in_doubt = True
            raise doubt
        log.warning(
            "no replica has what was done to %s within %d ms: a failover would undo it", what, REPLICA_TIMEOUT_MS
        )
        return answer

    async def available(self) -> bool:
        """Ask the server."""
        try:
            async with self.operation("reach the store") as client:
                return bool(await awaited(client.ping()))
        except StoreUnavailable:
            return False

    async def primary_moved(self) -> bool:
        """Return whether the sentinels name another primary than before; to be asked repeatedly."""
        pool = self.client.connection_pool
        return isinstance(pool, SentinelPool) and await pool.look()

    async def ensure_running(self) -> None:
        """Restart an embedded server that does not answer.

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
        await self._tasks.close()
        await self.client.aclose()
        await self.server.close()
        if self.embedded is not None:
            self.embedded.closing = True
            if self._starting is not None:  # its thread cannot be ended, and would start a server after us
                await asyncio.wait({self._starting})
                _ = self._starting.exception()  # mark as retrieved
            await asyncio.to_thread(self.embedded.stop)

    async def _ping_until_available(self) -> None:
        pool = self.server.pool(
            socket_timeout=PING_TIMEOUT_S,
            socket_connect_timeout=PING_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            timeout=None,
        )
        client = Redis.from_pool(pool)

        async def answers() -> bool:
            if not await _answers(client):
                return False
            # Idle connections may lead to a server that is no longer the primary.
            with contextlib.suppress(RedisError, OSError):
                await self.client.connection_pool.disconnect(inuse_connections=False)
            return True

        try:
            await self._availability.poll(answers)
        finally:
            self._availability.mark_available()
            await client.aclose()


async def _answers(client: Redis) -> bool:
    """Return whether the server says anything: an error, or a refused connection, needs no waiting either."""
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await awaited(client.ping())
    except (NoAnswer, TimeoutError):
        return False
    except (RedisError, OSError):
        return True
    return True


def _reason(error: Exception) -> str:
    """Complete "Redis at …"."""
    if isinstance(error, UnsuitableServer):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"did not answer within {OPERATION_TIMEOUT_S:g} s"
    said = f"says {str(error) or type(error).__name__}"
    return f"{said}: it {IS_REPLICA}" if isinstance(error, ReadOnlyError) else said


@asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """Limit the time as asyncio.timeout does, but do not count that in which this process was kept busy."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = StallTolerantTimer(seconds, SLICE_S, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            timer.cancel()


async def _stopped(embedded: EmbeddedValkey, starting: asyncio.Task[None]) -> None:
    await asyncio.wait({starting})
    _ = starting.exception()  # mark as retrieved
    await asyncio.to_thread(embedded.stop)


def _is_of_the_data(error: Exception) -> bool:
    """Return whether a command or a script cannot work with what is stored. Redis has one code for that and words."""
    words = str(error)
    odd = ("WRONGTYPE", "user_script:"), ("is not an integer", "is not a float", "is not a valid float")
    return type(error) is ResponseError and (words.startswith(odd[0]) or any(word in words for word in odd[1]))


async def retry_until_available(operation: Callable[[], Awaitable[None]]) -> None:
    """Repeat an operation until the store takes it; the caller may cancel this. Raise StoreUnreadable."""
    while True:
        try:
            return await operation()
        except StoreUnreadable:
            raise
        except StoreUnavailable:
            await asyncio.sleep(RETRY_INTERVAL_S)


async def awaited(reply: Any) -> Any:
    """Await a reply that redis-py types for its blocking client too, as "Awaitable[T] | T"."""
    return await reply
