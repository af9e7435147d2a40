from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.concurrency import run_uncancelled
from proxy.settings.model_config import SettingsError
from proxy.settings.redis_address import RedisAddress

log = logging.getLogger("uniroute.store")

# How long one sentinel is waited for. The next is asked then.
SENTINEL_TIMEOUT_S = 0.2

# A subscription is silent for hours: a host that is gone ends it within half a minute.
KEEP_ALIVE: Final = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}

IS_CLUSTER = (
    "is a node of a Redis Cluster, which is not supported: changes touch keys of many slots at once."
    " Give a single server in redis_url, or sentinels (redis+sentinel://)"
)

IS_SENTINEL = "is a Sentinel, not a server: write redis+sentinel://HOST:PORT/SERVICE in redis_url"

IS_REPLICA = "is a replica, which takes no writes: give its primary in redis_url, or sentinels (redis+sentinel://)"


class UnsuitableServer(RedisError):
    """A server answers and is of a kind that cannot be used; the message completes "Redis at …"."""


class RedisServer:
    """Open pools of connections to the server of an address: TLS, sentinels, a check of what answers.

    One per store. Each pool is closed by its owner, and the connections to the sentinels by `close`.
    """

    def __init__(self, address: RedisAddress) -> None:
        """Raise SettingsError if a file of certificates cannot be used."""
        self.address = address
        self._tls = _tls_context(address) if address.tls else None
        self._sentinels = _Sentinels(self) if address.service is not None else None
        self._is_replica = False

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def has_sentinels(self) -> bool:
        return self._sentinels is not None

    def pool(self, **options: Any) -> BlockingConnectionPool:
        """Return a pool of connections to the server, or to the server that is the primary when each is opened.

        Args:
            options: redis-py's, of the pool and of its connections.
        """
        address = self.address
        kwargs = {
            "db": address.db,
            "username": address.username,
            "password": address.password,
            "redis_connect_func": self._greet,
            **options,
        }
        if address.path is not None:
            return BlockingConnectionPool(connection_class=UnixDomainSocketConnection, path=address.path, **kwargs)
        kwargs |= {"socket_keepalive": True, "socket_keepalive_options": KEEP_ALIVE}
        if self._tls is not None:
            kwargs["tls"] = self._tls
        if self._sentinels is not None and address.service is not None:
            kind: type[Connection] = _SentinelTlsConnection if self._tls else SentinelManagedConnection
            return SentinelPool(address.service, self._sentinels, connection_class=kind, **kwargs)
        host, port = address.hosts[0]
        kind = _TlsConnection if self._tls else Connection
        return BlockingConnectionPool(connection_class=kind, host=host, port=port, **kwargs)

    def sentinel_client(self, host: str, port: int) -> Redis:
        """Return a client of one sentinel."""
        kwargs: dict[str, Any] = {"tls": self._tls} if self._tls else {}
        pool = BlockingConnectionPool(
            connection_class=_TlsConnection if self._tls else Connection,
            host=host,
            port=port,
            username=self.address.sentinel_username,
            password=self.address.sentinel_password,
            socket_timeout=SENTINEL_TIMEOUT_S,
            socket_connect_timeout=SENTINEL_TIMEOUT_S,
            decode_responses=True,
            encoding_errors="replace",
            retry=Retry(NoBackoff(), 0),
            timeout=None,
            **kwargs,
        )
        return Redis.from_pool(pool)

    async def close(self) -> None:
        if self._sentinels is not None:
            await self._sentinels.aclose()

    async def _greet(self, connection: Any) -> None:
        """Check what answers on a new connection.

        Raises:
            UnsuitableServer: it cannot serve us.
            ConnectionFailed: it is no longer the primary, and the sentinels do not know that yet.
        """
        await connection.on_connect()
        await connection.send_command("HELLO", check_health=False)
        try:
            facts = _facts(await connection.read_response())
        except ResponseError:  # an old server, or a user that may not ask
            return
        if facts.get("mode") == "cluster":
            raise UnsuitableServer(IS_CLUSTER)
        if facts.get("mode") == "sentinel":
            raise UnsuitableServer(IS_SENTINEL)
        is_replica = facts.get("role") in ("replica", "slave")
        if is_replica and self.has_sentinels:
            raise ConnectionFailed("the primary that the sentinels name is a replica")
        if is_replica and not self._is_replica:
            log.warning("Redis at %s %s", self.name, IS_REPLICA)
        self._is_replica = is_replica


