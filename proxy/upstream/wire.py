"""The HTTP side of translated calls: one pool that follows no redirect, and a look at what really came back."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx

from proxy.descriptors import shares
from proxy.errors import MOST_ERROR_BYTES, UpstreamFailure
from proxy.http_clients import AsyncTransport
from proxy.json_shape import MAX_VALUES_AT_ONCE, check_shape
from proxy.outbound import Outbound, Trust
from proxy.relay.sse import loads
from proxy.tasks import read_gently, to_its_end
from proxy.upstream.answer_room import LARGEST, AnswerBounds, AnswerRoom
from proxy.upstream.connection import GZIP_OR_ZLIB, PIECE
from proxy.upstream.connections import KEPT_ALIVE_S
from proxy.upstream.events import ChunkReader
from proxy.upstream.payload import exact

if TYPE_CHECKING:
    from collections.abc import Iterator

EXCHANGE = "uniroute.exchange"
"""In the extensions of a request: whose it is."""


class Exchange:
    """The last HTTP response of one upstream call, as the pool saw it: litellm's own objects lose fields."""

    def __init__(self, connect_s: float, *, streams: bool = False, room: AnswerRoom | None = None) -> None:
        self.connect_s = connect_s
        self.bounds = AnswerBounds(room or AnswerRoom(), MAX_VALUES_AT_ONCE)
        self.fault: UpstreamFailure | None = None
        """Why its answer was not read to the end, whatever the library in between made of that."""
        self.streams = streams
        """Whether a stream was asked for."""
        self.trust: Trust | None = None
        """Whose certificates count; None: the usual."""
        self.transport: httpx.AsyncBaseTransport | None = None
        """Of the pool that a client which litellm made itself takes too."""
        self.response: httpx.Response | None = None
        self.over_at: float | None = None
        """Monotonic seconds since which nobody waits for anything of it."""

    def end(self) -> None:
        """Whatever it still has open is nobody's from now on."""
        if self.over_at is None:
            self.over_at = monotonic()
        self.bounds.held.release()

    async def aclose(self) -> None:
        """The upstream's connection, for certain."""
        self.end()
        if self.response is not None and not self.response.is_closed:
            await to_its_end(self.response.aclose())

    @property
    def is_chat_format(self) -> bool:
        return self.response is not None and self.response.request.url.path.endswith("/chat/completions")

    @property
    def has_sense(self) -> bool:
        """Of an answer that was read whole: that it may be shown to litellm."""
        if self.is_chat_format:
            return self.completion() is not None
        try:
            body = _loads(self.response.content) if self.response is not None else None
        except ValueError:
            return False
        return isinstance(body, dict) and not body.get("error")

    def completion(self) -> dict[str, Any] | None:
        """The body of a successful answer in OpenAI's format; None if it is anything else."""
        if self.response is None or not self.response.is_success:
            return None
        try:
            body = _loads(self.response.content)
        except (ValueError, httpx.StreamError):  # not JSON, or not read
            return None
        return body if isinstance(body, dict) and has_choices(body) and not body.get("error") else None


def _loads(data: bytes) -> Any:
    check_shape(data, MAX_VALUES_AT_ONCE)
    return loads(data)


