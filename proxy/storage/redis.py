"""Commands in the bytes of Redis' protocol, and a round trip for many of them: a pipeline of redis-py at half the cost.

What makes a pipeline dear is done for every command: its options, its observation and a time limit of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final
from urllib.parse import quote

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.concurrency import cancel_and_wait, run_uncancelled
from proxy.settings.models import SettingsError
from proxy.settings.redis_address import RedisAddress
from proxy.settings.schema import Settings
from proxy.storage.redis_server import IS_REPLICA, RedisServer, SentinelPool, UnsuitableServer
from proxy.storage.valkey import EmbeddedStoreFailed, EmbeddedValkey
from router_core.errors import InvalidInput

VERSION: Final = "uniroute:version"

MODELS: Final = "uniroute:models"

PROFILES: Final = "uniroute:profiles"

PREVIOUS_PROFILES: Final = f"{PROFILES}:earlier"
"""The profile of a model on the map before, for processes that still use that map, or will again."""

KEYS: Final = "uniroute:keys"

PRICING: Final = "uniroute:pricing"
"""The channel on which whoever writes a price publishes the model's name; with `:<model>` the hash itself."""

CHANGED: Final = "uniroute:changed"
"""The channel on which every other change publishes the new version."""


def price_key(model: str) -> str:
    return f"{PRICING}:{model}"


MAX_CHARS: Final = 4_000_000
"""A profile of a map of a thousand clusters has some 200,000."""

MAX_DEPTH: Final = 100

MAX_WHOLE: Final = 2**53 - 1
"""Beyond, the numbers of Lua and of JSON's readers are no longer exact."""

LAST_TIME: Final = math.nextafter(1e11, 0)
"""Unix seconds: what is later is a mistake."""

_RARE = re.compile(r"\\u|\d{19}|[eE]\+?\d{3}", re.ASCII)
"""What half characters, infinite numbers and those of more than 64 bits are written with."""

_NUMERAL = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)


class InvalidRecord(InvalidInput):
    """A stored entry that is not what we write; the message says what is wrong with it."""


def json_object(text: str) -> dict[str, Any]:
    """Raises InvalidRecord."""
    if len(text) > MAX_CHARS:
        raise InvalidRecord(f"has {len(text)} characters; {MAX_CHARS} are read at most")
    try:
        stored = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(stored, MAX_DEPTH):
        raise InvalidRecord(f"is nested deeper than {MAX_DEPTH} levels")
    if _RARE.search(text):
        _check_can_be_sent(stored)
    return stored


def number(value: object, most: float = 1e15) -> float | None:
    """A number from 0 to `most`, stated as such or as text. None: it is nothing of the kind."""
    if isinstance(value, str) and len(value) < 100 and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        return None
    return float(value)


def whole_number(value: object, most: int = MAX_WHOLE) -> int | None:
    """A whole number from 0 to `most`, stated as such or as text. None: it is nothing of the kind."""
    found = number(value, most)
    return int(found) if found is not None and found.is_integer() else None


def is_unix_time(value: object) -> bool:
    return not isinstance(value, str) and number(value, LAST_TIME) is not None


def unix_time(value: Any) -> float:
    """Raises InvalidRecord."""
    if not is_unix_time(value):
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}"[:200])
    return float(value)