class _Sentinels:
    """Ask for the primary, as SentinelConnectionPool expects it: the sentinel that knew it last comes first."""

    def __init__(self, server: RedisServer) -> None:
        self._clients = [(server.sentinel_client(*host), host) for host in server.address.hosts]

    async def discover_master(self, service: str) -> tuple[str, int]:
        """Return the address of the primary. Raise ConnectionFailed, with what each sentinel says."""
        complaints = []
        for place, (client, (host, port)) in enumerate(self._clients):
            try:
                found = await _known(client, service)
            except (RedisError, OSError) as error:
                complaints.append(f"{host}:{port} says {_short(error)}")
                continue
            if found is None:
                complaints.append(f"{host}:{port} watches no {service!r}")
            elif found["is_sdown"] or found["is_odown"] or not found["is_master"]:
                complaints.append(f"{host}:{port} finds it down")
            else:
                self._clients.insert(0, self._clients.pop(place))
                return _address(found)
        raise ConnectionFailed(f"no sentinel knows a primary of {service!r}: {'; '.join(complaints)}")

    async def dispute(self, service: str, primary: tuple[str, int]) -> bool:
        """Return whether a sentinel names another primary, or is about to make one."""
        asked = [_known(client, service) for client, _ in self._clients]
        states = await asyncio.gather(*asked, return_exceptions=True)
        known = [state for state in states if isinstance(state, dict)]
        return any(_address(state) != primary or "failover_in_progress" in state["flags"] for state in known)

    async def aclose(self) -> None:
        for client, _ in self._clients:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()


class _TlsConnection(SSLConnection):
    """Use one context for all connections: redis-py would read the trusted certificates again for each."""

    def __init__(self, *, tls: ssl.SSLContext, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ssl_context.context = tls


class _SentinelTlsConnection(SentinelManagedConnection, _TlsConnection):
    pass


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary. Wait for one if all are in use, as the pool of a single server does."""

    def __init__(self, service: str, sentinels: _Sentinels, **options: Any) -> None:
        super().__init__(service, sentinels, **options)  # type: ignore[no-untyped-call]

    async def look(self) -> bool:
        """Ask the sentinels; return whether the primary has changed since last time, which ends old connections."""
        before = self.master_address
        with contextlib.suppress(RedisError, OSError):  # without sentinels we stay where we are
            await self.get_master_address()  # type: ignore[no-untyped-call]
        return before is not None and self.master_address != before

    async def is_disputed(self, primary: tuple[str, int] | None) -> bool:
        """Return whether what was just written to this primary may be undone."""
        if primary is None or self.master_address != primary:
            return True
        disputed: bool = await self.sentinel_manager.dispute(self.service_name, primary)
        return disputed

    async def release(self, connection: Any) -> None:
        """Take a connection back, and close it if it leads to a server that is no longer the primary."""
        if (connection.host, connection.port) != self.master_address:
            await connection.disconnect(nowait=True)
        await super().release(connection)


async def _known(client: Redis, service: str) -> dict[str, Any] | None:
    """Return what a sentinel says of the service; None if it watches none of that name."""
    known: Any = await client.sentinel_masters()
    state: dict[str, Any] | None = known.get(service)
    return state


def _address(state: Mapping[str, Any]) -> tuple[str, int]:
    return str(state["ip"]), int(state["port"])


def _facts(reply: Any) -> dict[str, str]:
    """Read the reply to HELLO: a map in RESP3, a list of names and values in RESP2."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[0::2], reply[1::2], strict=False)
    return {_text(name): _text(value) for name, value in pairs}


def _text(word: object) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)


def _short(error: Exception) -> str:
    return "nothing" if isinstance(error, NoAnswer) else str(error) or type(error).__name__


def _tls_context(address: RedisAddress) -> ssl.SSLContext:
    """Return a context that checks certificates and names, unless the URL says otherwise. Raise SettingsError."""
    try:
        # A file takes the place of the system's certificates.
        context = ssl.create_default_context(cafile=address.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"redis_ca_file: {address.ca_file} cannot be used: {error}") from None
    if address.cert_file is not None:
        try:
            context.load_cert_chain(address.cert_file, address.key_file)
        except (OSError, ssl.SSLError) as error:
            files = " and ".join(filter(None, (address.cert_file, address.key_file)))
            raise SettingsError(f"redis_cert_file, redis_key_file: {files} cannot be used: {error}") from None
    context.check_hostname = address.verify and address.check_hostname
    if not address.verify:
        context.verify_mode = ssl.CERT_NONE
        log.warning("whoever answers at %s is taken to be our Redis: ssl_cert_reqs=none", address.name)
    return context


# Gets a reply for each command, or the error that ended the connection before all had arrived.
OnReplies = Callable[[list[Any] | RedisError], None]

MAX_NESTING = 8


class PipelinedConnection(asyncio.Protocol):
    """Send commands, and get their replies in one call: a round trip without a task, a timer and a stream.

    The next commands may be sent after that.

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
                if reply is PUSHED:
                    continue
                if len(self._replies) == self._expected:
                    raise ValueError("a reply to nothing")
                self._replies.append(reply)
        except (ValueError, LookupError):
            self._end(ConnectionFailed("Redis sent what is no reply"))
            self._transport.abort()
            return
        self._unread = unread[place:]
        if self._expected and len(self._replies) == self._expected:
            replies, self._replies, self._expected = self._replies, [], 0
            self._on_replies(replies)

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
