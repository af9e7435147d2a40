"""What httpx leaves open is closed in time: what was idle for too long, and what was cancelled at the wrong moment.

httpx looks for idle connections, and for those that their upstream closed, only when a request comes. And where a task
is cancelled while it opens or closes a connection, httpcore forgets that connection open, and its place in the pool.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx

from proxy.concurrency import connection_budget, iterate_uncancelled, run_uncancelled
from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.json_limits import MAX_VALUES_AT_ONCE
from proxy.settings.outbound import AsyncTransport, Outbound, Trust
from proxy.upstream.chunk_reader import LAST_WORDS_S, ChunkReader, form_of
from proxy.upstream.completion_reader import CompletionReader
from proxy.upstream.connection import PIECE, Unpacker, unpacker_of
from proxy.upstream.errors import error_from_exception, error_in, not_a_completion
from proxy.upstream.payload import parse_exact
from proxy.upstream.pool import KEPT_ALIVE_S
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


# In the extensions of a request: whose it is.
EXCHANGE = "uniroute.exchange"


class CapturedResponse:
    """The last HTTP response of one upstream call, as the pool saw it: litellm's own objects lose fields."""

    def __init__(
        self,
        connect_s: float,
        *,
        streams: bool = False,
        answers: int = 1,
        room: ResponseMemory | None = None,
        model: str = "the model",
    ) -> None:
        """
        Args:
            streams: whether a stream was asked for.
            answers: how many were asked for (`n`).
            room: for what is held of its answer.
            model: our name for it.
        """
        self.connect_s = connect_s
        self.model = model
        self.streams = streams
        self.answers = answers
        # Whether a stream of it is in the format that we read.
        self.in_openais_format = False
        self.bounds = ResponseBounds(room or ResponseMemory(), MAX_VALUES_AT_ONCE)
        # What came as a whole answer in OpenAI's format.
        self.completion: dict[str, Any] | None = None
        # What was wrong with its answer, whatever the library in between made of that.
        self.fault: UpstreamError | None = None
        # Whose certificates count; None: the usual.
        self.trust: Trust | None = None
        # Of the pool that a client which litellm made itself takes too.
        self.transport: httpx.AsyncBaseTransport | None = None
        self.response: httpx.Response | None = None
        # Monotonic seconds since which nobody waits for anything of it.
        self.over_at: float | None = None

    def end(self) -> None:
        """Whatever it still has open is nobody's from now on."""
        if self.over_at is None:
            self.over_at = monotonic()
        self.bounds.held.release()

    async def aclose(self) -> None:
        """The upstream's connection, for certain."""
        self.end()
        if self.response is not None and not self.response.is_closed:
            await run_uncancelled(self.response.aclose())

    @property
    def is_chat_format(self) -> bool:
        return self.response is not None and self.response.request.url.path.endswith("/chat/completions")

    @property
    def is_read_here(self) -> bool:
        """Whether its answer is read by us, and bounded meanwhile, and not by the library in between."""
        return self.is_chat_format and (self.in_openais_format or not self.streams)

    def begin(self, response: httpx.Response) -> None:
        """This is its answer, in place of any before."""
        self.response = response
        self.completion = self.fault = None
        self.bounds.restart()

    async def read(self, response: httpx.Response) -> None:
        """Of an answer that is to be whole. Raises NoAnswer: it may not be shown to the library in between."""
        if not self.is_chat_format:
            await response.aread()
            try:
                body = parse_exact(response.content)[0]
            except ValueError:
                body = None
            if not isinstance(body, dict) or error_in(body) is not None:
                raise UnusableResponse("success, and nothing that could be an answer")
            return
        reader = CompletionReader(self.model, self.bounds, parse_exact, answers=self.answers, headers=response.headers)
        response.stream = _UntilItsEnd(response.stream, reader, self)
        await response.aread()
        try:
            self.completion = reader.completion().body
        except UpstreamError as failure:
            self.fault = failure
            raise UnusableResponse(failure.message) from failure
        if reader.of_events:  # which it would search for words of an error, on the event loop
            raise UnusableResponse("a whole answer in events")

    def failure_of(self, error: Exception | None) -> UpstreamError:
        """What came in place of a completion. `error`: what the library in between made of it."""
        if self.fault is not None:
            return self.fault
        return not_a_completion(self.model) if error is None else error_from_exception(error, self.response, self.model)


