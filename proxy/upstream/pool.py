"""Connections to upstreams: the pool that keeps them, and then one HTTP/1.1 connection."""

from __future__ import annotations

import asyncio
import base64
import select
import ssl
import zlib
from collections import deque
from collections.abc import AsyncIterable, Callable, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

import aiohappyeyeballs
import httptools

from proxy.concurrency import FairQueue
from proxy.settings.outbound import DEFAULT_TRUST, Trust

# How long a connection is kept after its last response.
KEEP_ALIVE_S = 30.0

SWEEP_INTERVAL_S = 1.0

DEFAULT_PORTS = {"http": 80, "https": 443}

# How long to wait for one address of a host before the next is tried at the same time (RFC 8305).
HAPPY_EYEBALLS_DELAY_S = 0.25


class ConnectionClosed(ConnectionError):
    """The connection was closed before the head of a response."""


class IncompleteResponse(ConnectionError):
    """The connection was closed in the middle of a response."""


class RemoteProtocolError(Exception):
    """The upstream sent something other than a response in HTTP/1.x, or one that exceeds the limits."""


class ProxyError(Exception):
    """The HTTP proxy did not open a tunnel."""


class PoolTimeout(TimeoutError):
    """No slot became free in time."""


# How a connection may fail in the middle of a response.
READ_ERRORS = (ConnectionClosed, IncompleteResponse, RemoteProtocolError, OSError)


class Origin(NamedTuple):
    """What a connection connects to, and through which proxy. Connections of one origin are interchangeable."""

    host: str
    port: int
    tls: bool
    proxy: str | None = None
    trust: Trust = DEFAULT_TRUST
    """Which certificates are trusted."""


class BodySink(Protocol):
    """What takes the body of a response as it arrives."""

    def on_data(self, piece: bytes) -> None:
        """Take what has arrived: at least one byte, and never more after the connection was told to hold."""

    def on_end(self, error: Exception | None) -> None:
        """Note the end of the body. `error`: one of READ_ERRORS, if it broke off."""


