from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.concurrency import connection_budget
from proxy.errors import error_body
from proxy.server.requests import BODY_COMPLETE, DISCONNECT, OVERLOADED, DisconnectEvent
from proxy.upstream.sse import encode_json

URL_BYTES = 8 * 1024

HEADERS = 128

HEAD_BYTES = 64 * 1024
"""Of all headers together; and of anything that the parser takes in without coming to an end of it."""


@dataclass(frozen=True)
class ProtocolRejection:
    status: int
    message: str
    code: str


MALFORMED_REQUEST = ProtocolRejection(400, "this is not a request in HTTP/1.1", "invalid_http_request")

HOST_MISMATCH = ProtocolRejection(400, "the address and the Host header name different hosts", "invalid_http_request")

HEADER_TIMEOUT = ProtocolRejection(408, "the headers of the request were not complete in time", "request_timeout")

URI_TOO_LONG = ProtocolRejection(414, f"the address is longer than {URL_BYTES} bytes", "uri_too_long")

TOO_MANY_HEADERS = ProtocolRejection(431, f"there are more than {HEADERS} headers", "request_headers_too_large")

HEADERS_TOO_LARGE = ProtocolRejection(
    431, f"the headers are larger than {HEAD_BYTES} bytes", "request_headers_too_large"
)

UNSUPPORTED_TRANSFER_ENCODING = ProtocolRejection(
    501, "the one transfer coding that is read is chunked, in HTTP/1.1", "unsupported_transfer_coding"
)


