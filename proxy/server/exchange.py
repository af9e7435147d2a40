"""One request of a client and its answer: all that the endpoints of models need of the server around them.

`HTTPExchange` (protocol.py) reads and writes a connection of our own protocol. `ASGIExchange` serves under any ASGI
server, and behind FastAPI.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from proxy.errors import (
    BadRequest,
    BodyTimeout,
    ClientDisconnected,
    ContentTooLarge,
    UnsupportedMediaType,
)
from proxy.server.api.client_apis import speaks_messages
from proxy.server.dependencies import RequestTrace
from proxy.server.disconnects import DisconnectEvent
from proxy.server.requests import (
    BODY_COMPLETE,
    DISCONNECT,
    RECEIVED_AT,
    REQUEST_IDS,
    Headers,
    RequestHeaders,
    RequestIds,
    headers_of,
    path_of,
    request_ids_from,
)

# A response is written in pieces of this size. What the client has not read yet then stays in this process's counted
# memory for responses, and not in the buffer of the transport, which is not counted.
WRITE_BYTES = 256 * 2**10

JSON = "application/json"

# How long a client may send nothing in the middle of its body.
BODY_READ_TIMEOUT_S = 30.0

# How long it may take over all of it: a byte now and then is not enough.
BODY_TOTAL_TIMEOUT_S = 300.0


class Exchange(ABC):
    """A request whose headers are complete, and its answer, which is sent whole or as a stream.

    Once the client has left, what is sent is dropped.
    """

    __slots__ = ("disconnect", "expects_messages", "headers", "ids", "path", "received_at", "status", "trace")

    def __init__(
        self,
        path: str,
        headers: RequestHeaders,
        ids: RequestIds,
        received_at: float,
        disconnect: DisconnectEvent | None,
    ) -> None:
        """
        Args:
            path: as it is served.
            received_at: monotonic seconds.
            disconnect: None: only `wait_for_disconnect` tells that the client has left.
        """
        self.path = path
        self.headers = headers
        self.ids = ids
        self.received_at = received_at
        self.disconnect = disconnect
        # The client expects the shapes of Anthropic's API.
        self.expects_messages = speaks_messages(path, headers)
        # Of the answer; None until its head is sent.
        self.status: int | None = None
        # What is told of the request's way; None: it is not traced.
        self.trace: RequestTrace | None = None

    @property
    def started(self) -> bool:
        """Whether the head of the answer was sent."""
        return self.status is not None

    @abstractmethod
    async def next_piece(self) -> tuple[bytes, bool]:
        """Return the next piece of the body, and whether more follow.

        Raises:
            ClientDisconnected: the client left.
        """

    @property
    @abstractmethod
    def body_complete(self) -> bool:
        """Whether the whole body has arrived, so that `next_piece` does not wait."""

    async def wait_for_disconnect(self) -> None:
        """Wait until the client leaves, where `disconnect` is None. The body must have been read."""
        raise NotImplementedError

    @abstractmethod
    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer whose body follows in pieces, with the ids of the request."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Send a piece of the body. Wait while the client reads too slowly."""

    def write_now(self, data: bytes) -> bool:  # noqa: ARG002
        """Send a piece if that needs no waiting, and return whether it was sent; where not, `write` it."""
        return False

    @abstractmethod
    async def end(self, data: bytes = b"") -> None:
        """Send the last piece, which may be empty."""

    def id_headers(self) -> dict[str, str]:
        """Return the headers of every answer: the request's id, also under the name that Anthropic's clients read."""
        headers = self.ids.headers()
        if self.expects_messages:
            headers["request-id"] = self.ids.request_id
        return headers

    async def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer."""
        await self.begin(status, {**headers, "content-length": str(len(body))})
        for start in range(0, len(body) - WRITE_BYTES, WRITE_BYTES):
            await self.write(body[start : start + WRITE_BYTES])
        await self.end(body[(len(body) - 1) // WRITE_BYTES * WRITE_BYTES :] if body else b"")


class ASGIExchange(Exchange):
    __slots__ = ("_receive", "_send", "scope")

    def __init__(self, scope: Scope, receive: Receive, send: Send | None = None) -> None:
        """`send`: None where the framework sends the answer."""
        headers = headers_of(scope)
        ids = scope.get(REQUEST_IDS) or request_ids_from(headers)
        received_at = scope.get(RECEIVED_AT) or time.monotonic()
        super().__init__(path_of(scope), headers, ids, received_at, scope.get(DISCONNECT))
        self.scope = scope
        self._receive = receive
        self._send = send

    @classmethod
    def of(cls, request: Request) -> ASGIExchange:
        """Return the exchange of a request that FastAPI answers."""
        return cls(request.scope, request.receive)

    @property
    def body_complete(self) -> bool:
        return bool(self.scope.get(BODY_COMPLETE))

    async def next_piece(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client left before its body was complete")
        return message.get("body", b""), message.get("more_body", False)

    async def wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        sent = {**headers, **self.id_headers()}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
        self.status = status
        await self._message({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        await self._message({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._message({"type": "http.response.body", "body": data, "more_body": False})

    async def _message(self, message: dict[str, Any]) -> None:
        assert self._send is not None  # it was made for an answer of ours
        await self._send(message)


async def read_body(
    exchange: Exchange,
    limit: int,
    *,
    read_timeout_s: float = BODY_READ_TIMEOUT_S,
    total_timeout_s: float = BODY_TOTAL_TIMEOUT_S,
    content_type: str = JSON,
) -> bytes:
    """Read a request's body of at most `limit` bytes, which must be of this content type.

    Raises:
        UnsupportedMediaType, ContentTooLarge, BodyTimeout, ClientDisconnected.
    """
    _check_headers(exchange.headers, content_type)
    pieces: list[bytes] = []
    size = 0
    if exchange.body_complete:
        piece, more = await exchange.next_piece()
        if not more:
            if len(piece) > limit:
                raise _too_large(limit)
            return piece
        pieces, size = [piece], len(piece)
    _check_length(exchange.headers, limit)
    now = asyncio.get_running_loop().time
    deadline = now() + total_timeout_s
    try:
        async with asyncio.timeout(min(read_timeout_s, total_timeout_s)) as timeout:
            more = True
            while more:
                piece, more = await exchange.next_piece()
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                pieces.append(piece)
                if piece:
                    timeout.reschedule(min(now() + read_timeout_s, deadline))
    except TimeoutError:
        raise BodyTimeout(f"the body came too slowly: {size} bytes, and then nothing in time") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_headers(headers: RequestHeaders, content_type: str) -> None:
    if headers.value(b"content-type") != content_type.encode():
        _check_content_type(headers, content_type)
    if headers.has_any(_CONTENT_ENCODING):
        encoding = headers.getlist("content-encoding")[0].strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(f"compressed bodies are not read; got content-encoding {encoding[:40]!r}")


def _check_length(headers: RequestHeaders, limit: int) -> None:
    """Refuse a body that states to be too large, before it comes."""
    lengths = headers.getlist("content-length")
    if not lengths:
        return
    length = lengths[0]
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("content-length must be a number", param="content-length")
    if int(length) > limit:
        raise _too_large(limit)


_CONTENT_ENCODING = frozenset({b"content-encoding"})


def _check_content_type(headers: Headers, content_type: str) -> None:
    kinds = headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if kinds else JSON
    if len(kinds) > 1 or not (kind == content_type or (content_type == JSON and kind.endswith("+json"))):
        raise UnsupportedMediaType(f"the content type must be {content_type}; got {', '.join(kinds)[:100]!r}")


def _too_large(limit: int) -> ContentTooLarge:
    return ContentTooLarge(f"the body is larger than {limit} bytes (max_body_bytes)")
