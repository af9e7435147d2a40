"""The HTTP side of translated calls: one pool that follows no redirect, and a look at what really came back."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx

from proxy.descriptors import shares
from proxy.errors import UpstreamFailure
from proxy.http_clients import AsyncTransport
from proxy.outbound import Outbound, Trust
from proxy.relay.sse import loads
from proxy.tasks import read_gently, to_its_end
from proxy.upstream.connections import KEPT_ALIVE_S
from proxy.upstream.events import ChunkReader
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

    def __init__(self, connect_s: float, *, streams: bool = False) -> None:
        self.connect_s = connect_s
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
        return isinstance(body, dict) and not body.get("error")

    def completion(self) -> dict[str, Any] | None:
        """The body of a successful answer in OpenAI's format; None if it is anything else."""
        if self.response is None or not self.response.is_success:
            return None
        try:
            body = loads(self.response.content)
        except (ValueError, httpx.StreamError):  # not JSON, or not read
            return None
        return body if isinstance(body, dict) and has_choices(body) and not body.get("error") else None


def has_choices(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    return all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def watched(connect_s: float, *, streams: bool = False) -> Iterator[Exchange]:
    """What the pool receives in this context is noted on the exchange; it connects within `connect_s`. The exchange is
    over at the end, but for a stream, which is until it was closed."""
    exchange = Exchange(connect_s, streams=streams)
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
    if response.is_error:
        response.stream = _Beginning(response.stream)
        return
    if not is_event_stream(response) or not (exchange and exchange.streams):
        response.stream = _Bounded(response.stream)
    if exchange is not None and not exchange.streams and response.is_success:
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


async def chunks_of(response: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream in OpenAI's format, untouched. UpstreamFailure where it breaks or ends too early."""
    reader = ChunkReader(exact)
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
        await to_its_end(response.aclose())
    if (fault := reader.fault) is not None:
        raise fault
