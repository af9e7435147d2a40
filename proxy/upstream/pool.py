from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

import aiohappyeyeballs

from proxy.concurrency import FairQueue
from proxy.settings.outbound import DEFAULT_TRUST, Trust
from proxy.upstream.connection import HTTP11Connection, RemoteProtocolError

# How long a connection is kept after its last response.
KEEP_ALIVE_S = 30.0

SWEEP_INTERVAL_S = 1.0

DEFAULT_PORTS = {"http": 80, "https": 443}

# How long before the next address of a host is tried beside the first (RFC 8305).
HAPPY_EYEBALLS_DELAY_S = 0.25


class ProxyError(Exception):
    """The HTTP proxy did not open a tunnel."""


@dataclass(frozen=True)
class Origin:
    """Where a connection leads, and through which proxy. Connections of one origin are interchangeable."""

    host: str
    port: int
    tls: bool
    proxy: str | None = None
    trust: Trust = DEFAULT_TRUST
    """Which certificates are trusted."""


class ConnectionPool:
    """Keep-alive connections of one process, on one event loop, with a bound on how many are open."""

    def __init__(self, max_open: int, context: Callable[[Trust], ssl.SSLContext]) -> None:
        """
        Args:
            max_open: further callers wait for a slot.
            context: returns the TLS context for a trust; called when one is needed.
        """
        self._max_open = max_open
        self._context = context
        self._slots = FairQueue(max_open)
        # By origin, the newest last, each with the time at which it is closed.
        self._idle: dict[Origin, dict[HTTP11Connection, float]] = {}
        self._idle_count = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def acquire(self, origin: Origin, timeout_s: float) -> HTTP11Connection:
        """Return an idle connection, or open one. `release` or `discard` it.

        Raises:
            TimeoutError: it was not open in time.
            OSError, ProxyError: it cannot be opened.
        """
        if not self._slots.acquire_nowait():
            await self._slots.acquire()
        if (idle := self._pop_idle(origin)) is not None:
            return idle
        try:
            while self._slots.taken + self._idle_count > self._max_open and self._idle_count:
                self._close_oldest()
            async with asyncio.timeout(timeout_s):
                return await self._open(origin)
        except BaseException:
            self._slots.release()
            raise

    def _pop_idle(self, origin: Origin) -> HTTP11Connection | None:
        """Return the connection that was used last and still takes a request."""
        idle = self._idle.get(origin)
        while idle:
            connection, _ = idle.popitem()
            self._idle_count -= 1
            if connection.reusable and connection.is_quiet:
                return connection
            connection.close()
        return None

    def release(self, origin: Origin, connection: HTTP11Connection) -> None:
        """Keep the connection if it takes another request, else close it."""
        if self._closed or not connection.reusable:
            self.discard(connection)
            return
        connection.mark_idle()
        self._idle.setdefault(origin, {})[connection] = asyncio.get_running_loop().time() + KEEP_ALIVE_S
        self._idle_count += 1
        self._slots.release()
        if self._sweep_timer is None:
            self._sweep()

    def discard(self, connection: HTTP11Connection) -> None:
        connection.close()
        self._slots.release()

    async def aclose(self) -> None:
        """Close the idle connections. The others are closed by those who use them."""
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()
        self._idle_count = 0
        await asyncio.sleep(0)

    async def _open(self, origin: Origin) -> HTTP11Connection:
        if origin.proxy is None:
            tls = self._context(origin.trust) if origin.tls else None
            return await self._connect(origin.host, origin.port, tls)
        proxy = urlsplit(origin.proxy)
        tls = self._context(DEFAULT_TRUST) if proxy.scheme == "https" else None
        connection = await self._connect(proxy.hostname or "", port_of(proxy), tls)
        if origin.tls:
            try:
                await self._open_tunnel(connection, origin)
            except BaseException:
                connection.close()
                raise
        return connection

    async def _connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> HTTP11Connection:
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=1)
        _, connection = await loop.create_connection(
            lambda: HTTP11Connection(self._on_lost),
            sock=await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S),
            ssl=tls,
            server_hostname=host if tls else None,
        )
        return connection

    async def _open_tunnel(self, connection: HTTP11Connection, origin: Origin) -> None:
        """Ask the HTTP proxy for a tunnel to the origin, and start TLS in it. Raises ProxyError."""
        authority = authority_of(origin.host, origin.port)
        lines = [f"CONNECT {authority} HTTP/1.1", f"host: {authority}"]
        if authorization := basic_auth_of(origin.proxy or ""):
            lines.append(f"proxy-authorization: {authorization}")
        await connection.send(("\r\n".join(lines) + "\r\n").encode(), None)
        try:
            await connection.wait_for_head()
            if connection.status != 200:
                raise ProxyError(f"the HTTP proxy answered with status {connection.status}")
            await connection.secure(self._context(origin.trust), origin.host)
        except RemoteProtocolError as error:  # nothing has gone to the model yet
            raise ProxyError(f"the HTTP proxy answered otherwise than in HTTP: {error}") from error

    def _on_lost(self, connection: HTTP11Connection) -> None:
        for idle in self._idle.values():
            if idle.pop(connection, None) is not None:
                self._idle_count -= 1
                return

    def _close_oldest(self) -> None:
        idle = min((idle for idle in self._idle.values() if idle), key=lambda each: next(iter(each.values())))
        connection = next(iter(idle))
        del idle[connection]
        self._idle_count -= 1
        connection.close()

    def _sweep(self) -> None:
        """Close what has been idle for too long, and come back while anything is idle."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for origin, idle in list(self._idle.items()):
            for connection, until in list(idle.items()):
                if until > now:
                    break
                del idle[connection]
                self._idle_count -= 1
                connection.close()
            if not idle:
                del self._idle[origin]
        self._sweep_timer = loop.call_later(SWEEP_INTERVAL_S, self._sweep) if self._idle else None


def port_of(parts: SplitResult) -> int:
    return parts.port or DEFAULT_PORTS[parts.scheme]


def authority_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def basic_auth_of(url: str) -> str | None:
    """Return the user and password of an address as a header has them."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