class ConnectionPool:
    """Keep-alive connections of one process, on one event loop, with a bound on how many are open."""

    def __init__(self, max_open: int, context: Callable[[Trust], ssl.SSLContext]) -> None:
        """
        Args:
            max_open: further callers wait for a slot.
            context: returns the TLS context for a `Trust`.
        """
        self._max_open = max_open
        self._context = context
        self._slots = FairQueue(max_open)
        # By origin, the last used at the end, each with the time (of the event loop) at which it is closed.
        self._idle: dict[Origin, dict[HTTP11Connection, float]] = {}
        self._idle_count = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._draining: set[_Drain] = set()
        self._closed = False

    async def acquire(
        self, origin: Origin, timeout_s: float | None, *, wait_s: float | None = None
    ) -> HTTP11Connection:
        """Return an idle connection, or open one. Give it back by `release` or `discard`.

        Args:
            timeout_s: to open it.
            wait_s: for a free slot. None, for either: without limit.

        Raises:
            PoolTimeout: no slot became free in time.
            TimeoutError: it could not be opened in time.
            OSError, ProxyError: it cannot be opened.
        """
        if not self._slots.acquire_nowait():
            await self._wait_for_slot(wait_s)
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

    def acquire_idle(self, origin: Origin) -> HTTP11Connection | None:
        """Return an idle connection that can be used at once, to be given back as by `acquire`; None: there is none."""
        if not self._slots.acquire_nowait():
            return None
        idle = self._pop_idle(origin)
        if idle is None:
            self._slots.release()
        return idle

    async def _wait_for_slot(self, wait_s: float | None) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise PoolTimeout(f"all {self._max_open} connections to models were in use for {wait_s:g} s") from None

    def _pop_idle(self, origin: Origin) -> HTTP11Connection | None:
        """Return the idle connection that was used last and can still be used; None: there is none."""
        idle = self._idle.get(origin)
        while idle:
            connection, _ = idle.popitem()
            self._idle_count -= 1
            if connection.reusable and connection.is_quiet:
                return connection
            connection.close()
        return None

    def release(self, origin: Origin, connection: HTTP11Connection) -> None:
        """Keep the connection if another request can use it, else close it."""
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

    def drain(self, response: UpstreamResponse) -> None:
        """Give back the connection of a response whose answer has ended, once the end of its body has come too."""
        if response.ended:
            response.close()
        else:
            _Drain(response, self._draining).start()

    async def aclose(self) -> None:
        """Close the idle connections. Those in use are closed when they are released."""
        self._closed = True
        for drain in tuple(self._draining):
            drain.on_end(None)
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
        except RemoteProtocolError as error:  # a failure of the proxy: nothing was sent to the model yet
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
        """Close connections that have been idle for too long, and sweep again while any are idle."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for origin, idle in list(self._idle.items()):
            for connection, closes_at in list(idle.items()):
                if closes_at > now:
                    break
                del idle[connection]
                self._idle_count -= 1
                connection.close()
            if not idle:
                del self._idle[origin]
        self._sweep_timer = loop.call_later(SWEEP_INTERVAL_S, self._sweep) if self._idle else None


# How long the end of a body is waited for after its answer, to use the connection again.
DRAIN_TIMEOUT_S = 1.0


class UpstreamResponse:
    """The response to a request on a connection of the pool, until the connection is given back."""

    __slots__ = ("_connection", "_origin", "_pool", "headers", "read", "status")

    def __init__(self, pool: ConnectionPool, origin: Origin, connection: HTTP11Connection) -> None:
        """To be made before the request is sent."""
        self._pool = pool
        self._origin = origin
        self._connection: HTTP11Connection | None = connection
        self.read = connection.read
        # Both are set by `receive_head`.
        self.status = 0
        self.headers: Mapping[str, str] = {}

    async def receive_head(self, timeout_s: float | None = None) -> None:
        """Wait for status and headers. Raises as `HTTP11Connection.wait_for_head`."""
        connection = self._connection
        if connection is None:
            raise ConnectionClosed("the connection was closed")
        await connection.wait_for_head(timeout_s)
        self.status, self.headers = connection.status or 0, connection.headers

    @property
    def ended(self) -> bool:
        return self._connection is None or self._connection.ended

    def take_whole(self) -> bytes | None:
        """Return the whole body and close the response; None, and do neither, while more is to come or to unpack."""
        connection = self._connection
        if connection is None or not connection.ended or (body := connection.take_whole()) is None:
            return None
        self.close()
        return body

    def feed(self, sink: BodySink) -> None:
        """Give the body to `sink` as it arrives, in place of `read`. Do nothing if the connection was given back."""
        if self._connection is not None:
            self._connection.feed(sink)

    def hold(self) -> None:
        """Give the sink nothing more, until `feed` is called again."""
        if self._connection is not None:
            self._connection.hold()

    def close(self) -> None:
        """Keep the connection if the response has ended, else close it. May be called again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.hold()
            self._pool.release(self._origin, connection)

    def finish(self) -> None:
        """Give the connection back after the end of the answer, which may come before that of the body."""
        self._pool.drain(self)


class _Drain:
    """Read a body to its end, which is all that is still to come, and give the connection back."""

    __slots__ = ("_others", "_response", "_timer")

    def __init__(self, response: UpstreamResponse, others: set[_Drain]) -> None:
        """`others`: all that are under way."""
        self._response = response
        self._others = others
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._others.add(self)
        self._timer = asyncio.get_running_loop().call_later(DRAIN_TIMEOUT_S, self.on_end, None)
        self._response.feed(self)

    def on_data(self, piece: bytes) -> None:
        pass

    def on_end(self, error: Exception | None) -> None:  # noqa: ARG002  an answer that has ended cannot fail
        self._others.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._response.close()


def port_of(parts: SplitResult) -> int:
    return parts.port or DEFAULT_PORTS[parts.scheme]