def rejection_bytes(why: ProtocolRejection, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The whole response, the last of its connection. `headers`: those of every response."""
    body = encode_json(error_body(why.message, "invalid_request_error", why.code))
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    own += [(b"connection", b"close"), (b"x-request-id", b"req-" + uuid.uuid4().hex.encode())]
    lines = [b"%s: %s\r\n" % pair for pair in (*headers, *own)]
    return b"".join((STATUS_LINE[why.status], *lines, b"\r\n", body))


log = logging.getLogger("uniroute.connection")

MAX_REJECTED = 32
"""Connections beyond the bound that are told so; those beyond are dropped."""

LINGER_S = 1.0

_FRAMING = (b"content-length", b"transfer-encoding")


class _Stop(Exception):
    """Raised in the parser's callbacks; it comes out of the parser as its own error."""


@functools.cache
def most_connections() -> int:
    """Of this process."""
    return connection_budget().clients


def _idle(state: ServerState) -> OrderedDict[LimitedHTTPProtocol, float]:
    """Connections without a request, and since when; the longest first. Of one server: its state is all they share."""
    found: OrderedDict[LimitedHTTPProtocol, float] = vars(state).setdefault("idle_connections", OrderedDict())
    return found


class LimitedHTTPProtocol(HttpToolsProtocol):
    """A class for uvicorn's `http`. Seconds are the event loop's."""

    head_s = 20.0
    """From the opening of a connection, or the first byte of its next request, until the headers are complete."""
    stall_s = 60.0
    """How long a client may take nothing of an answer that is there for it."""
    patience_s = 0.5
    """Where there are too many, a connection that has asked nothing for so long makes room for another."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._refusal: ProtocolRejection | None = None
        self._in_head = True
        self._head_bytes = 0
        self._moved = False
        """The parser called back since data came last."""
        self._quiet_bytes = 0
        self._replaying_headers = False
        """What the parser says is known already."""
        self._overloaded = self._refused = False
        self._leaving = DisconnectEvent()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = most_connections()
        if len(self.connections) > most and not self._evict_idle():
            self._overloaded = True
            if len(self.connections) > most + MAX_REJECTED:
                transport.abort()
                return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._leaving.set()

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()
        self._moved = False
        self._quiet_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or MALFORMED_REQUEST)
            return
        if self._moved:
            self._quiet_bytes = 0
        elif self._quiet_bytes > HEAD_BYTES:
            self._refuse(HEADERS_TOO_LARGE)

    def _parse(self, data: bytes) -> None:
        """Offers of another protocol are passed over, as HTTP allows: Java's client makes one with every request."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                if self._body_expected():
                    self._read_body_on()
            else:
                return

    def _body_expected(self) -> bool:
        return any(name in _FRAMING for name, _ in self.headers)

    def _read_body_on(self) -> None:
        """The parser takes what follows an offer for the other protocol; a new one is told that it is the body."""
        framing = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self._replaying_headers = True
        self.parser.feed_data(b"".join((b"POST / HTTP/1.1\r\n", *framing, b"\r\n")))
        self._replaying_headers = False

    def on_message_begin(self) -> None:
        if self._replaying_headers:
            return
        super().on_message_begin()
        self.scope[DISCONNECT] = self._leaving  # type: ignore[literal-required]
        self._in_head = self._moved = True
        self._head_bytes = 0
        if self._overloaded:
            self.scope[OVERLOADED] = True  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        if self._replaying_headers:
            return
        super().on_url(url)
        self._moved = True
        if len(self.url) > URL_BYTES:
            self._stop(URI_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replaying_headers:
            return
        self._moved = True
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES:
            self._stop(HEADERS_TOO_LARGE)
        if not self._in_head:
            return  # a trailer: what comes after the body was not there when the request was let in
        super().on_header(name, value)
        if len(self.headers) > HEADERS:
            self._stop(TOO_MANY_HEADERS)

    def on_headers_complete(self) -> None:
        if self._replaying_headers:
            return
        self._in_head, self._moved = False, True
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            self._stop(UNSUPPORTED_TRANSFER_ENCODING)
        if not self.url.startswith((b"/", b"*")) and _authority(self.url) not in _hosts(self.headers):
            self._stop(HOST_MISMATCH)
        self._stop_waiting()
        super().on_headers_complete()
        if self.cycle is not None and self.parser.get_http_version() == "1.0":
            _end_by_closing(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        if not (self.parser.should_upgrade() and self._body_expected()):
            super().on_message_complete()
            self.scope[BODY_COMPLETE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._mark_idle()
        elif self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_for_stall()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # close() would wait for a client that has not read its last answer yet
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_for_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _refuse(self, why: ProtocolRejection) -> None:
        """Say so and close, unless another answer is on its way, which this one must not be mistaken for."""
        if self._refused or self.transport.is_closing():
            return
        self._stop_timers()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.pipeline or self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # whoever waits for the rest of this body
            self.cycle.message_event.set()
            self._leaving.set()
        self.transport.write(rejection_bytes(why, self.server_state.default_headers))
        self._refused = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()  # closed at once, what it still sends would make the answer be lost on the way
        self.loop.call_later(LINGER_S, self.transport.abort)

    def _stop(self, why: ProtocolRejection) -> NoReturn:
        self._refusal = why
        raise _Stop

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._head_timer = self.loop.call_later(self.head_s, self._head_is_late)
        self._mark_idle()

    def _mark_idle(self) -> None:
        idle = _idle(self.server_state)
        idle[self] = self.loop.time()
        idle.move_to_end(self)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head and self.scope is not None:
            self._refuse(HEADER_TIMEOUT)
        else:
            self.transport.close()  # it asked nothing, so it is told nothing

    def _watch_for_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_s, self._stalled)

    def _stalled(self) -> None:
        log.info("a client took nothing of its answer for %g s and was cut off", self.stall_s)
        self.transport.abort()

    def _evict_idle(self) -> bool:
        """Whether the connection that has said nothing for longest could be closed for a new one."""
        idle = _idle(self.server_state)
        oldest, since = next(iter(idle.items()), (None, 0.0))
        if oldest is None or self.loop.time() - since < self.patience_s:
            return False
        del idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.close()
        return True

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        _idle(self.server_state).pop(self, None)

    def _stop_timers(self) -> None:
        self._stop_waiting()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks: an answer whose length is not stated goes on until the connection is closed."""
    send, stated = cycle.send, True

    async def send_without_chunks(message: Any) -> None:
        nonlocal stated
        if message["type"] == "http.response.start":
            stated = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not stated:
                cycle.keep_alive = cycle.chunked_encoding = False
        elif not stated:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_without_chunks  # type: ignore[method-assign]


def _authority(url: bytes) -> bytes:
    return url.partition(b"://")[2].partition(b"/")[0].lower()


def _hosts(headers: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [value.lower() for name, value in headers if name == b"host"]
