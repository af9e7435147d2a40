from __future__ import annotations

import asyncio
import select
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import httptools

# Of an answer: some servers behind others send a policy or cookies of many kilobytes.
MAX_HEADER = 64 * 2**10

# Of all that is no body and comes in one go: a head, the hints before it, the size of a chunk, trailers.
MAX_HEADER_BYTES = 256 * 2**10

# Bytes of an answer that wait for their reader; then the upstream waits.
MAX_UNREAD = 256 * 2**10

# Bytes that may wait for their reader, where an upstream compresses its answer though it was asked not to.
MAX_UNPACKED = 16 * 2**20

# A larger body is written bit by bit, so that others get a turn.
PIECE = 256 * 2**10


class ConnectionClosed(ConnectionError):
    """The connection ended before there was the head of an answer."""


class IncompleteResponse(ConnectionError):
    """The connection ended in the middle of an answer, or what came was none."""


class RemoteProtocolError(Exception):
    """Something else than an answer in HTTP/1.x, or one that nobody should read."""


class HTTP11Connection(asyncio.Protocol):
    """`send`, `answered`, `read` until it is empty, and then again, or `close`. Used by one request at a time."""

    def __init__(self, on_lost: Callable[[HTTP11Connection], None] = lambda _: None) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._incoming = select.poll()
        self._changed: asyncio.Future[None] | None = None
        self._lost = self._writing_paused = self._reading_paused = self._request_incomplete = False
        self._begin()
        self._busy = False

    def _begin(self) -> None:
        self._busy = True
        # None: the head of the answer has not come yet.
        self.status: int | None = None
        # In lower case; of a repeated one the last.
        self.headers: dict[str, str] = {}
        # All of the answer has come; what is unread of it still can be read.
        self.ended = False
        self._kept = False
        self._since_body = 0
        self._pieces: deque[bytes] = deque()
        self._unread = 0
        self._fault: Exception | None = None
        self._unpacker: Unpacker | None = None
        self._body_begun = False

    async def send(self, head: bytes, body: bytes | None) -> None:
        """`head` without the length of the body, which is added. Never fails: `answered` tells."""
        self._begin()
        if body is None:
            self._transport.write(head + b"\r\n")
            return
        head = b"%bcontent-length: %d\r\n\r\n" % (head, len(body))
        if len(body) <= PIECE:
            self._transport.write(head + body)
            return
        self._transport.write(head)
        for start in range(0, len(body), PIECE):
            while self._writing_paused and not self._over:
                await self._change()
            if self._over:  # it has heard enough, or nobody listens
                self._request_incomplete = True
                return
            self._transport.write(body[start : start + PIECE])
            await asyncio.sleep(0)

    async def answered(self) -> None:
        """Once `status` and `headers` are there. Raises Unanswered or NotHttp."""
        while self.status is None:
            if self._fault is not None:
                raise self._fault
            await self._change()

    async def read(self) -> bytes:
        """What has come of the body, at least a byte; nothing at its end. Raises BrokenOff or NotHttp."""
        while not self._pieces:
            if self.ended:
                return b""
            if self._fault is not None:
                raise self._fault
            await self._change()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    @property
    def reusable(self) -> bool:
        """The answer has ended, and the upstream expects another request."""
        spoilt = self._lost or self._request_incomplete or self._reading_paused
        return self._kept and not spoilt and not self._transport.is_closing()

    @property
    def silent(self) -> bool:
        """While it rests: nothing has come, not even the end, that the event loop did not get round to yet."""
        return not self._incoming.poll(0)

    def rest(self) -> None:
        """No request is under way until the next `send`: whatever comes now is nobody's answer."""
        self._busy = False

    def close(self) -> None:
        self._transport.abort()

    async def secure(self, context: Any, host: str) -> None:
        """TLS from now on, after a proxy has made way. Raises NotHttp: it said more than that."""
        if self._pieces:
            raise RemoteProtocolError("something came before the way was free")
        self.rest()
        self._parser = httptools.HttpResponseParser(self)
        self._transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)

    @property
    def _over(self) -> bool:
        return self._fault is not None or self.status is not None

    async def _change(self) -> None:
        self._changed = self._loop.create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _fail(self, fault: Exception) -> None:
        if self._fault is None and not self.ended:
            self._fault = fault
        self._wake()

    # the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._incoming.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if not self._busy or self._fault is not None:
            self.close()
            return
        self._since_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, RemoteProtocolError) else RemoteProtocolError(str(error)))
            self._kept = False
            self.close()
            return
        if self._since_body > MAX_HEADER_BYTES:
            self._fail(RemoteProtocolError("the answer goes on without saying anything"))
            self.close()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self.status is None:
            self._fail(ConnectionClosed("the connection was closed"))
        elif not self.ended:
            self._end_of_data(error)
        self._on_lost(self)

    def _end_of_data(self, error: Exception | None) -> None:
        """It ends an answer whose length nobody told."""
        if error is not None or "content-length" in self.headers or "transfer-encoding" in self.headers:
            self._fail(IncompleteResponse(str(error or "the connection was closed")))
        self.ended = self._fault is None
        self._wake()

    def eof_received(self) -> None:
        self.close()  # else it would be open until all of the request is sent, which nobody may read

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake()

    # the parser's side

    def on_message_begin(self) -> None:
        if self.ended:  # the beginning of it is enough: the rest would be the answer to the next request
            raise RemoteProtocolError("a second answer came to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status is not None:
            return  # a trailer
        if len(value) > MAX_HEADER:
            raise RemoteProtocolError("a header of the answer is too long")
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 101:
            raise RemoteProtocolError("the upstream wants to speak another protocol")
        if status < 200:
            self.headers = {}  # more than a hint is to come
            return
        self.status = status

    def on_body(self, body: bytes) -> None:
        if not self._body_begun:
            self._body_begun = True
            self._unpacker = unpacker_of(self.headers.get("content-encoding"), body)
        if self._unpacker is not None:
            body = self._unpacked(self._unpacker, body)
        if not body:
            return
        self._pieces.append(body)
        self._since_body = 0
        self._unread += len(body)
        if self._unread > MAX_UNREAD and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status is not None:
            self.ended, self._kept = True, self._parser.should_keep_alive()

    def _unpacked(self, unpacker: Unpacker, body: bytes) -> bytes:
        room = MAX_UNPACKED - self._unread
        try:
            plain = unpacker.decompress(body, room + 1)
        except zlib.error as error:
            raise RemoteProtocolError(f"the answer cannot be unpacked: {error}") from None
        if len(plain) > room:
            raise RemoteProtocolError("the answer unpacks to more than can be held")
        if unpacker.unused_data:
            raise RemoteProtocolError("the answer goes on behind the end of what was packed")
        return plain


_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

_GZIP = b"\x1f"

_ZLIB = b"\x78"

# What servers call it.
_ZLIBS_NAMES = frozenset({"gzip", "x-gzip", "deflate"})


class Unpacker(Protocol):
    """zlib's."""

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def unpacker_of(coding: str | None, beginning: bytes) -> Unpacker | None:
    """None: it is plain, or packed in a way that nobody here asked for, which its reader will find.

    Neither JSON nor events begin as packed bytes do.

    Args:
        coding: what the header says.
        beginning: at least a byte of the body.
    """
    first = beginning[:1]
    if first == _GZIP or (first == _ZLIB and (coding or "").lower() in _ZLIBS_NAMES):
        return zlib.decompressobj(_GZIP_OR_ZLIB)
    return None
