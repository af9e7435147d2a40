from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

import aiohappyeyeballs

from proxy.concurrency import FairQueue
from proxy.outbound import USUAL, Trust
from proxy.upstream.connection import HTTP11Connection, RemoteProtocolError

KEPT_ALIVE_S = 30.0
"""A connection, after its last answer."""

SWEEP_S = 1.0

PORTS = {"http": 80, "https": 443}

_EYEBALLS_S = 0.25
"""Until the next address of a name is tried beside the first (RFC 8305)."""


class ProxyError(Exception):
    """The HTTP proxy on the way gave no way."""


@dataclass(frozen=True)
class Origin:
    """Who is at the other end, and by which proxy. Connections of one origin serve one another's requests."""

    host: str
    port: int
    tls: bool
    proxy: str | None = None
    trust: Trust = USUAL
    """Whose certificates count."""


class ConnectionPool:
    """One per process, on one event loop. To be closed."""

    def __init__(self, most: int, context: Callable[[Trust], ssl.SSLContext]) -> None:
        """
        Args:
            most: open at once; who comes then waits for a place.
            context: for TLS with such certificates; asked when one is needed.
        """
        self._most = most
        self._context = context
        self._idle: dict[Origin, dict[HTTP11Connection, float]] = {}
        """The newest last, each with the time at which it is given up."""
        self._idle_count = 0
        self._slots = FairQueue(most)
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed = False

    async def take(self, origin: Origin, within_s: float) -> HTTP11Connection:
        """A kept one, else a new one: for `give_back` or `drop`.

        Raises:
            TimeoutError: it was not there in time.
            OSError, ProxyRefused: it cannot be opened.
        """
        if not self._slots.acquire_nowait():
            await self._slots.acquire()
        if (kept := self._kept(origin)) is not None:
            return kept
        try:
            while self._slots.taken + self._idle_count > self._most and self._idle_count:
                self._drop_oldest()
            async with asyncio.timeout(within_s):
                return await self._opened(origin)
        except BaseException:
            self._slots.release()
            raise

    def _kept(self, origin: Origin) -> HTTP11Connection | None:
        """The one that was used last, if another request can still go over it."""
        idle = self._idle.get(origin)
        while idle:
            connection, _ = idle.popitem()
            self._idle_count -= 1
            if connection.reusable and connection.silent:
                return connection
            connection.close()
        return None

    def release(self, origin: Origin, connection: HTTP11Connection) -> None:
        """Kept, where another request can go over it."""
        if self._closed or not connection.reusable:
            self.drop(connection)
            return
        connection.rest()
        self._idle.setdefault(origin, {})[connection] = asyncio.get_running_loop().time() + KEPT_ALIVE_S
        self._idle_count += 1
        self._slots.release()
        if self._sweeping is None:
            self._sweep()

    def drop(self, connection: HTTP11Connection) -> None:
        connection.close()
        self._slots.release()

    async def aclose(self) -> None:
        """Those that are idle. The others are closed by whoever uses them."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()
        self._idle_count = 0
        await asyncio.sleep(0)

    async def _opened(self, origin: Origin) -> HTTP11Connection:
        if origin.proxy is None:
            tls = self._context(origin.trust) if origin.tls else None
            return await self._connected(origin.host, origin.port, tls)
        proxy = urlsplit(origin.proxy)
        tls = self._context(USUAL) if proxy.scheme == "https" else None
        connection = await self._connected(proxy.hostname or "", port_of(proxy), tls)
        if origin.tls:
            try:
                await self._tunnel(connection, origin)
            except BaseException:
                connection.close()
                raise
        return connection

    async def _connected(self, host: str, port: int, tls: ssl.SSLContext | None) -> HTTP11Connection:
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=1)
        _, connection = await loop.create_connection(
            lambda: HTTP11Connection(self._lost),
            sock=await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_EYEBALLS_S),
            ssl=tls,
            server_hostname=host if tls else None,
        )
        return connection

    async def _tunnel(self, connection: HTTP11Connection, origin: Origin) -> None:
        authority = authority_of(origin.host, origin.port)
        lines = [f"CONNECT {authority} HTTP/1.1", f"host: {authority}"]
        if credentials := credentials_of(origin.proxy or ""):
            lines.append(f"proxy-authorization: {credentials}")
        await connection.send(("\r\n".join(lines) + "\r\n").encode(), None)
        try:
            await connection.answered()
            if connection.status != 200:
                raise ProxyError(f"the HTTP proxy answered with status {connection.status}")
            await connection.secure(self._context(origin.trust), origin.host)
        except RemoteProtocolError as error:  # nothing has gone to the model yet
            raise ProxyError(f"the HTTP proxy answered otherwise than in HTTP: {error}") from error

    def _lost(self, connection: HTTP11Connection) -> None:
        for idle in self._idle.values():
            if idle.pop(connection, None) is not None:
                self._idle_count -= 1
                return

    def _drop_oldest(self) -> None:
        idle = min((idle for idle in self._idle.values() if idle), key=lambda each: next(iter(each.values())))
        connection = next(iter(idle))
        del idle[connection]
        self._idle_count -= 1
        connection.close()

    def _sweep(self) -> None:
        """Closes what was idle for too long, as long as anything is."""
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
        self._sweeping = loop.call_later(SWEEP_S, self._sweep) if self._idle else None


def port_of(parts: SplitResult) -> int:
    return parts.port or PORTS[parts.scheme]


def authority_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def credentials_of(url: str) -> str | None:
    """Those that an address holds, as a header has them."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