def has_choices(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    return all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def watched(connect_s: float, *, streams: bool = False, room: AnswerRoom | None = None) -> Iterator[Exchange]:
    """What the pool receives in this context is noted on the exchange; it connects within `connect_s`. The exchange is
    over at the end, but for a stream, which is until it was closed."""
    exchange = Exchange(connect_s, streams=streams, room=room)
    token = _current.set(exchange)
    try:
        yield exchange
    except BaseException:
        exchange.end()
        raise
    finally:
        _current.reset(token)
    if not streams:
        exchange.end()


async def _hurry(request: httpx.Request) -> None:
    """Here, where every provider's calls come by: litellm hands most of them one timeout for everything."""
    exchange = _current.get()
    if exchange is not None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {**limits, "connect": exchange.connect_s}
        request.extensions[EXCHANGE] = exchange


async def _note(response: httpx.Response) -> None:
    exchange = _current.get()
    if exchange is not None:
        exchange.response = response
    if coding := response.headers.pop("content-encoding", ""):
        response.stream = _Unpacked(response.stream, coding)  # as httpx would, but for what a few bytes unpack to
    if response.is_error:
        response.stream = _Beginning(response.stream)
        return
    if "amazon.eventstream" not in response.headers.get("content-type", ""):  # frames, which tell their own length
        response.stream = _Bounded(response.stream, exchange or Exchange(0.0), whole=not is_event_stream(response))
    if exchange is not None and not exchange.streams and response.is_success:
        await response.aread()
        if not exchange.has_sense:
            raise NoAnswer("success, and nothing that could be an answer")


HOOKS: Mapping[str, list[Any]] = {"request": [_hurry], "response": [_note]}


class AnswerTooLong(httpx.TransportError):
    """More than is read of one answer, or more than there is room for."""


class NoAnswer(httpx.TransportError):
    """Said to be a success, and no JSON, or not what was asked for."""


class _Beginning(httpx.AsyncByteStream):
    """The first MOST_ERROR_BYTES of a body; the rest is not read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MOST_ERROR_BYTES
        async for piece in self._stream:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Bounded(httpx.AsyncByteStream):
    """A body that is given up once it is larger than can be held, or one of its lines where a stream was asked for."""

    def __init__(self, stream: Any, exchange: Exchange, *, whole: bool) -> None:
        """`whole`: it is held as a whole, if need be."""
        self._stream = stream
        self._exchange = exchange
        self._whole = whole

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange, size = self._exchange, 0
        bounds = exchange.bounds
        add = bounds.add_lines if exchange.streams else bounds.add
        async for piece in self._stream:
            size += len(piece)
            try:
                add(piece)
                if self._whole and size > bounds.room.largest:
                    raise bounds.too_large()
            except UpstreamFailure as failure:
                exchange.fault = failure
                raise AnswerTooLong(failure.message) from failure
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Unpacked(httpx.AsyncByteStream):
    """What a body unpacks to, bit by bit."""

    def __init__(self, stream: Any, coding: str) -> None:
        """Raises NoAnswer."""
        if coding.strip().lower() not in ("gzip", "x-gzip", "deflate", "identity"):
            raise NoAnswer(f"the answer is coded as {coding[:40]}, though it was to be plain")
        self._stream = stream
        self._unpacker = zlib.decompressobj(GZIP_OR_ZLIB) if coding.strip().lower() != "identity" else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            for plain in self._unpacked(piece):
                yield plain

    def _unpacked(self, piece: bytes) -> Iterator[bytes]:
        if self._unpacker is None:
            yield piece
            return
        try:
            while piece:
                yield self._unpacker.decompress(piece, PIECE)
                piece = self._unpacker.unconsumed_tail
        except zlib.error as error:
            raise NoAnswer(f"the answer cannot be unpacked: {error}") from None

    async def aclose(self) -> None:
        await self._stream.aclose()


def is_event_stream(response: httpx.Response) -> bool:
    return "event-stream" in response.headers.get("content-type", "event-stream")


def open_pool(timeout_s: float, outbound: Outbound) -> httpx.AsyncClient:
    most = shares().upstreams
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=min(200, most), keepalive_expiry=KEPT_ALIVE_S)
    return client_over(AsyncTransport(outbound, limits, _trusted), timeout_s)


def client_over(transport: httpx.AsyncBaseTransport, timeout: float | httpx.Timeout | None) -> httpx.AsyncClient:
    """No redirects: an upstream's address comes from its administrator alone. No cookies."""
    return httpx.AsyncClient(
        transport=transport,
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers={"accept-encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        event_hooks=dict(HOOKS),
    )


def _trusted(request: httpx.Request) -> Trust | None:
    exchange: Exchange | None = request.extensions.get(EXCHANGE)
    return None if exchange is None else exchange.trust


class CallTransport(httpx.AsyncBaseTransport):
    """Takes the transport of the call that a request belongs to: for clients that litellm makes and keeps itself."""

    def __init__(self) -> None:
        self._of_none = AsyncTransport(Outbound(os.environ))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange: Exchange | None = request.extensions.get(EXCHANGE)
        of_the_call = exchange.transport if exchange is not None else None
        return await (of_the_call or self._of_none).handle_async_request(request)


async def chunks_of(response: httpx.Response, largest: int = LARGEST) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream in OpenAI's format, untouched. UpstreamFailure where it breaks or ends too early."""
    reader = ChunkReader(exact, AnswerRoom(largest))  # what is on its way is counted by the pool already
    try:
        async for piece in read_gently(response.aiter_bytes()):
            for chunk in reader.feed(piece):
                yield chunk.body
            if reader.over:
                break
        if not reader.over:
            for chunk in reader.close():
                yield chunk.body
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise UpstreamFailure(
            f"the model's stream broke: {type(error).__name__}",
            timed_out=isinstance(error, httpx.TimeoutException),
            lost=not reader.begun and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError),
        ) from error
    finally:
        reader.drop()
        await to_its_end(response.aclose())
    if (fault := reader.fault) is not None:
        raise fault
