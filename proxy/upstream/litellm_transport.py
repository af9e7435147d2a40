from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import warnings
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import Any

import httpx

from proxy.concurrency import connection_budget, iterate_uncancelled, run_uncancelled
from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.json_limits import MAX_VALUES_AT_ONCE
from proxy.settings.outbound import AsyncTransport, Outbound, Trust, http_client
from proxy.upstream.chunk_reader import MAX_TAIL_S, ChunkReader, body_format
from proxy.upstream.completion_reader import CompletionReader
from proxy.upstream.errors import error_from_exception, find_error, not_a_completion
from proxy.upstream.payload import parse_exact
from proxy.upstream.pool import KEEP_ALIVE_S, Decompressor, decompressor_for
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory

_WARM_UP_RESPONSE = {
    "id": "warm-up",
    "object": "chat.completion",
    "created": 0,
    "model": "warm-up",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "-"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def import_litellm() -> Any:
    """Import litellm and switch off what it does beside calling models.

    This takes seconds: call it in a thread. It raises whatever litellm raises, and may be called again then.
    """
    try:
        return _import_and_configure()
    except BaseException:
        # the next attempt would take what is left of a failed import for whole modules
        for name in [name for name in sys.modules if name.partition(".")[0] == "litellm"]:
            del sys.modules[name]
        raise


def _import_and_configure() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise its import fetches a price map from the network
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    litellm.drop_params = False
    litellm.modify_params = False
    litellm.user_url_validation = True  # some formats carry media within: it fetches them, and must not from inside
    litellm.user_url_allowed_hosts = []
    for hooks in ("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback"):
        setattr(litellm, hooks, [])
    warnings.filterwarnings("ignore", message="Item .* on TypedDict", category=UserWarning)  # of its own models
    warnings.filterwarnings("ignore", message="coroutine '.*acompletion' was never awaited", category=RuntimeWarning)
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # its error lines carry prompts
    _replace_http_clients()
    return litellm


def _replace_http_clients() -> None:
    """Replace the HTTP clients that litellm makes by ours.

    Its own would follow a redirect, which takes the prompt, and in some formats the key, to wherever the upstream
    points. It would also read proxies and certificates itself.
    """
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler, HTTPHandler
    from litellm.llms.openai.common_utils import BaseOpenAILLM

    AsyncHTTPHandler.create_client = _async_client
    HTTPHandler.create_client = _client
    BaseOpenAILLM._get_async_http_client = staticmethod(_async_client)
    BaseOpenAILLM._get_sync_http_client = staticmethod(_client)


def _async_client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.AsyncClient:
    return client_over(CallTransport(), timeout)


def _client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.Client:
    return http_client(timeout=timeout)


def disable_request_logging() -> None:
    """Keep litellm from making log entries of what this task calls from now on.

    Without callbacks nobody reads them, and they are made on the event loop: a third of the cost of a call, and a
    search through the whole text of a long error.
    """
    from litellm._internal_context import is_internal_call

    is_internal_call.set(True)


async def warm_up(litellm: Any) -> None:
    """Call a mock of each kind: litellm imports half of itself on the first call, and more on the first failure."""
    import openai

    nowhere = httpx.MockTransport(_nowhere)
    async with httpx.AsyncClient(transport=nowhere, trust_env=False) as pool:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://nowhere.invalid/v1", http_client=pool, max_retries=0)
        for stream in (False, True):
            await litellm.acompletion(
                model="openai/warm-up", messages=[{"role": "user", "content": "-"}], client=client, stream=stream
            )
        with contextlib.suppress(openai.OpenAIError):
            await litellm.acompletion(
                model="openai/unreachable", messages=[{"role": "user", "content": "-"}], client=client, max_retries=0
            )


def _nowhere(request: httpx.Request) -> httpx.Response:
    if b"unreachable" in request.content:
        raise httpx.ConnectError("nowhere")
    return httpx.Response(200, json=_WARM_UP_RESPONSE)


def http_handler(pool: httpx.AsyncClient) -> Any:
    """Make litellm's own client class over our pool, for the providers that do not use OpenAI's SDK."""
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

    class OnceHandler(AsyncHTTPHandler):  # type: ignore[misc]  # a base that mypy does not follow
        """A handler that sends a request once.

        After a broken connection litellm's sends it again through a client of its own: billed twice, recorded once.
        """

        async def single_connection_post_request(self, *_: Any, **__: Any) -> Any:
            raise  # the exception that is being handled by the caller

    handler = OnceHandler(event_hooks=HOOKS, follow_redirects=False)
    handler.client = pool
    return handler


# The extension of a request that holds its CapturedResponse.
CAPTURED = "uniroute.exchange"

# A decompressed body is passed on in pieces of this size.
_PIECE_BYTES = 256 * 2**10

# How long a finished call may take to close its connection itself, as nearly all do.
GRACE_PERIOD_S = 1.0

REAP_INTERVAL_S = 1.0


class OversizedResponse(httpx.TransportError):
    """A response is larger than is read, or than there is memory for."""


class UnusableResponse(httpx.TransportError):
    """A response with a success status is no JSON, or not what was asked for."""


class CapturedResponse:
    """The last HTTP response of one call of litellm, whose own objects lose fields of it."""

    def __init__(
        self,
        connect_timeout_s: float,
        *,
        stream: bool = False,
        choices: int = 1,
        memory: ResponseMemory | None = None,
        model: str = "the model",
        max_vector_values: int | None = None,
    ) -> None:
        """
        Args:
            stream: whether a stream was asked for.
            choices: how many were asked for (`n`).
            memory: for what is held of the response.
            model: our name of the model.
            max_vector_values: how many numbers embeddings may hold; None: a completion was asked for.
        """
        self.connect_timeout_s = connect_timeout_s
        self.model = model
        self.stream = stream
        self.choices = choices
        # Whether a stream is in OpenAI's format.
        self.openai_format = False
        self.embeds = max_vector_values is not None
        self.bounds = ResponseBounds(memory or ResponseMemory(), max_vector_values or MAX_VALUES_AT_ONCE)
        # A whole completion in OpenAI's format.
        self.completion: dict[str, Any] | None = None
        # What was wrong with the response, whatever litellm made of that.
        self.error: UpstreamError | None = None
        # Which certificates are trusted; None: the default.
        self.trust: Trust | None = None
        # The transport of our pool, for clients that litellm made itself.
        self.transport: httpx.AsyncBaseTransport | None = None
        self.response: httpx.Response | None = None
        # Monotonic seconds at which the call ended.
        self.ended_at: float | None = None

    def end(self) -> None:
        """Note that the call has ended, whatever it still has open."""
        if self.ended_at is None:
            self.ended_at = monotonic()
        self.bounds.held.release()

    async def aclose(self) -> None:
        """End the call and close the upstream's connection, even if cancelled."""
        self.end()
        if self.response is not None and not self.response.is_closed:
            await run_uncancelled(self.response.aclose())

    @property
    def is_chat_format(self) -> bool:
        return self.response is not None and self.response.request.url.path.endswith("/chat/completions")

    @property
    def is_read_here(self) -> bool:
        """Return whether we read and bound the response, and not litellm."""
        return self.is_chat_format and (self.openai_format or not self.stream)

    def start(self, response: httpx.Response) -> None:
        """Take this response in place of any before."""
        self.response = response
        self.completion = self.error = None
        self.bounds.restart()

    async def read(self, response: httpx.Response) -> None:
        """Read a response that is no stream. Raises UnusableResponse: litellm must not see it."""
        if self.embeds:  # what litellm makes of them is checked
            await response.aread()
            return
        if not self.is_chat_format:
            await response.aread()
            try:
                body = parse_exact(response.content)[0]
            except ValueError:
                body = None
            if not isinstance(body, dict) or find_error(body) is not None:
                raise UnusableResponse("success, and nothing that could be an answer")
            return
        reader = CompletionReader(self.model, self.bounds, parse_exact, choices=self.choices, headers=response.headers)
        response.stream = _CompletionStream(response.stream, reader, self)
        await response.aread()
        try:
            self.completion = reader.completion().body
        except UpstreamError as error:
            self.error = error
            raise UnusableResponse(error.message) from error
        if reader.is_events:  # litellm would search them for words of an error, on the event loop
            raise UnusableResponse("a whole answer in events")

    def error_from(self, error: Exception | None) -> UpstreamError:
        """Return what came in place of a completion. `error`: what litellm made of it."""
        if self.error is not None:
            return self.error
        return not_a_completion(self.model) if error is None else error_from_exception(error, self.response, self.model)


_current: ContextVar[CapturedResponse | None] = ContextVar("exchange", default=None)


@contextmanager
def capture(
    connect_timeout_s: float,
    *,
    stream: bool = False,
    choices: int = 1,
    memory: ResponseMemory | None = None,
    model: str = "the model",
    max_vector_values: int | None = None,
) -> Iterator[CapturedResponse]:
    """Capture what the pool receives in this context, and connect within the timeout.

    The call ends with the context, but a stream only when it is closed.
    """
    captured = CapturedResponse(
        connect_timeout_s,
        stream=stream,
        choices=choices,
        memory=memory,
        model=model,
        max_vector_values=max_vector_values,
    )
    token = _current.set(captured)
    try:
        yield captured
    except BaseException:
        captured.end()
        raise
    finally:
        _current.reset(token)
    if not stream:
        captured.end()


async def _set_connect_timeout(request: httpx.Request) -> None:
    """Set it where all providers' calls pass: litellm gives most of them one timeout for everything."""
    captured = _current.get()
    if captured is not None:
        timeouts = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {**timeouts, "connect": captured.connect_timeout_s}
        request.extensions[CAPTURED] = captured


async def _capture_response(response: httpx.Response) -> None:
    captured = _current.get()
    if captured is not None:
        captured.start(response)
    # httpx would do the same, but for whole bodies, and by the header alone
    response.stream = _Decompressed(response.stream, response.headers.pop("content-encoding", None))
    if response.is_error:
        response.stream = _ErrorPrefix(response.stream)
        return
    # Amazon's frames state their own length.
    framed = "amazon.eventstream" in response.headers.get("content-type", "")
    if not framed and (captured is None or not captured.is_read_here):
        response.stream = _Bounded(response.stream, captured or CapturedResponse(0.0))
    if captured is not None and not captured.stream and response.is_success:
        await captured.read(response)


HOOKS: Mapping[str, list[Any]] = {"request": [_set_connect_timeout], "response": [_capture_response]}


class _WrappedStream(httpx.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def aclose(self) -> None:
        await self._stream.aclose()


class _ErrorPrefix(_WrappedStream):
    """The first MAX_ERROR_BYTES of a body; the rest is not read."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ERROR_BYTES
        async for piece in self._stream:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return


class _Bounded(_WrappedStream):
    """A body that fails when it is larger than can be held, or one line of it if a stream was asked for."""

    def __init__(self, stream: Any, captured: CapturedResponse) -> None:
        super().__init__(stream)
        self._captured = captured

    async def __aiter__(self) -> AsyncIterator[bytes]:
        captured, size, events = self._captured, 0, False
        bounds = captured.bounds
        add = bounds.add_lines if captured.stream else bounds.add
        async for piece in self._stream:
            events = events or (size == 0 and body_format(piece) == "events")
            size += len(piece)
            try:
                add(piece)
                if size > bounds.memory.max_response_bytes and not (captured.stream and events):
                    raise bounds.too_large()
            except UpstreamError as error:
                captured.error = error
                raise OversizedResponse(error.message) from error
            yield piece


class _CompletionStream(_WrappedStream):
    """A body that a CompletionReader reads along. It ends when a stream of events in it has ended."""

    def __init__(self, stream: Any, reader: CompletionReader, captured: CapturedResponse) -> None:
        super().__init__(stream)
        self._reader = reader
        self._captured = captured

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader, pieces = self._reader, aiter(self._stream)
        try:
            while not reader.done and (piece := await _read_next(pieces, reader)) is not None:
                reader.feed(piece)
                yield piece
        except UpstreamError as error:
            self._captured.error = error
            raise OversizedResponse(error.message) from error
        except (httpx.TransportError, TimeoutError):
            if not reader.break_off():
                raise


async def _read_next(pieces: AsyncIterator[bytes], reader: ChunkReader | CompletionReader) -> bytes | None:
    """Return the next piece, or None at the end. TimeoutError if nothing more comes soon after the finished answer."""
    if not reader.finished:
        return await anext(pieces, None)
    async with asyncio.timeout(MAX_TAIL_S):
        return await anext(pieces, None)


class _Decompressed(_WrappedStream):
    """A body without its compression, whatever its content-encoding says."""

    def __init__(self, stream: Any, coding: str | None) -> None:
        super().__init__(stream)
        self._coding = coding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        decompressor: Decompressor | None = None
        started = False
        async for piece in self._stream:
            if not started and piece:
                started, decompressor = True, decompressor_for(self._coding, piece)
            if decompressor is None:
                yield piece
                continue
            for plain in _decompress(decompressor, piece):
                yield plain


def _decompress(decompressor: Decompressor, data: bytes) -> Iterator[bytes]:
    """Decompress in pieces, so that a small body that becomes a large one is never held whole."""
    plain = b""
    while data or len(plain) == _PIECE_BYTES:
        try:
            plain = decompressor.decompress(data, _PIECE_BYTES)
        except zlib.error as error:
            raise UnusableResponse(f"the answer cannot be unpacked: {error}") from None
        data = decompressor.unconsumed_tail
        yield plain


def open_pool(timeout_s: float, outbound: Outbound) -> httpx.AsyncClient:
    max_open = connection_budget().upstreams
    limits = httpx.Limits(
        max_connections=max_open, max_keepalive_connections=min(200, max_open), keepalive_expiry=KEEP_ALIVE_S
    )
    return client_over(AsyncTransport(outbound, limits, _trust_of), timeout_s)


def client_over(transport: httpx.AsyncBaseTransport, timeout: float | httpx.Timeout | None) -> httpx.AsyncClient:
    """Make a client without redirects and cookies: only the administrator chooses an upstream's address."""
    return httpx.AsyncClient(
        transport=transport,
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers={"accept-encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        event_hooks=dict(HOOKS),
    )


def _trust_of(request: httpx.Request) -> Trust | None:
    captured: CapturedResponse | None = request.extensions.get(CAPTURED)
    return None if captured is None else captured.trust


class CallTransport(httpx.AsyncBaseTransport):
    """Send each request over the pool of the call that it belongs to. For clients that litellm makes and keeps."""

    def __init__(self) -> None:
        self._without_call = AsyncTransport(Outbound(os.environ))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        captured: CapturedResponse | None = request.extensions.get(CAPTURED)
        transport = captured.transport if captured is not None else None
        return await (transport or self._without_call).handle_async_request(request)


async def read_chunks(
    response: httpx.Response, memory: ResponseMemory | None = None, choices: int = 1
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the chunks of a stream in OpenAI's format, unchanged.

    Args:
        memory: for what is held of the stream.
        choices: how many were asked for (`n`).

    Raises:
        UpstreamError: it breaks or ends too early.
    """
    reader = ChunkReader(parse_exact, memory=memory, choices=choices, headers=response.headers)
    pieces = iterate_uncancelled(response.aiter_bytes())
    try:
        while not reader.done:
            piece = await _read_next(pieces, reader)
            for chunk in reader.close() if piece is None else reader.feed(piece):
                yield chunk.body
    except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
        if not reader.break_off():
            raise UpstreamError(
                f"the model's stream broke: {type(error).__name__}",
                timed_out=isinstance(error, httpx.TimeoutException),
                connection_lost=not reader.started
                and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError),
            ) from error
    finally:
        reader.release()
        await run_uncancelled(response.aclose())
    if (final_error := reader.final_error) is not None:
        raise final_error


async def reap_connections(
    pool: httpx.AsyncClient, interval_s: float = REAP_INTERVAL_S, grace_period_s: float = GRACE_PERIOD_S
) -> None:
    """Close, for ever, what httpx leaves open.

    httpx looks for idle connections, and for those that their upstream closed, only when a request comes. And if a task
    is cancelled while it opens or closes a connection, httpcore forgets that connection open, and its slot in the pool.
    """
    transport: Any = pool._transport
    while True:
        await asyncio.sleep(interval_s)
        for connection_pool in [each._pool for each in transport.open]:
            _drop_ended_requests(connection_pool, monotonic() - grace_period_s)
            for connection in _take_expired(connection_pool):
                await connection.aclose()


def _drop_ended_requests(connection_pool: Any, before: float) -> None:
    """Take the connections from requests whose call had ended by then."""
    for request in list(connection_pool._requests):
        captured: CapturedResponse | None = request.request.extensions.get(CAPTURED)
        if captured is not None and captured.ended_at is not None and captured.ended_at < before:
            connection_pool._requests.remove(request)


def _take_expired(connection_pool: Any) -> list[Any]:
    """Take the connections to close out of the pool: idle for too long, or busy without a request that owns them."""
    in_use = {id(request.connection) for request in connection_pool._requests}
    kept, expired = list[Any](), list[Any]()
    for connection in connection_pool.connections:
        idle = connection.is_idle() or connection.is_closed()
        gone = connection.has_expired() if idle else id(connection) not in in_use
        (expired if gone else kept).append(connection)
    connection_pool._connections = kept
    return expired
