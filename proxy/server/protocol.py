"""The connections of clients: HTTP/1.1, parsed by httptools, within limits of size, time and number.

When the head of a request is complete, one of two serves it, and is the protocol's `cycle` until a newer request:

HTTPExchange            a request that asks a model, as most clients write it; ASGI has no part in it
RequestResponseCycle    any other, under ASGI; it is uvicorn's

A request that comes while another is served waits in `pipeline`. What limits the waits for a client:

header timer        for the head of its next request        HEADER_TIMEOUT, or the connection is closed
keep-alive timer    for the next request, after an answer   the connection is closed
write timer         for it to read what was written         the connection is aborted
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.concurrency import connection_budget
from proxy.errors import ClientDisconnected, error_body
from proxy.json_text import encode_json
from proxy.server.api.client_apis import CLIENT_APIS, EMBEDDINGS, MESSAGES, speaks_messages
from proxy.server.api.messages_errors import anthropic_error
from proxy.server.disconnects import DisconnectEvent
from proxy.server.exchange import Exchange
from proxy.server.requests import BODY_COMPLETE, DISCONNECT, OVERLOADED, RequestHeaders, random_id, request_ids_from

log = logging.getLogger("uniroute.connection")

log = logging.getLogger("uniroute.connection")

MAX_URL_BYTES = 8 * 1024

MAX_HEADERS = 128

# Of all headers together, and of whatever the parser reads without calling back.
MAX_HEADER_BYTES = 64 * 1024

# Connections beyond the limit that are answered with an error; those beyond that are dropped.
MAX_REJECTED = 32

LINGER_S = 1.0

# Bytes of a body that are written together with the head.
MAX_JOINED_BYTES = 64 * 1024

_FRAMING = (b"content-length", b"transfer-encoding")

ServeExchange = Callable[[Exchange], Awaitable[None]]

# What is served without ASGI, as its clients write it, and its path.
EXCHANGE_URLS: Mapping[bytes, str] = {
    **{path.encode(): path for path in CLIENT_APIS},
    EMBEDDINGS.encode(): EMBEDDINGS,
    f"{MESSAGES.path}?beta=true".encode(): MESSAGES.path,
}


class LimitedHTTPProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits on headers, time and connections. Times are the event loop's seconds."""

    # From the opening of a connection, or the first byte of its next request, until the headers are complete.
    header_timeout_s = 20.0
    # How long a client may read nothing of a response that is waiting for it.
    write_timeout_s = 60.0
    # A connection that has been idle for so long is closed for a new one, where there are too many.
    min_idle_s = 0.5

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of the request whose head was read last, as far as it has come.
        self.url, self.headers = b"", []
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        # Why a callback of the parser has stopped it.
        self._rejection: ProtocolRejection | None = None
        self._in_headers = True
        self._header_bytes = 0
        # Whether the parser called back for the latest data, and how many bytes it read without doing so.
        self._parser_progressed = False
        self._silent_bytes = 0
        # While it is true the parser reads headers again, and its callbacks do nothing.
        self._replaying_headers = False
        # This connection is beyond the limit of their number.
        self._overloaded = False
        # A request was rejected, or the answer under way is the last: whatever else arrives is dropped.
        self._ignores_data = False
        self.disconnect = DisconnectEvent()
        # The newest request that `_start_asgi_task` began. uvicorn tells `cycle` alone that the client has left, and
        # that may be one which still waits behind it.
        self._running: RequestResponseCycle | None = None
        # Whether any request has begun on this connection.
        self._message_begun = False
        # Of every idle connection of the server, not of this one alone.
        self._idle_since = _idle_connections(self.server_state)
        # Answers what is asked of models, without ASGI: `Application.serve_exchange` (app.py). None: another app.
        self._serve_exchange: ServeExchange | None = getattr(self.app, "serve_exchange", None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = max_connections()
        if len(self.connections) > most and not self._evict_idle():
            self._overloaded = True
            if len(self.connections) > most + MAX_REJECTED:
                transport.abort()
                return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._unset_keepalive_if_required()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self.disconnect.set()

    def data_received(self, data: bytes) -> None:
        if self._ignores_data or self.transport.is_closing():
            return
        self._parser_progressed = False
        self._silent_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._reject(self._rejection or MALFORMED_REQUEST)
            return
        if self._parser_progressed:
            self._silent_bytes = 0
        elif self._silent_bytes > MAX_HEADER_BYTES:
            self._reject(HEADERS_TOO_LARGE)
            return
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_header_timer()  # the head came in part

    def _parse(self, data: bytes) -> None:
        """Feed the parser, ignoring offers of another protocol, as HTTP allows: Java's client makes one a request."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._body_expected():
                    self._resume_body()
            else:
                return

    def _body_expected(self) -> bool:
        """Whether the head says that a body follows it."""
        return any(name in _FRAMING for name, _ in self.headers)

    def _resume_body(self) -> None:
        """Replace the parser, which takes what follows an offer for the other protocol, by one that reads a body."""
        framing = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self._replaying_headers = True
        self.parser.feed_data(b"".join((b"POST / HTTP/1.1\r\n", *framing, b"\r\n")))
        self._replaying_headers = False

    # Called by the parser as it reads a request.

    def on_message_begin(self) -> None:
        if self._replaying_headers:
            return
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._message_begun = self._in_headers = self._parser_progressed = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._replaying_headers:
            return
        self.url += url
        self._parser_progressed = True
        if len(self.url) > MAX_URL_BYTES:
            self._raise_rejection(URI_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replaying_headers:
            return
        self._parser_progressed = True
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._raise_rejection(HEADERS_TOO_LARGE)
        if not self._in_headers:
            return  # a trailer: nobody has checked it when the request was let in
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS:
            self._raise_rejection(TOO_MANY_HEADERS)

    def on_headers_complete(self) -> None:
        if self._replaying_headers:
            return
        self._in_headers, self._parser_progressed = False, True
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            self._raise_rejection(UNSUPPORTED_TRANSFER_ENCODING)
        if not self.url.startswith((b"/", b"*")) and _authority(self.url) not in _hosts(self.headers):
            self._raise_rejection(HOST_MISMATCH)
        self._stop_header_timer()
        path = EXCHANGE_URLS.get(self.url)
        if path is not None and self._serve_exchange is not None and self._fits_exchange():
            self._start_exchange(HTTPExchange(self, path), self._serve_exchange)
            return
        self._make_scope()
        super().on_headers_complete()
        if self.cycle is not None:
            _JoiningTransport.install(self.cycle, self.loop)
            if self.parser.get_http_version() == "1.0":
                _end_by_closing(self.cycle)

    def _fits_exchange(self) -> bool:
        """Whether an HTTPExchange can serve the request; what few clients send is left to ASGI."""
        return (
            self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            and not self._overloaded
            and not self.root_path
        )

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin to serve a request: one for ASGI, or whatever has waited in `pipeline`."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _start_exchange(self, exchange: HTTPExchange, serve: ServeExchange) -> None:
        """Serve a request now, or after those that came before it on this connection."""
        before, self.cycle = self.cycle, exchange  # type: ignore[assignment]
        if before is None or before.response_complete:
            super()._start_asgi_task(exchange, serve)  # type: ignore[arg-type]
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, serve))  # type: ignore[arg-type]

    def _make_scope(self) -> None:
        """Make the scope of a request for ASGI, once its head is complete. uvicorn does so as soon as one begins."""
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()  # forgets the head, too
        self.url, self.headers, self.expect_100_continue = url, headers, expect
        scope: Any = self.scope
        scope["headers"] = headers
        scope[DISCONNECT] = self.disconnect
        if self._overloaded:
            scope[OVERLOADED] = True

    def on_body(self, body: bytes) -> None:
        self._parser_progressed = True
        exchange: Any = self.cycle
        if type(exchange) is not HTTPExchange:
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.add_piece(body)

    def on_message_complete(self) -> None:
        self._parser_progressed = True
        if self.flow.read_paused and not self.pipeline:
            self.flow.resume_reading()  # what a long body had paused: only who reads notices that the client leaves
        exchange: Any = self.cycle
        if type(exchange) is HTTPExchange:
            exchange.more_body = False
            exchange.set()
        elif not (self.parser.should_upgrade() and self._body_expected()):
            super().on_message_complete()
            self.scope[BODY_COMPLETE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        """Begin the next request that waits, or the wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self.close()
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._mark_idle()
        # One that runs already looks at the clock when it ends: most connections have their next request by then.
        if self.timeout_keep_alive_task is None:
            self._start_keep_alive_timer(self.timeout_keep_alive)

    def _start_keep_alive_timer(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def close(self) -> None:
        """Close once the client has taken what was written; abort if it takes nothing for too long."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._start_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        since = self._idle_since.get(self)
        if since is None or self._header_timer is not None:
            return  # a request is being served, or its head is on the way
        left_s = since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._start_keep_alive_timer(left_s)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()  # close() would wait for a client that has not read its last response
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _reject(self, why: ProtocolRejection) -> None:
        """Answer with an error and close. Only close where another request could take the error for its response.

        A request before that was sent whole is answered all the same, and nothing after it.
        """
        if self._ignores_data or self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if not answered and not self.cycle.more_body:  # the request before was sent whole: its answer is the last
            self.cycle.keep_alive, self._ignores_data = False, True
            return
        self._stop_timers()
        if not answered:
            if self.pipeline or self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # ends the wait for the rest of this body
            self.cycle.message_event.set()
            self.disconnect.set()
        expects_messages = speaks_messages(self.url.partition(b"?")[0].decode("latin-1"), RequestHeaders(self.headers))
        self.transport.write(rejection_bytes(why, self.server_state.default_headers, expects_messages=expects_messages))
        self._ignores_data = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()  # after a close at once, data that still arrives would discard the response
        self.loop.call_later(LINGER_S, self.transport.abort)

    def _raise_rejection(self, why: ProtocolRejection) -> NoReturn:
        """Stop the parser, within one of its callbacks: `data_received` rejects the request then."""
        self._rejection = why
        raise _Rejected

    def _start_header_timer(self) -> None:
        """Begin the wait for the head of a request. Until it is complete, the connection is idle."""
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._header_timed_out)
        self._mark_idle()

    def _mark_idle(self) -> None:
        """Let the connection be closed for a new one where there are too many."""
        self._idle_since[self] = self.loop.time()
        self._idle_since.move_to_end(self)

    def _header_timed_out(self) -> None:
        self._header_timer = None
        if self._in_headers and self._message_begun:
            self._reject(HEADER_TIMEOUT)
        else:
            self.transport.close()  # it sent no request, so there is nothing to answer

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self._write_timed_out)

    def _write_timed_out(self) -> None:
        log.info("a client took nothing of its answer for %g s and was cut off", self.write_timeout_s)
        self.transport.abort()

    def _evict_idle(self) -> bool:
        """Close the connection that has been idle for longest, and return whether there was one."""
        oldest, since = next(iter(self._idle_since.items()), (None, 0.0))
        if oldest is None or self.loop.time() - since < self.min_idle_s:
            return False
        del self._idle_since[oldest]
        self.connections.discard(oldest)
        oldest.transport.close()
        return True

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._idle_since.pop(self, None)

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


@functools.cache
def max_connections() -> int:
    """Return the limit of this process."""
    return connection_budget().clients


def _idle_connections(state: ServerState) -> OrderedDict[LimitedHTTPProtocol, float]:
    """Return the idle connections of a server, and since when they are idle, the longest first.

    They are kept in the server's state, which is all that its connections share.
    """
    found: OrderedDict[LimitedHTTPProtocol, float] = vars(state).setdefault("idle_connections", OrderedDict())
    return found


def _authority(url: bytes) -> bytes:
    return url.partition(b"://")[2].partition(b"/")[0].lower()


def _hosts(headers: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [value.lower() for name, value in headers if name == b"host"]


class HTTPExchange(Exchange):
    """An exchange on a connection of LimitedHTTPProtocol.

    It takes the place of uvicorn's RequestResponseCycle, and has those of its members that uvicorn's protocol reads,
    sets and calls, under its names.
    """

    __slots__ = (
        "_chunked",
        "_flush_handle",
        "_protocol",
        "_transport",
        "_unwritten",
        "_waiter",
        "body",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
    )

    disconnect: DisconnectEvent

    def __init__(self, protocol: LimitedHTTPProtocol, path: str) -> None:
        headers = RequestHeaders(protocol.headers)
        super().__init__(path, headers, request_ids_from(headers), time.monotonic(), protocol.disconnect)
        self._protocol = protocol
        self._transport = protocol.transport
        # As uvicorn's cycle has them. `body`: what has arrived and was not taken yet.
        self.keep_alive = protocol.parser.should_keep_alive()
        self.body = bytearray()
        self.more_body = True
        self.response_complete = False
        # Set by uvicorn, which does not for every request of a connection: `disconnect` tells.
        self.disconnected = False
        # The answer's body is sent in chunks.
        self._chunked = False
        # The head and the first of the body, until the end of this turn of the loop, or of the answer.
        self._unwritten: bytes | None = None
        self._flush_handle: asyncio.Handle | None = None
        # Whoever waits for the next piece of the request's body.
        self._waiter: asyncio.Future[None] | None = None

    async def run_asgi(self, serve: ServeExchange) -> None:
        """Serve the request, without ASGI: the name is that of uvicorn's cycle."""
        try:
            await serve(self)
        finally:
            if not (self.response_complete or self.disconnect.is_set):
                self._flush()
                self._protocol.close()  # the client must not wait for the rest

    @property
    def message_event(self) -> HTTPExchange:
        """The event that uvicorn sets when the connection is lost: the exchange itself."""
        return self

    def set(self) -> None:
        """Wake whoever waits for the body."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def response_started(self) -> bool:
        """What `started` is, under the name of uvicorn's cycle."""
        return self.status is not None

    def add_piece(self, piece: bytes) -> None:
        """Add a piece of the body, and let the client wait when too many are there."""
        self.body += piece
        if len(self.body) > HIGH_WATER_LIMIT:
            self._protocol.flow.pause_reading()
        self.set()

    @property
    def body_complete(self) -> bool:
        return not self.more_body

    async def next_piece(self) -> tuple[bytes, bool]:
        while self.more_body and not self.body and not self.disconnect.is_set:
            self._protocol.flow.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.disconnect.is_set:
            raise ClientDisconnected("the client left before its body was complete")
        piece, self.body = bytes(self.body), bytearray()
        return piece, self.more_body

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        if await self._writable():
            chunked = "content-length" not in headers
            self._unwritten = self._head_bytes(status, headers, "transfer-encoding: chunked\r\n" if chunked else "")
            self.status, self._chunked = status, chunked
            self._flush_handle = self._protocol.loop.call_soon(self._flush)

    async def write(self, data: bytes) -> None:
        if data and await self._writable():
            self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def write_now(self, data: bytes) -> bool:
        if self.disconnect.is_set or self.response_complete:
            return True  # dropped
        if self._protocol.flow.write_paused:
            return False
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._write(data)
        return True

    async def end(self, data: bytes = b"") -> None:
        if not await self._writable():
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        self._write(data)
        self._flush()
        self._end_response()

    async def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if len(body) > MAX_JOINED_BYTES:
            await super().send(status, headers, body)
        elif await self._writable():
            head = self._head_bytes(status, headers, f"content-length: {len(body)}\r\n")
            self.status = status
            self._transport.write(head + body)
            self._end_response()

    async def _writable(self) -> bool:
        """Wait while the client reads too slowly. Return whether it is still there, and the answer not complete."""
        flow = self._protocol.flow
        if flow.write_paused and not self.disconnect.is_set:
            await flow.drain()
        return not (self.disconnect.is_set or self.response_complete)

    def _head_bytes(self, status: int, headers: Mapping[str, str], framing: str) -> bytes:
        """Return the head of the answer. `framing`: the line that says where the body ends; empty: a header does."""
        stated = {**headers, **self.id_headers()}
        if stated.get("connection") == "close":
            self.keep_alive = False
        elif not self.keep_alive:
            stated["connection"] = "close"
        raw = "".join([f"{name}: {value}\r\n" for name, value in stated.items()]).encode("latin-1")
        if len(raw.translate(None, _CONTROL_BYTES)) != len(raw) - 2 * len(stated):
            raise ValueError("a header of the answer has a control character")
        default = _lines_of(tuple(self._protocol.server_state.default_headers))
        return b"%b%b%b%b\r\n" % (STATUS_LINE[status], default, raw, framing.encode())

    def _write(self, data: bytes) -> None:
        """Write together with the head, if that was not written yet. More may follow in this turn of the loop."""
        if self._unwritten is not None:
            if len(self._unwritten) + len(data) <= MAX_JOINED_BYTES:
                self._unwritten += data
                return
            self._flush()  # to copy it would cost more than a system call
        if data:
            self._transport.write(data)

    def _flush(self) -> None:
        head, self._unwritten = self._unwritten, None
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def _end_response(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._transport.close()
        self._protocol.on_response_complete()


_CONTROL_BYTES = bytes([*range(32), 127]).replace(b"\t", b"")


@functools.lru_cache(maxsize=4)
def _lines_of(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    return b"".join(b"%b: %b\r\n" % pair for pair in headers)


@dataclass(frozen=True)
class ProtocolRejection:
    status: int
    message: str
    code: str


MALFORMED_REQUEST = ProtocolRejection(400, "this is not a request in HTTP/1.1", "invalid_http_request")

HOST_MISMATCH = ProtocolRejection(400, "the address and the Host header name different hosts", "invalid_http_request")

HEADER_TIMEOUT = ProtocolRejection(408, "the headers of the request were not complete in time", "request_timeout")

URI_TOO_LONG = ProtocolRejection(414, f"the address is longer than {MAX_URL_BYTES} bytes", "uri_too_long")

TOO_MANY_HEADERS = ProtocolRejection(431, f"there are more than {MAX_HEADERS} headers", "request_headers_too_large")

HEADERS_TOO_LARGE = ProtocolRejection(
    431, f"the headers are larger than {MAX_HEADER_BYTES} bytes", "request_headers_too_large"
)

UNSUPPORTED_TRANSFER_ENCODING = ProtocolRejection(
    501, "the one transfer coding that is read is chunked, in HTTP/1.1", "unsupported_transfer_coding"
)


def rejection_bytes(
    why: ProtocolRejection, headers: Iterable[tuple[bytes, bytes]], *, expects_messages: bool = False
) -> bytes:
    """Return a whole response, the last of its connection, with the `headers` of every response.

    Args:
        expects_messages: the client expects the shapes of Anthropic's API.
    """
    request_id = f"req-{random_id()}"
    error = error_body(why.message, "invalid_request_error", why.code)
    body = encode_json(anthropic_error(error["error"], why.status, request_id) if expects_messages else error)
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    own += [(b"connection", b"close"), (b"x-request-id", request_id.encode())]
    own += [(b"request-id", request_id.encode())] if expects_messages else []
    lines = [b"%s: %s\r\n" % pair for pair in (*headers, *own)]
    return b"".join((STATUS_LINE[why.status], *lines, b"\r\n", body))


class _Rejected(Exception):
    """Raised in the parser's callbacks. The parser turns it into an error of its own."""


# For requests that ASGI serves.


class _JoiningTransport:
    """Write the head of a response together with the first of its body: one system call in place of two.

    It stands in for a response's transport until then. A head without a body is written at the end of this turn of the
    event loop, so that a slow body does not hold it up.
    """

    __slots__ = ("_cycle", "_flushing", "_head", "_loop", "_transport")

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._loop = loop
        self._head: bytes | None = None
        self._flushing: asyncio.Handle | None = None

    @classmethod
    def install(cls, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        cycle.transport = cls(cycle, loop)  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
            self._flushing = self._loop.call_soon(self._flush)
        elif len(data) > MAX_JOINED_BYTES:  # to copy it would cost more than a system call
            self._flush()
            self._transport.write(data)
        else:
            head, self._head = self._head, b""
            self._restore()
            self._transport.write(head + data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        self._restore()
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def _restore(self) -> None:
        """Give the response its own transport back."""
        self._cycle.transport = self._transport
        if self._flushing is not None:
            self._flushing.cancel()


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """End a response of unknown length by closing the connection: HTTP/1.0 knows no chunks."""
    send, has_length = cycle.send, True

    async def send_without_chunks(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.keep_alive = cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_without_chunks  # type: ignore[method-assign]