def authority_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def basic_auth_of(url: str) -> str | None:
    """Return the user and password of an address as the value of an authorization header; None: it has none."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


# Of one response header. Servers behind gateways send policies or cookies of many kilobytes.
MAX_HEADER_VALUE_BYTES = 64 * 2**10

# Bytes that may come before, between or after pieces of the body: a head, early hints, sizes of chunks, trailers.
MAX_HEAD_BYTES = 256 * 2**10

# How much of a body may wait for its reader, before reading from the upstream is paused.
MAX_UNREAD_BYTES = 256 * 2**10

# A compressed body is decompressed in pieces of this size, so that a small one that becomes a large one is never held.
DECOMPRESSED_PIECE_BYTES = 256 * 2**10

# A larger request body is written in pieces of this size, so that other tasks get a turn.
WRITE_BYTES = 256 * 2**10


class HTTP11Connection(asyncio.Protocol):
    """One connection to an upstream, used by one request at a time.

    For each request call `send` or `send_stream`, `wait_for_head`, then `read` until it returns no bytes, or `feed`
    until the sink is told the end. Then send the next request, or call `close`. A `timeout_s` is for each time that
    bytes are waited for, and raises TimeoutError.
    """

    def __init__(self, on_lost: Callable[[HTTP11Connection], None] = lambda _: None) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._incoming = select.poll()
        self._waiter: asyncio.Future[None] | None = None
        self._lost = self._writing_paused = self._reading_paused = self._request_incomplete = False
        self._start_request()
        self._in_use = False

    def _start_request(self, *, expects_body: bool = True) -> None:
        self._in_use = True
        self._expects_body = expects_body
        # None until the head of the response has arrived.
        self.status: int | None = None
        # The words after the status.
        self.reason = b""
        self.raw_headers: list[tuple[bytes, bytes]] = []
        # Names in lower case; the last value of a repeated one.
        self.headers: dict[str, str] = {}
        # Whether all of the response has arrived. Some of it may still be unread.
        self.ended = False
        self._keep_alive = False
        self._bytes_since_body = 0
        self._pieces: deque[bytes] = deque()
        self._unread = 0
        # What takes the body as it arrives; None: it waits for `read`.
        self._sink: BodySink | None = None
        self._error: Exception | None = None
        self._decompressor: Decompressor | None = None
        # What the decompressor has not taken yet.
        self._compressed = b""
        # Whether the decompressor may give more without taking more.
        self._more_plain = False
        # Compressed bytes since the last plain one.
        self._bytes_since_plain = 0
        self._body_started = False

    async def send(
        self, head: bytes, body: bytes | None, timeout_s: float | None = None, *, expects_body: bool = True
    ) -> None:
        """Send a request; the length of the body is added to `head`. Errors are raised by `wait_for_head`.

        Args:
            expects_body: False for HEAD, to which no response has a body, whatever its head says.
        """
        self._start_request(expects_body=expects_body)
        if body is None:
            self._transport.write(head + b"\r\n")
            return
        head = b"%bcontent-length: %d\r\n\r\n" % (head, len(body))
        if len(body) <= WRITE_BYTES:
            self._transport.write(head + body)
            return
        self._transport.write(head)
        for start in range(0, len(body), WRITE_BYTES):
            if not await self._write(body[start : start + WRITE_BYTES], timeout_s):
                return
            await asyncio.sleep(0)

    async def send_stream(self, head: bytes, pieces: AsyncIterable[bytes], timeout_s: float | None = None) -> None:
        """Send a request with a body of unknown length, piece by piece. Errors are raised by `wait_for_head`."""
        self._start_request()
        self._request_incomplete = True
        self._transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
        async for piece in pieces:
            for start in range(0, len(piece), WRITE_BYTES):
                part = piece[start : start + WRITE_BYTES]
                if not await self._write(b"%x\r\n%b\r\n" % (len(part), part), timeout_s):
                    return
        self._request_incomplete = not await self._write(b"0\r\n\r\n", timeout_s)

    async def _write(self, data: bytes, timeout_s: float | None) -> bool:
        """Write when the transport takes more. Return False if the upstream has answered: it will not read the rest."""
        while self._writing_paused and not self._responded:
            await self._wait(timeout_s)
        if self._responded:
            self._request_incomplete = True
            return False
        self._transport.write(data)
        return True

    async def wait_for_head(self, timeout_s: float | None = None) -> None:
        """Wait until `status` and `headers` are set. Raises ConnectionClosed or RemoteProtocolError."""
        while self.status is None:
            if self._error is not None:
                raise self._error
            await self._wait(timeout_s)

    async def read(self, timeout_s: float | None = None) -> bytes:
        """Return what has arrived of the body, at least one byte; no bytes at its end.

        A body that starts compressed, though it was asked for plain, is returned plain.

        Raises:
            IncompleteResponse, RemoteProtocolError: the rest cannot be read.
        """
        while not (data := self._take()):
            if self.ended:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait(timeout_s)
        return data

    def take_whole(self) -> bytes | None:
        """Return all of the body of a response that has ended and is not compressed, else None."""
        return self._take() if self.ended and self._decompressor is None else None

    def feed(self, sink: BodySink) -> None:
        """Give the body to `sink`, what has arrived of it at once, until `hold` is called. It is plain, as for `read`.

        In the meantime as much is kept as for a reader that does not read.
        """
        self._sink = sink
        self._deliver()

    def hold(self) -> None:
        self._sink = None

    def _deliver(self) -> None:
        """Give the sink what has arrived, then the end, as long as it is not to be held."""
        error: Exception | None = None
        while (sink := self._sink) is not None and (self._pieces or self._compressed or self._more_plain):
            try:
                data = self._take()
            except RemoteProtocolError as problem:
                error = problem
                break
            if data:
                sink.on_data(data)
        if error is None and not self.ended:
            error = self._error
        if sink is not None and (self.ended or error is not None):
            self._sink = None
            sink.on_end(error)

    def _take(self) -> bytes:
        """Return what has arrived of the body and was not taken, plain; no bytes if there is nothing.

        Raises:
            RemoteProtocolError: it cannot be unpacked.
        """
        while True:
            if self._compressed or self._more_plain:
                data = self._compressed
            elif self._pieces:
                data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
                self._pieces.clear()
                self._unread = 0
                if self._reading_paused:
                    self._reading_paused = False
                    self._transport.resume_reading()
            else:
                return b""
            if self._decompressor is None:
                return data
            if plain := self._decompress(data):
                return plain

    @property
    def reusable(self) -> bool:
        """Return whether the response has ended and another request can be sent."""
        unusable = self._lost or self._request_incomplete or self._reading_paused
        return self._keep_alive and not unusable and not self._transport.is_closing()

    @property
    def is_quiet(self) -> bool:
        """Return whether the socket of an idle connection has nothing to read, not even the end of the connection."""
        return not self._incoming.poll(0)

    def mark_idle(self) -> None:
        """Treat whatever comes before the next `send` as an error: it is no response."""
        self._in_use = False

    def close(self) -> None:
        self._transport.abort()

    async def secure(self, context: Any, host: str) -> None:
        """Start TLS in a tunnel through a proxy.

        Raises:
            RemoteProtocolError: the proxy sent more than the head of its response.
        """
        if self._pieces:
            raise RemoteProtocolError("something came before the way was free")
        self.mark_idle()
        self._parser = httptools.HttpResponseParser(self)
        self._transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)

    @property
    def _responded(self) -> bool:
        return self._error is not None or self.status is not None

    async def _wait(self, timeout_s: float | None = None) -> None:
        """Wait until the transport or the parser has reported something. Raises TimeoutError."""
        self._waiter = self._loop.create_future()
        # `asyncio.timeout` takes several times as long
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, self._time_out, self._waiter)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _time_out(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_exception(TimeoutError())

    def _wake(self) -> None:
        if self._sink is not None:
            self._deliver()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._error is None and not self.ended:
            self._error = error
        self._wake()

    @property
    def http_version(self) -> str:
        return str(self._parser.get_http_version())

    # Called by the transport, as asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._incoming.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if not self._in_use or self._error is not None:
            self.close()
            return
        self._bytes_since_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            cause = error.__context__
            self._keep_alive = False
            self.close()
            self._fail(cause if isinstance(cause, RemoteProtocolError) else RemoteProtocolError(str(error)))
            return
        if self._bytes_since_body > MAX_HEAD_BYTES:
            self.close()
            self._fail(RemoteProtocolError("the answer goes on without saying anything"))
        else:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self.status is None:
            self._fail(_caused(ConnectionClosed("the connection was closed"), error))
        elif not self.ended:
            self._end_of_data(error)
        self._on_lost(self)

    def _end_of_data(self, error: Exception | None) -> None:
        """End a response that has no stated length, since the closed connection ends it; fail any other."""
        if error is not None or "content-length" in self.headers or "transfer-encoding" in self.headers:
            self._fail(_caused(IncompleteResponse(str(error or "the connection was closed")), error))
        self.ended = self._error is None
        self._wake()

    def eof_received(self) -> None:
        # Otherwise the transport stays open until all of the request is sent, which the upstream may never read.
        self.close()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake()

    # Called by the parser of httptools.

    def on_message_begin(self) -> None:
        if self.ended:  # the next request must not get this response in place of its own
            raise RemoteProtocolError("a second answer came to one request")

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status is not None:
            return  # a trailer
        if len(value) > MAX_HEADER_VALUE_BYTES:
            raise RemoteProtocolError("a header of the answer is too long")
        self.raw_headers.append((name, value.strip()))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 101:
            raise RemoteProtocolError("the upstream wants to speak another protocol")
        if status < 200:  # an informational response, before the real one
            self.reason, self.raw_headers = b"", []
            return
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw_headers}
        self.status = status
        if not self._expects_body or status in _STATUSES_WITHOUT_BODY:
            # the parser waits for as much as the head states: `reusable` is False until it says that nothing comes
            self.ended = True

    def on_body(self, body: bytes) -> None:
        if self.ended:
            raise RemoteProtocolError("a body came where there is none")
        if not self._body_started:
            self._body_started = True
            self._decompressor = decompressor_for(self.headers.get("content-encoding"), body)
        self._pieces.append(body)
        self._bytes_since_body = 0
        self._unread += len(body)
        if self._unread > MAX_UNREAD_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status is not None:
            self.ended, self._keep_alive = True, self._parser.should_keep_alive()

    def _decompress(self, data: bytes) -> bytes:
        """Return the next piece that `data` decompresses to, or nothing yet. Keep what it leaves for the next.

        Raises:
            RemoteProtocolError: it is no compressed data, or so much that it says nothing. The connection is closed.
        """
        assert self._decompressor is not None
        problem = None
        try:
            plain = self._decompressor.decompress(data, DECOMPRESSED_PIECE_BYTES)
        except zlib.error as error:
            plain, problem = b"", f"the answer cannot be unpacked: {error}"
        rest = self._decompressor.unconsumed_tail
        self._bytes_since_plain = 0 if plain else self._bytes_since_plain + len(data) - len(rest)
        if self._decompressor.unused_data:
            problem = "the answer goes on behind the end of what was packed"
        elif self._bytes_since_plain > MAX_HEAD_BYTES:
            problem = "the answer goes on without saying anything"
        if problem is not None:
            self._error, self._keep_alive = RemoteProtocolError(problem), False
            self._compressed, self._more_plain = b"", False
            self.close()
            raise self._error
        self._compressed, self._more_plain = rest, len(plain) == DECOMPRESSED_PIECE_BYTES
        return plain


# Of responses that have no body, whatever their head says.
_STATUSES_WITHOUT_BODY = frozenset({204, 304})


def _caused(error: ConnectionError, cause: Exception | None) -> ConnectionError:
    error.__cause__ = cause
    return error


class Decompressor(Protocol):
    """What `zlib.decompressobj` returns."""

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


# Tells zlib to find out by itself which of the two formats it reads.
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

_GZIP_START = b"\x1f"

_ZLIB_START = b"\x78"

# Names of zlib's formats in content-encoding.
_ZLIB_CODINGS = frozenset({"gzip", "x-gzip", "deflate"})


def decompressor_for(coding: str | None, start: bytes) -> Decompressor | None:
    """Choose a decompressor by the first byte of a body, which is neither that of JSON nor that of events.

    Args:
        coding: the header content-encoding.
        start: at least one byte of the body.

    Returns:
        None: the body is plain, or compressed in another way, which its parser will reject.
    """
    first = start[:1]
    if first == _GZIP_START or (first == _ZLIB_START and (coding or "").lower() in _ZLIB_CODINGS):
        return zlib.decompressobj(_GZIP_OR_ZLIB)
    return None
