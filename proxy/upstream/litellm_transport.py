from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import warnings
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpx

from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.json_text import MAX_VALUES_AT_ONCE
from proxy.settings.outbound import AsyncTransport, Outbound, Trust, http_client
from proxy.upstream.chunk_reader import MAX_TAIL_S, body_format
from proxy.upstream.completion_reader import CompletionReader
from proxy.upstream.errors import error_from_exception, find_error, not_a_completion
from proxy.upstream.httpx_transport import CALL, STREAM, ResponseStream
from proxy.upstream.payload import parse
from proxy.upstream.pool import DECOMPRESSED_PIECE_BYTES, Decompressor, UpstreamResponse, decompressor_for
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
    warnings.filterwarnings("ignore", message="Items? .* on TypedDict", category=UserWarning)  # of its own models
    # a thread of its makes them, for a task that may be cancelled meanwhile
    never_awaited = "coroutine '.*(completion|streaming).*' was never awaited"
    warnings.filterwarnings("ignore", message=never_awaited, category=RuntimeWarning)
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
    AsyncHTTPHandler.single_connection_post_request = _not_again
    HTTPHandler.create_client = _client
    BaseOpenAILLM._get_async_http_client = staticmethod(_async_client)
    BaseOpenAILLM._get_sync_http_client = staticmethod(_client)


def _async_client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.AsyncClient:
    return client_over(CallTransport(), timeout)


async def _not_again(*_: Any, **__: Any) -> Any:
    """Send no request a second time.

    After a broken connection litellm's handler does, through a client of its own: billed twice, recorded once.
    """
    raise  # the exception that is being handled by the caller


def _client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.Client:
    headers = {"accept-encoding": "identity"}
    return http_client(timeout=timeout, headers=headers, event_hooks={"response": [_bound_in_thread]})


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


def http_handler(http: httpx.AsyncClient) -> Any:
    """Make litellm's own client class over our connections, for the providers that do not use OpenAI's SDK."""
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

    handler = AsyncHTTPHandler(event_hooks=HOOKS, follow_redirects=False)
    handler.client = http
    return handler


class OversizedResponse(httpx.TransportError):
    """A response is larger than is read, or than there is memory for."""


class UnusableResponse(httpx.TransportError):
    """A response with a success status is no JSON, or not what was asked for."""


class ResponseTaken(BaseException):
    """The response is in OpenAI's format, which needs no litellm any more: the call is over.

    Like a cancellation it is no Exception, so that nothing on its way takes it for a failure.
    """


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
        # Whether the upstream answers in OpenAI's format.
        self.openai_format = False
        self.embeds = max_vector_values is not None
        self.bounds = ResponseBounds(memory or ResponseMemory(), max_vector_values or MAX_VALUES_AT_ONCE)
        # What was wrong with the response, whatever litellm made of that.
        self.error: UpstreamError | None = None
        # Which certificates are trusted; None: the default.
        self.trust: Trust | None = None
        # The transport of our client, for clients that litellm made itself.
        self.transport: httpx.AsyncBaseTransport | None = None
        self.response: httpx.Response | None = None
        # All that hold a connection.
        self.responses: set[ResponseStream] = set()
        self._taken: UpstreamResponse | None = None

    def end(self) -> None:
        """Close what the call still has open, and give its memory back. May be called again."""
        for stream in tuple(self.responses):
            stream.close()
        if self._taken is not None:
            self._taken.close()
        self.bounds.held.release()

    def take(self, response: httpx.Response) -> None:
        """Take a response in OpenAI's format out of litellm's hands. Raises ResponseTaken."""
        stream: ResponseStream = response.extensions[STREAM]
        self._taken = stream.take()
        raise ResponseTaken

    def hand_over(self) -> UpstreamResponse:
        """Return the response that was taken, to a caller who closes it."""
        taken, self._taken = self._taken, None
        assert taken is not None
        return taken

    @property
    def is_chat_format(self) -> bool:
        return self.response is not None and self.response.request.url.path.endswith("/chat/completions")

    def start(self, response: httpx.Response) -> None:
        """Note this response in place of any before."""
        self.response = response
        self.error = None
        self.bounds.restart()

    async def read(self, response: httpx.Response) -> None:
        """Read a response that is no stream. Raises UnusableResponse: litellm must not see it."""
        if self.embeds:  # what litellm makes of them is checked
            await response.aread()
            return
        if not self.is_chat_format:
            await response.aread()
            try:
                body = parse(response.content)[0]
            except ValueError:
                body = None
            if not isinstance(body, dict) or find_error(body) is not None:
                raise UnusableResponse("success, and nothing that could be an answer")
            return
        reader = CompletionReader(self.model, self.bounds, choices=self.choices, headers=response.headers)
        response.stream = _CompletionStream(response.stream, reader, self)
        await response.aread()
        try:
            reader.completion()
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
    """Capture what our clients receive in this context, and connect within the timeout.

    The call ends with the context, but a stream only by `CapturedResponse.end`.
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


@contextmanager
def in_call(captured: CapturedResponse) -> Iterator[None]:
    """Capture in this context what a call receives later: some streams send their request when they are first read."""
    token = _current.set(captured)
    try:
        yield
    finally:
        _current.reset(token)


async def _set_connect_timeout(request: httpx.Request) -> None:
    """Set it where all providers' calls pass: litellm gives most of them one timeout for everything."""
    captured = _current.get()
    if captured is not None:
        timeouts = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {**timeouts, "connect": captured.connect_timeout_s}
        request.extensions[CALL] = captured