_current: ContextVar[CapturedResponse | None] = ContextVar("exchange", default=None)


@contextmanager
def capture(
    connect_s: float,
    *,
    streams: bool = False,
    answers: int = 1,
    room: ResponseMemory | None = None,
    model: str = "the model",
) -> Iterator[CapturedResponse]:
    """What the pool receives in this context is noted on the exchange; it connects within `connect_s`. The exchange is
    over at the end, but for a stream, which is until it was closed."""
    exchange = CapturedResponse(connect_s, streams=streams, answers=answers, room=room, model=model)
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


async def _set_connect_timeout(request: httpx.Request) -> None:
    """Here, where every provider's calls come by: litellm hands most of them one timeout for everything."""
    exchange = _current.get()
    if exchange is not None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {**limits, "connect": exchange.connect_s}
        request.extensions[EXCHANGE] = exchange


async def _capture_response(response: httpx.Response) -> None:
    exchange = _current.get()
    if exchange is not None:
        exchange.begin(response)
    # as httpx would, but by its bytes, and bit by bit
    response.stream = _Unpacked(response.stream, response.headers.pop("content-encoding", None))
    if response.is_error:
        response.stream = _Beginning(response.stream)
        return
    framed = "amazon.eventstream" in response.headers.get("content-type", "")  # and its frames tell their own length
    if not framed and (exchange is None or not exchange.is_read_here):
        response.stream = _Bounded(response.stream, exchange or CapturedResponse(0.0))
    if exchange is not None and not exchange.streams and response.is_success:
        await exchange.read(response)


HOOKS: Mapping[str, list[Any]] = {"request": [_set_connect_timeout], "response": [_capture_response]}


class AnswerTooLong(httpx.TransportError):
    """More than is read of one answer, or more than there is room for."""


class UnusableResponse(httpx.TransportError):
    """Said to be a success, and no JSON, or not what was asked for."""


