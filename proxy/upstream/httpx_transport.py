"""httpx's requests over our own connections, for libraries that call models through httpx."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, Protocol

import httpx

from proxy.concurrency import LRU
from proxy.settings.outbound import DEFAULT_TRUST, Outbound, OutboundConnectError, OutboundError, Trust
from proxy.upstream.pool import (
    DEFAULT_PORTS,
    ConnectionClosed,
    ConnectionPool,
    HTTP11Connection,
    IncompleteResponse,
    Origin,
    PoolTimeout,
    ProxyError,
    RemoteProtocolError,
    UpstreamResponse,
    basic_auth_of,
)

# The extension of a request that holds the TransportCall that it belongs to.
CALL = "uniroute.call"

# The extension of a response that holds its ResponseStream.
STREAM = "uniroute.stream"


class ConnectionLost(httpx.RemoteProtocolError):
    """The upstream closed the connection before the end of its response. httpx has no class of its own for it."""


ErrorTable = Mapping[type[Exception], type[httpx.TransportError]]

# What our connections raise, as httpx calls it, in each phase of a request. The first class that fits counts.
CONNECT_ERRORS: ErrorTable = {
    OutboundError: OutboundConnectError,
    ProxyError: httpx.ProxyError,
    PoolTimeout: httpx.PoolTimeout,
    TimeoutError: httpx.ConnectTimeout,
    ConnectionClosed: ConnectionLost,
    OSError: httpx.ConnectError,
    # a host name that no resolver takes
    UnicodeError: httpx.ConnectError,
}
WRITE_ERRORS: ErrorTable = {
    TimeoutError: httpx.WriteTimeout,
    OSError: httpx.WriteError,
}
READ_ERRORS: ErrorTable = {
    TimeoutError: httpx.ReadTimeout,
    RemoteProtocolError: httpx.RemoteProtocolError,
    ConnectionClosed: ConnectionLost,
    IncompleteResponse: ConnectionLost,
    OSError: httpx.ReadError,
}
_CONNECT_ERRORS, _READ_ERRORS = tuple(CONNECT_ERRORS), tuple(READ_ERRORS)


def _raise_as(table: ErrorTable, error: Exception, request: httpx.Request) -> NoReturn:
    """Raise an error of the table as one of httpx."""
    # A connection that the system ended has the system's error behind it.
    kind = error.__cause__ if isinstance(error.__cause__, OSError) else error
    of_httpx = next(of_httpx for known, of_httpx in table.items() if isinstance(kind, known))
    raise of_httpx(str(error), request=request) from error


class TransportCall(Protocol):
    """What a request belongs to."""

    trust: Trust | None
    """Which certificates are trusted. None: the default."""
    responses: set[ResponseStream]
    """Those that hold a connection."""


class ResponseStream(httpx.AsyncByteStream):
    """The body of a response."""

    def __init__(
        self, response: UpstreamResponse, request: httpx.Request, timeout_s: float | None, call: TransportCall | None
    ) -> None:
        self._response: UpstreamResponse | None = response
        self._request = request
        self._timeout_s = timeout_s
        self._call = call
        if call is not None:
            call.responses.add(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        response = self._response
        if response is None:
            raise httpx.StreamClosed
        try:
            while piece := await response.read(self._timeout_s):
                yield piece
        except _READ_ERRORS as error:
            _raise_as(READ_ERRORS, error, self._request)
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back. May be called again."""
        if (response := self.take()) is not None:
            response.close()

    async def aclose(self) -> None:
        self.close()

    def take(self) -> UpstreamResponse | None:
        """Take the response: it is no longer closed with the stream, or with its call. None: it is closed."""
        response, self._response = self._response, None
        if self._call is not None:
            self._call.responses.discard(self)
        return response


@dataclass(frozen=True, slots=True)
class _Destination:
    origin: Origin
    prefix: bytes
    """What stands before the path in the request line: an HTTP proxy needs the whole address."""
    proxy_header: bytes


_MAX_DESTINATIONS = 1024

# Headers that the connection writes itself.
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})

# Of names and methods: a token of RFC 9110.
_NOT_IN_TOKENS = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]")

_NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class PooledTransport(httpx.AsyncBaseTransport):
    """Send the requests of httpx clients over a pool of our connections.

    It follows the proxies and certificates of the environment, and speaks HTTP/1.1. It takes the extensions "timeout"
    and CALL of a request, and gives a response "http_version" and "reason_phrase". A body that comes compressed, though
    clients here ask for plain ones, is decompressed.
    """

    def __init__(self, pool: ConnectionPool, outbound: Outbound) -> None:
        self._pool = pool
        self._outbound = outbound
        self._destinations: LRU[tuple[str, bytes, int | None, Trust | None], _Destination] = LRU(_MAX_DESTINATIONS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError."""
        call: TransportCall | None = request.extensions.get(CALL)
        timeouts: Mapping[str, float | None] = request.extensions.get("timeout") or {}
        destination = self._destination(request, None if call is None else call.trust)
        head = _head(request, destination)
        try:
            connection = await self._pool.acquire(
                destination.origin, timeouts.get("connect"), wait_s=timeouts.get("pool")
            )
        except _CONNECT_ERRORS as error:
            _raise_as(CONNECT_ERRORS, error, request)
        read_s = timeouts.get("read")
        response = UpstreamResponse(self._pool, destination.origin, connection)
        stream = ResponseStream(response, request, read_s, call)
        try:
            await _send(connection, request, head, timeouts.get("write"))
            await _receive_head(response, request, read_s)
        except BaseException:
            stream.close()
            raise
        return httpx.Response(
            response.status,
            headers=_headers_of(connection),
            stream=stream,
            extensions={
                "http_version": f"HTTP/{connection.http_version}".encode(),
                "reason_phrase": connection.reason,
                STREAM: stream,
            },
        )

    def _destination(self, request: httpx.Request, trust: Trust | None) -> _Destination:
        url = request.url
        key = (url.scheme, url.raw_host, url.port, trust)
        destination = self._destinations.get(key)
        if destination is None:
            try:
                destination = self._destinations[key] = self._find_destination(request, trust)
            except OutboundError as error:
                _raise_as(CONNECT_ERRORS, error, request)
        return destination

    def _find_destination(self, request: httpx.Request, trust: Trust | None) -> _Destination:
        """Raises OutboundError, httpx.UnsupportedProtocol."""
        url = request.url
        if url.scheme not in DEFAULT_PORTS or not url.raw_host:
            raise httpx.UnsupportedProtocol("an address is http:// or https://, and names a host", request=request)
        tls = url.scheme == "https"
        address = f"{url.scheme}://{url.netloc.decode('ascii')}"
        proxy = self._outbound.proxies.for_url(address)
        if not tls:
            trust = DEFAULT_TRUST
        elif trust is None:
            trust = self._outbound.trust_of(None)
        origin = Origin(url.raw_host.decode("ascii"), url.port or DEFAULT_PORTS[url.scheme], tls, proxy, trust)
        if proxy is None or tls:
            return _Destination(origin, b"", b"")
        credentials = basic_auth_of(proxy)
        header = f"proxy-authorization: {credentials}\r\n" if credentials else ""
        return _Destination(origin, address.encode(), header.encode())

    async def aclose(self) -> None:
        """Do nothing: the pool is closed by whoever opened it."""


def _head(request: httpx.Request, destination: _Destination) -> bytes:
    """Write the request line and headers, without those that frame the body. Raises httpx.LocalProtocolError."""
    method = request.method.encode("latin-1", "replace")
    sent = [(name, value) for name, value in request.headers.raw if name.lower() not in _FRAMING]
    names = [name for name, _ in sent]
    if _NOT_IN_TOKENS.search(b"".join((method, *names))) or b"" in (method, *names):
        raise httpx.LocalProtocolError("the name of a header, or the method, cannot be sent", request=request)
    # nobody repeats a value: it may be a key
    if _NOT_IN_VALUES.search(b"".join([value for _, value in sent])):
        odd = [name.decode() for name, value in sent if _NOT_IN_VALUES.search(value)]
        raise httpx.LocalProtocolError(f"the header {odd[0][:64]!r} cannot be sent", request=request)
    lines = [b"%b %b%b HTTP/1.1\r\n" % (method, destination.prefix, request.url.raw_path), destination.proxy_header]
    lines += [b"%b: %b\r\n" % header for header in sent]
    return b"".join(lines)


async def _send(connection: HTTP11Connection, request: httpx.Request, head: bytes, timeout_s: float | None) -> None:
    """Raises httpx.WriteTimeout, httpx.WriteError, or what the stream of the request's body raises."""
    headers = request.headers
    if "transfer-encoding" in headers:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        sending = connection.send_stream(head, request.stream, timeout_s)
    else:
        body = await request.aread()
        sized = bool(body) or "content-length" in headers
        sending = connection.send(head, body if sized else None, timeout_s, expects_body=request.method != "HEAD")
    try:
        await sending
    except OSError as error:
        _raise_as(WRITE_ERRORS, error, request)


async def _receive_head(response: UpstreamResponse, request: httpx.Request, timeout_s: float | None) -> None:
    try:
        await response.receive_head(timeout_s)
    except _READ_ERRORS as error:
        _raise_as(READ_ERRORS, error, request)


def _headers_of(connection: HTTP11Connection) -> list[tuple[bytes, bytes]]:
    """Return the headers without that of the compression, which is undone."""
    if "content-encoding" not in connection.headers:
        return connection.raw_headers
    return [header for header in connection.raw_headers if header[0].lower() != b"content-encoding"]