async def _capture_response(response: httpx.Response) -> None:
    captured = _current.get()
    if captured is not None:
        captured.start(response)
    if response.is_error:
        response.stream = _ErrorPrefix(response.stream)
        return
    if captured is None:
        response.stream = _Bounded(response.stream, CapturedResponse(0.0))
        return
    if captured.openai_format and captured.is_chat_format and response.is_success:
        captured.take(response)
    is_read_here = captured.is_chat_format and not captured.stream and response.is_success
    # Amazon's frames state their own length.
    if not is_read_here and "amazon.eventstream" not in response.headers.get("content-type", ""):
        response.stream = _Bounded(response.stream, captured)
    if not captured.stream and response.is_success:
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


def _bound_in_thread(response: httpx.Response) -> None:
    """Bound what a blocking client reads, by which litellm calls some providers in threads."""
    captured = _current.get() or CapturedResponse(0.0)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        message = f"{captured.model} sent a compressed answer, where a plain one was asked for"
        captured.error = error = UpstreamError(message, status=502)
        raise UnusableResponse(message) from error
    response.stream = _BoundedInThread(response.stream, captured)


class _BoundedInThread(httpx.SyncByteStream):
    """A body that fails when it is larger than one may be. The memory for all together is of the event loop."""

    def __init__(self, stream: Any, captured: CapturedResponse) -> None:
        self._stream = stream
        self._captured = captured

    def __iter__(self) -> Iterator[bytes]:
        bounds, size = self._captured.bounds, 0
        for piece in self._stream:
            size += len(piece)
            if size > bounds.memory.max_response_bytes:
                self._captured.error = error = bounds.too_large()
                raise OversizedResponse(error.message) from error
            yield piece

    def close(self) -> None:
        self._stream.close()


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


async def _read_next(pieces: AsyncIterator[bytes], reader: CompletionReader) -> bytes | None:
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
    while data or len(plain) == DECOMPRESSED_PIECE_BYTES:
        try:
            plain = decompressor.decompress(data, DECOMPRESSED_PIECE_BYTES)
        except zlib.error as error:
            raise UnusableResponse(f"the answer cannot be unpacked: {error}") from None
        data = decompressor.unconsumed_tail
        yield plain


class _NoCookies(httpx.Cookies):
    """Keep none. httpx's own looks for them in every response, for a twentieth of the cost of a call."""

    def extract_cookies(self, response: httpx.Response) -> None:
        pass


class _ClientWithoutCookies(httpx.AsyncClient):
    _none_kept = _NoCookies()

    @property
    def cookies(self) -> httpx.Cookies:
        return self._none_kept

    @cookies.setter
    def cookies(self, cookies: object) -> None:
        """Keep none."""


def client_over(transport: httpx.AsyncBaseTransport, timeout: float | httpx.Timeout | None) -> httpx.AsyncClient:
    """Make a client without redirects and cookies: only the administrator chooses an upstream's address."""
    return _ClientWithoutCookies(
        transport=transport,
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers={"accept-encoding": "identity"},
        event_hooks=dict(HOOKS),
    )


class CallTransport(httpx.AsyncBaseTransport):
    """Send each request over the transport of the call that it belongs to. For clients that litellm makes and keeps."""

    def __init__(self) -> None:
        # Such a client may be of another event loop than ours.
        self._without_call = AsyncTransport(Outbound(os.environ))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        captured: CapturedResponse | None = request.extensions.get(CALL)
        if captured is not None and captured.transport is not None:
            return await captured.transport.handle_async_request(request)
        response = await self._without_call.handle_async_request(request)
        # httpx would do the same, but for whole bodies, and by the header alone
        response.stream = _Decompressed(response.stream, response.headers.pop("content-encoding", None))
        return response
