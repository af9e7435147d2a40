"""The HTTP side of translated calls: one pool that follows no redirect, and a look at what really came back."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx

from proxy.descriptors import shares
from proxy.errors import UpstreamFailure
from proxy.relay.sse import loads
from proxy.tasks import read_gently, to_its_end
from proxy.upstream.coding import Unpacker, unpacker_of
from proxy.upstream.connections import KEPT_ALIVE_S
from proxy.upstream.events import LAST_WORDS_S, ChunkReader, CompletionReader
from proxy.upstream.failures import error_in, failure_of, no_completion
from proxy.upstream.payload import exact

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_ANSWER_BYTES = 128 * 2**20
"""Of an answer that is no stream: it is held whole."""
MOST_ERROR_BYTES = 16 * 2**10
"""Of an error's body. litellm searches the words of an error again and again, on the event loop: a few megabytes of
them held up every other request for 20 s."""


EXCHANGE = "uniroute.exchange"
"""In the extensions of a request: whose it is."""


class Exchange:
    """The last HTTP response of one upstream call, as the pool saw it: litellm's own objects lose fields."""

    def __init__(self, connect_s: float, *, streams: bool = False, answers: int = 1) -> None:
        self.connect_s = connect_s
        self.streams = streams
        """Whether a stream was asked for."""
        self.answers = answers
        """How many were asked for (`n`)."""
        self.response: httpx.Response | None = None
        self.over_at: float | None = None
        """Monotonic seconds since which nobody waits for anything of it."""

    def end(self) -> None:
        """Whatever it still has open is nobody's from now on."""
        if self.over_at is None:
            self.over_at = monotonic()

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
            body = loads(self.response.content) if self.response is not None else None
        except ValueError:
            return False
        return isinstance(body, dict) and error_in(body) is None

    def completion(self) -> dict[str, Any] | None:
        """The body of a successful answer in OpenAI's format; None if it is anything else."""
        if self.response is None or not self.response.is_success:
            return None
        try:
            return self._read_completion(self.response)
        except (UpstreamFailure, httpx.StreamError):  # something else, or not read
            return None

    def failure_of(self, error: Exception | None, model: str) -> UpstreamFailure:
        """What came in place of a completion. `error`: what litellm made of it."""
        response = self.response
        if self.is_chat_format and response is not None and response.is_success and response.is_stream_consumed:
            with contextlib.suppress(httpx.ResponseNotRead):  # it broke off
                return self._fault_in(response, model)
        return no_completion(model) if error is None else failure_of(error, response, model)

    def _fault_in(self, response: httpx.Response, model: str) -> UpstreamFailure:
        try:
            self._read_completion(response, model)
        except UpstreamFailure as failure:
            return failure
        return no_completion(model, response.content, response.headers)

    def _read_completion(self, response: httpx.Response, model: str = "the model") -> dict[str, Any]:
        reader = CompletionReader(model, exact, answers=self.answers, headers=response.headers)
        reader.feed(response.content)
        return reader.completion().body


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def watched(connect_s: float, *, streams: bool = False, answers: int = 1) -> Iterator[Exchange]:
    """What the pool receives in this context is noted on the exchange; it connects within `connect_s`. The exchange is
    over at the end, but for a stream, which is until it was closed."""
    exchange = Exchange(connect_s, streams=streams, answers=answers)
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
    response.stream = _Unpacked(response.stream, response.headers.pop("content-encoding", None))
    if response.is_error:
        response.stream = _Beginning(response.stream)
        return
    if not (exchange and exchange.streams):
        response.stream = _Bounded(response.stream)
    if exchange is not None and not exchange.streams and response.is_success:
        if exchange.is_chat_format:
            response.stream = _UntilItsEnd(response.stream, exchange.answers)
        await response.aread()
        if not exchange.has_sense:
            raise NoAnswer("success, and nothing that could be an answer")


HOOKS: Mapping[str, list[Any]] = {"request": [_hurry], "response": [_note]}


class AnswerTooLong(httpx.TransportError):
    """More than MOST_ANSWER_BYTES that are no stream."""


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
    """A body that is given up once it is larger than can be held."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._stream:
            size += len(piece)
            if size > MOST_ANSWER_BYTES:
                raise AnswerTooLong(f"the answer is larger than {MOST_ANSWER_BYTES} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


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
    while packed or len(plain) == _UNPACKED_AT_ONCE:
        try:
            plain = unpacker.decompress(packed, _UNPACKED_AT_ONCE)
        except zlib.error as error:
            raise httpx.DecodingError(f"the answer cannot be unpacked: {error}") from None
        packed = unpacker.unconsumed_tail
        yield plain


_UNPACKED_AT_ONCE = 2**20


class _UntilItsEnd(httpx.AsyncByteStream):
    """An answer that is to be whole. Where it is a stream of events all the same, it is over once that has ended."""

    def __init__(self, stream: Any, answers: int) -> None:
        self._stream = stream
        self._answers = answers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader = CompletionReader("the model", exact, answers=self._answers)
        pieces = aiter(self._stream)
        try:
            while not reader.over and (piece := await _next(pieces, reader)) is not None:
                reader.feed(piece)
                yield piece
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


def open_pool(timeout_s: float) -> httpx.AsyncClient:
    """No redirects: an upstream's address comes from its administrator alone. No cookies."""
    most = shares().upstreams
    return httpx.AsyncClient(
        follow_redirects=False,
        timeout=httpx.Timeout(timeout_s),
        limits=httpx.Limits(
            max_connections=most, max_keepalive_connections=min(200, most), keepalive_expiry=KEPT_ALIVE_S
        ),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        event_hooks=dict(HOOKS),
    )


async def chunks_of(response: httpx.Response, answers: int = 1) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream in OpenAI's format, untouched. UpstreamFailure where it breaks or ends too early.

    Args:
        answers: how many were asked for (`n`).
    """
    reader = ChunkReader(exact, answers=answers, headers=response.headers)
    pieces = read_gently(response.aiter_bytes())
    try:
        while not reader.over:
            piece = await _next(pieces, reader)
            for chunk in reader.close() if piece is None else reader.feed(piece):
                yield chunk.body
    except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
        if not reader.break_off():
            raise UpstreamFailure(
                f"the model's stream broke: {type(error).__name__}",
                timed_out=isinstance(error, httpx.TimeoutException),
                lost=not reader.begun and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError),
            ) from error
    finally:
        await to_its_end(response.aclose())
    if (fault := reader.fault) is not None:
        raise fault