def _is_deeper(value: object, levels: int) -> bool:
    """Level by level, for recursion is what deep values are feared for."""
    level = [value]
    for _ in range(levels):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inner(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _inner(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_can_be_sent(stored: object) -> None:
    """Raises InvalidRecord: no upstream and no administrator could be sent it."""
    try:
        json.dumps(stored, allow_nan=False)
        orjson.dumps(stored)
    except (ValueError, TypeError) as error:
        raise InvalidRecord(f"holds what no JSON can be sent with: {error}") from error


def encode_command(words: Iterable[str]) -> bytes:
    """One command of these words: an array of bulk strings."""
    bulk = [b"$%d\r\n%b\r\n" % (len(data), data) for data in (word.encode("utf-8", "replace") for word in words)]
    return b"*%d\r\n" % len(bulk) + b"".join(bulk)


def load_script(package: str | None, *names: str, **constants: str | int) -> str:
    """Return one Lua script: `constants` as its locals, then the files `names` of `package`, without their `.lua`.

    Files that hold functions for others come first. Texts of `constants` are plain ASCII.
    """
    locals_ = [f"local {name} = {json.dumps(value)}\n" for name, value in constants.items()]
    folder = files(package or "")
    return "".join([*locals_, *(folder.joinpath(f"{name}.lua").read_text("utf-8") for name in names)])


async def pipeline(client: Redis, commands: Sequence[bytes]) -> list[Any]:
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


PING_S = 2.0
"""One ping waits this long: it is answered as soon as the server is, and few connections pile up in front of it."""

PROBE_INTERVAL_S = 0.25


class AvailabilityProbe:
    """Ends by itself. While it lasts nobody needs to wait for the server."""

    def __init__(self, server: RedisServer, before_its_end: Callable[[], Awaitable[None]]) -> None:
        self._server = server
        self._before_its_end = before_its_end
        self._since: float | None = None
        self._pinging: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float | None:
        """How long it has lasted; None: the server answers for all we know."""
        return None if self._since is None else time.monotonic() - self._since

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._pinging = asyncio.create_task(self._until_it_answers(), name="uniroute-ping")

    async def close(self) -> None:
        await cancel_and_wait(self._pinging)

    async def _until_it_answers(self) -> None:
        pool = self._server.pool(
            socket_timeout=PING_S, socket_connect_timeout=PING_S, retry=Retry(NoBackoff(), 0), timeout=None
        )
        client = Redis.from_pool(pool)
        try:
            while True:
                if await _answers(client):
                    await self._before_its_end()
                    return
                await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            self._since = None
            await client.aclose()


async def _answers(client: Redis) -> bool:
    """Also with an error, or by refusing the connection: whoever asks then need not wait to be told."""
    try:
        async with asyncio.timeout(PING_S):
            reply: Any = client.ping()  # typed for the blocking client too: "Awaitable[bool] | bool"
            await reply
    except (NoAnswer, TimeoutError):
        return False
    except (RedisError, OSError):
        return True
    return True


OPERATION_S = 0.75
"""All of an operation, whatever redis-py retries: an admin call that meets a silent server answers within a second."""

READING_S = 0.05

CONNECTIONS = 16
"""At most: a server of one thread answers no faster over more. Further operations wait for one, within OPERATION_S."""

RETRY_INTERVAL_S = 0.5

CONFIRMED_MS = 200
"""How long a replica is waited for, that has an administrator's change too."""

log = logging.getLogger("uniroute.store")


class StoreUnavailable(Exception):
    """Redis did not take a write or give a reading. What was asked may be asked again."""

    in_doubt = False
    """Whether a write may have been done although nobody said so."""


class StoreUnreadable(StoreUnavailable):
    """Redis answers, and holds something else than we would have written. Asking again changes nothing."""


class Store:
    """Redis, or the embedded Valkey where no URL was given."""

    def __init__(self, address: RedisAddress | str, embedded: EmbeddedValkey | None = None) -> None:
        """Raises SettingsError where a file of certificates cannot be used."""
        self.url = address
        self.server = RedisServer(RedisAddress.parse(address) if isinstance(address, str) else address)
        self.embedded = embedded
        self._silence = AvailabilityProbe(self.server, self._forget_idle_connections)
        self._starting: asyncio.Task[None] | None = None
        pool = self.server.pool(
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
            SettingsError: what answers at the given URL cannot be used. Where nothing answers, it may come up later.
            StoreUnavailable: the embedded server cannot run here.
        """
        if (address := settings.redis_address) is not None:
            store = cls(address)
            try:
                await store.check_kind()
            except SettingsError:
                await store.close()
                raise
            return store
        embedded = EmbeddedValkey(settings.data_dir)
        starting = asyncio.create_task(asyncio.to_thread(embedded.ensure))
        try:
            await asyncio.shield(starting)
        except EmbeddedStoreFailed as error:
            raise StoreUnavailable(str(error)) from error
        except asyncio.CancelledError:
            embedded.closing = True  # its thread goes on without us, and would start a server for nobody
            await run_uncancelled(_stopped(embedded, starting))
            raise
        return cls(f"unix://{quote(str(embedded.socket_path))}", embedded)

    @property
    def name(self) -> str:
        """Where it is, without any password."""
        return self.server.name

    async def check_kind(self) -> None:
        """Raises SettingsError: it answers, and is a Cluster, or a Sentinel that was given as the server."""
        try:
            async with self.asking("reach the store") as client:
                await _awaited(client.ping())
        except StoreUnavailable as error:
            if isinstance(error.__cause__, UnsuitableServer):
                raise SettingsError(f"redis_url: Redis at {self.name} {error.__cause__}") from None

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
            async with _timeout(OPERATION_S):
                yield self.client
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, NoAnswer | TimeoutError):
                self._silence.begin()
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> StoreUnavailable:
        kind = StoreUnreadable if _is_of_the_data(error) else StoreUnavailable
        failure = kind(f"could not {what}: Redis at {self.name} {_reason(error)}")
        heard = not isinstance(error, (ResponseError, UnsuitableServer)) and "connecting to" not in str(error)
        failure.in_doubt = heard and "no sentinel knows" not in str(error)
        return failure

    async def run_durably(self, what: str, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What a script answers that changes what must outlive a failover. Which script does not matter: it is sent.

        Where sentinels may make a replica the primary, a replica is waited for; if none confirms, the log says so.

        Raises:
            StoreUnavailable: the script may have been run all the same.
        """
        pool = self.client.connection_pool
        async with self.asking(what) as client:
            if not isinstance(pool, SentinelPool):
                return await _awaited(client.eval(script, len(keys), *keys, *arguments))
            await pool.look()
            primary = pool.master_address
            command = ["EVAL", script, str(len(keys)), *map(str, (*keys, *arguments))]
            # One connection for both: WAIT is for what its own connection wrote.
            answer, copies = await pipeline(
                client, [encode_command(command), encode_command(["WAIT", "1", str(CONFIRMED_MS)])]
            )
        if isinstance(answer, RedisError):
            raise self._failure(what, answer) from answer
        if copies != 0:  # also where this user may not ask
            return answer
        if await pool.is_disputed(primary):
            doubt = StoreUnavailable(f"could not {what}: the sentinels of {self.name} make another server the primary")
            doubt.in_doubt = True
            raise doubt
        log.warning("no replica has what was done to %s within %d ms: a failover would undo it", what, CONFIRMED_MS)
        return answer

    async def available(self) -> bool:
        try:
            async with self.asking("reach the store") as client:
                return bool(await _awaited(client.ping()))
        except StoreUnavailable:
            return False

    async def primary_moved(self) -> bool:
        """Whether the sentinels name another primary than before; to be asked again and again."""
        pool = self.client.connection_pool
        return isinstance(pool, SentinelPool) and await pool.look()

    async def ensure_running(self) -> None:
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
        await self.server.close()
        if self.embedded is not None:
            self.embedded.closing = True
            if self._starting is not None:  # a thread ends when it likes; after us it would start a server for nobody
                await asyncio.wait({self._starting})
                _ = self._starting.exception()  # looked at, so that asyncio does not log it as forgotten
            await asyncio.to_thread(self.embedded.stop)

    async def _forget_idle_connections(self) -> None:
        """After a silence they may lead to a server that is the primary no longer."""
        with contextlib.suppress(RedisError, OSError):
            await self.client.connection_pool.disconnect(inuse_connections=False)


def _reason(error: Exception) -> str:
    """What completes "Redis at …"."""
    if isinstance(error, UnsuitableServer):
        return str(error)
    said = f"says {str(error) or type(error).__name__}"
    return f"{said}: it {IS_REPLICA}" if isinstance(error, ReadOnlyError) else said


@asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
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


def _is_of_the_data(error: Exception) -> bool:
    """Whether it is what is stored that a command or a script cannot work with. Redis has one code for it and words."""
    words = str(error)
    odd = ("WRONGTYPE", "user_script:"), ("is not an integer", "is not a float", "is not a valid float")
    return type(error) is ResponseError and (words.startswith(odd[0]) or any(word in words for word in odd[1]))


async def retry_until_available(operation: Callable[[], Awaitable[None]]) -> None:
    """Again and again while the store is away. Whoever cannot wait for ever ends us. Raises StoreUnreadable."""
    while True:
        try:
            return await operation()
        except StoreUnreadable:
            raise
        except StoreUnavailable:
            await asyncio.sleep(RETRY_INTERVAL_S)


async def _awaited(reply: Any) -> Any:
    # redis-py types one method for its blocking and its asyncio client: "Awaitable[T] | T".
    return await reply