class _Beginning(httpx.AsyncByteStream):
    """The first MOST_ERROR_BYTES of a body; the rest is not read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ERROR_BYTES
        async for piece in self._stream:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Bounded(httpx.AsyncByteStream):
    """A body that is given up once it is larger than can be held, or one of its lines where a stream was asked for."""

    def __init__(self, stream: Any, exchange: CapturedResponse) -> None:
        self._stream = stream
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange, size, events = self._exchange, 0, False
        bounds = exchange.bounds
        add = bounds.add_lines if exchange.streams else bounds.add
        async for piece in self._stream:
            events = events or (size == 0 and form_of(piece) == "events")
            size += len(piece)
            try:
                add(piece)
                if size > bounds.room.largest and not (exchange.streams and events):
                    raise bounds.too_large()
            except UpstreamError as failure:
                exchange.fault = failure
                raise AnswerTooLong(failure.message) from failure
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class _UntilItsEnd(httpx.AsyncByteStream):
    """An answer that is to be whole, seen by its reader. Where it is a stream of events all the same, it is over once
    that has ended."""

    def __init__(self, stream: Any, reader: CompletionReader, exchange: CapturedResponse) -> None:
        self._stream = stream
        self._reader = reader
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader, pieces = self._reader, aiter(self._stream)
        try:
            while not reader.over and (piece := await _next(pieces, reader)) is not None:
                reader.feed(piece)
                yield piece
        except UpstreamError as failure:
            self._exchange.fault = failure
            raise AnswerTooLong(failure.message) from failure
        except (httpx.TransportError, TimeoutError):
            if not reader.break_off():
                raise

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _next(pieces: AsyncIterator[bytes], reader: ChunkReader | CompletionReader) -> bytes | None:
    """What comes next; None at the end. TimeoutError where the answer has ended and nothing more comes soon."""
    if not reader.finished:
        return await anext(pieces, None)
    async with asyncio.timeout(LAST_WORDS_S):
        return await anext(pieces, None)


class _Unpacked(httpx.AsyncByteStream):
    """A body in plain, whatever its content-encoding says."""

    def __init__(self, stream: Any, coding: str | None) -> None:
        self._stream = stream
        self._coding = coding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        unpacker: Unpacker | None = None
        begun = False
        async for piece in self._stream:
            if not begun and piece:
                begun, unpacker = True, unpacker_of(self._coding, piece)
            if unpacker is None:
                yield piece
                continue
            for plain in _unpacked(unpacker, piece):
                yield plain

    async def aclose(self) -> None:
        await self._stream.aclose()


def _unpacked(unpacker: Unpacker, packed: bytes) -> Iterator[bytes]:
    """Bit by bit, so that a little that unpacks to much is never held whole."""
    plain = b""
    while packed or len(plain) == PIECE:
        try:
            plain = unpacker.decompress(packed, PIECE)
        except zlib.error as error:
            raise UnusableResponse(f"the answer cannot be unpacked: {error}") from None
        packed = unpacker.unconsumed_tail
        yield plain


def open_pool(timeout_s: float, outbound: Outbound) -> httpx.AsyncClient:
    most = connection_budget().upstreams
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
    exchange: CapturedResponse | None = request.extensions.get(EXCHANGE)
    return None if exchange is None else exchange.trust


class CallTransport(httpx.AsyncBaseTransport):
    """Takes the transport of the call that a request belongs to: for clients that litellm makes and keeps itself."""

    def __init__(self) -> None:
        self._of_none = AsyncTransport(Outbound(os.environ))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange: CapturedResponse | None = request.extensions.get(EXCHANGE)
        of_the_call = exchange.transport if exchange is not None else None
        return await (of_the_call or self._of_none).handle_async_request(request)


async def chunks_of(
    response: httpx.Response, room: ResponseMemory | None = None, answers: int = 1
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream in OpenAI's format, untouched. UpstreamFailure where it breaks or ends too early.

    Args:
        room: for what is held of it.
        answers: how many were asked for (`n`).
    """
    reader = ChunkReader(parse_exact, room=room, answers=answers, headers=response.headers)
    pieces = iterate_uncancelled(response.aiter_bytes())
    try:
        while not reader.over:
            piece = await _next(pieces, reader)
            for chunk in reader.close() if piece is None else reader.feed(piece):
                yield chunk.body
    except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
        if not reader.break_off():
            raise UpstreamError(
                f"the model's stream broke: {type(error).__name__}",
                timed_out=isinstance(error, httpx.TimeoutException),
                lost=not reader.begun and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError),
            ) from error
    finally:
        reader.drop()
        await run_uncancelled(response.aclose())
    if (fault := reader.fault) is not None:
        raise fault


# In which a call that is over closes its connection by itself, as nearly all do.
GRACE_S = 1.0


async def reap_connections(pool: httpx.AsyncClient, every_s: float = 1.0, grace_s: float = GRACE_S) -> None:
    """For ever."""
    ways: Any = pool._transport
    while True:
        await asyncio.sleep(every_s)
        for layer in [transport._pool for transport in ways.open]:
            _let_go(layer, monotonic() - grace_s)
            for connection in _expired(layer):
                await connection.aclose()


def _let_go(layer: Any, before: float) -> None:
    """Requests of calls that were over by then have lost their connections."""
    for waiting in list(layer._requests):
        exchange: CapturedResponse | None = waiting.request.extensions.get(EXCHANGE)
        if exchange is not None and exchange.over_at is not None and exchange.over_at < before:
            layer._requests.remove(waiting)


def _expired(layer: Any) -> list[Any]:
    """Connections to close: idle for too long, or in use, or about to be, by no request: no other will ever get one."""
    in_use = {id(waiting.connection) for waiting in layer._requests}
    kept, closing = list[Any](), list[Any]()
    for connection in layer.connections:
        resting = connection.is_idle() or connection.is_closed()
        gone = connection.has_expired() if resting else id(connection) not in in_use
        (closing if gone else kept).append(connection)
    layer._connections = kept
    return closing
