from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.json_text import SMALL_BYTES, encode_json
from proxy.settings.model_config import UpstreamAPI
from proxy.settings.outbound import Outbound, OutboundError
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.chunk_reader import MAX_TAIL_S, ChunkReader, ChunkReceiver, requested_choices
from proxy.upstream.completion_reader import CompletionReader, check_completion
from proxy.upstream.direct_target import DirectTarget, DirectTargets
from proxy.upstream.embeddings import MAX_VECTOR_VALUES, EmbeddingsReader, EmbeddingsRequest
from proxy.upstream.errors import connection_lost, error_from_response, not_http, redact, redirect_refused, unreachable
from proxy.upstream.native_reader import NativeAnswerReader, NativeReader
from proxy.upstream.payload import JSONPayload, NativePayload, parse
from proxy.upstream.pool import (
    READ_ERRORS,
    ConnectionClosed,
    ConnectionPool,
    ProxyError,
    RemoteProtocolError,
    UpstreamResponse,
)
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory

log = logging.getLogger("uniroute.upstream")

BodyReader = CompletionReader | NativeAnswerReader | EmbeddingsReader


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One request to one model."""

    record: ModelRecord
    resolved: ResolvedProvider
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    raw: bytes | None
    """The bytes that `body` was parsed from, if all of it is for the upstream."""
    connect_timeout_s: float | None
    """None: as in the settings."""
    include_usage: bool = True
    """Whether a stream is asked for its usage, by `stream_options`."""
    api: UpstreamAPI = "chat"
    """Of which `body` is, and in which the upstream is to answer."""

    @property
    def choices(self) -> int:
        return requested_choices(self.body)


class OpenAIClient:
    """Call servers directly: in OpenAI's chat completions, or in another API that their clients speak too.

    One per process, on one event loop.
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        outbound: Outbound,
        pool: ConnectionPool,
        memory: ResponseMemory,
    ) -> None:
        self.targets = DirectTargets(settings, environ, outbound)
        self._memory = memory
        self._connect_timeout_s = settings.connect_timeout_s
        self._pool = pool

    async def complete(self, request: UpstreamRequest) -> JSONPayload:
        """Return the whole completion. Raises UpstreamError."""
        target = self.targets.get(request.record, request.resolved)
        response = await self._post(target, request, stream=False)
        try:
            return await read_completion(response, target.name, self._memory, request.choices)
        except UpstreamError as error:
            raise redact(target.secrets, error) from error.__cause__

    async def stream(self, request: UpstreamRequest) -> UpstreamChunks:
        """Open a stream of chunks.

        Raises:
            UpstreamError: here if the upstream refused, later if the stream breaks or ends too early.
        """
        target = self.targets.get(request.record, request.resolved)
        response = await self._post(target, request, stream=True)
        reader = ChunkReader(memory=self._memory, choices=request.choices, headers=response.headers)
        return UpstreamChunks(response, reader, target.secrets)

    async def complete_native(self, request: UpstreamRequest) -> NativePayload:
        """Return the whole answer of another API than chat completions. Raises UpstreamError."""
        assert request.api != "chat"
        target = self.targets.get(request.record, request.resolved, request.api)
        response = await self._post(target, request, stream=False)
        with ResponseBounds(self._memory) as bounds:
            reader = NativeAnswerReader(request.api, target.name, bounds, response.headers)
            try:
                await _read_body(response, target.name, reader)
                return await reader.answer_in_thread()
            except UpstreamError as error:
                raise redact(target.secrets, error) from error.__cause__

    async def stream_native(self, request: UpstreamRequest) -> UpstreamChunks:
        """Open a stream of NativePayload. Raises as `stream` does."""
        assert request.api != "chat"
        target = self.targets.get(request.record, request.resolved, request.api)
        response = await self._post(target, request, stream=True)
        reader = NativeReader(request.api, memory=self._memory, headers=response.headers)
        return UpstreamChunks(response, reader, target.secrets)

    async def embed(self, request: UpstreamRequest, asked: EmbeddingsRequest) -> JSONPayload:
        """Return the embeddings of the request's body. Raises UpstreamError."""
        target = self.targets.get(request.record, request.resolved, "embeddings")
        response = await self._post(target, request, stream=False)
        with ResponseBounds(self._memory, MAX_VECTOR_VALUES) as bounds:
            reader = EmbeddingsReader(target.name, bounds, response.headers)
            try:
                await _read_body(response, target.name, reader)
                return reader.embeddings(asked.encoding)
            except UpstreamError as error:
                raise redact(target.secrets, error) from error.__cause__

    async def _post(self, target: DirectTarget, request: UpstreamRequest, *, stream: bool) -> UpstreamResponse:
        """Send the request and return a successful response. Raises UpstreamError."""
        if request.api == "chat":
            body = target.build_body(request.body, request.raw, stream=stream, include_usage=request.include_usage)
        else:
            body = encode_json({**request.body, "model": target.model, "stream": stream})
        origin = target.head.origin
        try:
            connection = self._pool.acquire_idle(origin) or await self._pool.acquire(
                origin, request.connect_timeout_s or self._connect_timeout_s
            )
            response = UpstreamResponse(self._pool, origin, connection)
            try:
                await connection.send(target.render_head(request.headers), body)
                await response.receive_head()
            except BaseException:
                response.close()
                raise
        except (ProxyError, OutboundError, *READ_ERRORS) as error:
            raise redact(target.secrets, _error_from_exception(error, target)) from error
        if response.status != 200:
            await self._raise_for_status(response, target)
        return response

    async def _raise_for_status(self, response: UpstreamResponse, target: DirectTarget) -> None:
        """Raise UpstreamError for a status that is no success."""
        if 200 <= response.status < 300:
            return
        try:
            if response.status < 400:
                raise redirect_refused(target.name)
            body = await _read_prefix(response, target.name)
            raise redact(target.secrets, error_from_response(response.status, body, response.headers, target.name))
        finally:
            response.close()


class UpstreamChunks:
    """The chunks of one response. What one read of the connection brings is one block."""

    def __init__(self, response: UpstreamResponse, reader: ChunkReader, secrets: Collection[str]) -> None:
        self._response = response
        self._secrets = secrets
        self._reader = reader
        self._receiver: ChunkReceiver | None = None
        # Runs out if the answer has finished and nothing more comes soon.
        self._tail: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self, receiver: ChunkReceiver) -> None:
        self._receiver = receiver
        self.resume()

    def hold(self) -> None:
        if not self._closed:
            self._response.hold()
            self._stop_tail()

    def resume(self) -> None:
        if not self._closed:
            if self._reader.finished and self._tail is None:
                self._start_tail()
            self._response.feed(self)

    async def aclose(self) -> None:
        self._close()

    # Called by the connection, as BodySink.

    def on_data(self, piece: bytes) -> None:
        reader, receiver = self._reader, self._receiver
        assert receiver is not None
        if self._tail is not None:
            self._stop_tail()
        block = reader.feed(piece)
        if reader.finished and not reader.done:
            self._start_tail()
        if block:
            receiver.receive(block)
        if reader.done:
            self._end(receiver)

    def on_end(self, error: Exception | None) -> None:
        reader, receiver = self._reader, self._receiver
        assert receiver is not None
        if error is None:
            if block := reader.close():
                receiver.receive(block)
            self._end(receiver)
            return
        self._response.close()
        if reader.break_off():  # after the end of the answer
            self._end(receiver)
            return
        self._close()
        broken = UpstreamError(
            f"the model's stream broke: {type(error).__name__}",
            connection_lost=not reader.started and not isinstance(error, RemoteProtocolError),
        )
        broken.__cause__ = error
        receiver.end(broken)

    def _end(self, receiver: ChunkReceiver) -> None:
        self._close()
        error = self._reader.final_error
        receiver.end(None if error is None else redact(self._secrets, error))

    def _start_tail(self) -> None:
        self._tail = asyncio.get_running_loop().call_later(MAX_TAIL_S, self.on_end, TimeoutError())

    def _stop_tail(self) -> None:
        if self._tail is not None:
            self._tail.cancel()
            self._tail = None

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._receiver = None  # it holds this, too
        self._stop_tail()
        self._reader.release()
        if self._reader.done and self._reader.error is None:
            self._response.finish()
        else:
            self._response.close()


async def read_completion(
    response: UpstreamResponse, name: str, memory: ResponseMemory, choices: int = 1
) -> JSONPayload:
    """Read a whole completion in OpenAI's format, and close the response.

    Args:
        name: of the model.
        choices: how many were asked for (`n`).

    Raises:
        UpstreamError: there is none. The provider's keys may be in it: see `redact`.
    """
    start = response.take_whole()
    if start is not None and start.startswith(b"{") and len(start) <= min(SMALL_BYTES, memory.max_response_bytes):
        with suppress(ValueError):  # most answers come at once, and are small
            return check_completion(name, *parse(start), response.headers)
    with ResponseBounds(memory) as bounds:
        reader = CompletionReader(name, bounds, choices=choices, headers=response.headers)
        if start is None:
            await _read_body(response, name, reader)
        elif start:
            reader.feed(start)
        return await reader.completion_in_thread()


async def _read_next(response: UpstreamResponse, reader: BodyReader) -> bytes:
    """Read the next piece. TimeoutError if the answer has finished and nothing more comes soon."""
    if not reader.finished:
        return await response.read()
    async with asyncio.timeout(MAX_TAIL_S):
        return await response.read()


async def _read_body(response: UpstreamResponse, name: str, reader: BodyReader) -> None:
    """Read all of a body and close the response.

    Raises:
        UpstreamError: the body breaks off, or is larger than can be held.
    """
    try:
        while not reader.done and (piece := await _read_next(response, reader)):
            reader.feed(piece)
    except READ_ERRORS as error:
        if not reader.break_off():
            raise UpstreamError(f"{name} broke off its answer: {type(error).__name__}") from error
    finally:
        response.close()


async def _read_prefix(response: UpstreamResponse, name: str) -> bytes:
    """Read the body of an error, as much as is kept, or what came before it broke off."""
    body = b""
    try:
        while len(body) < MAX_ERROR_BYTES and (piece := await response.read()):
            body += piece
    except READ_ERRORS:
        log.info("%s broke off the words of its error", name)
    return body[:MAX_ERROR_BYTES]


def _error_from_exception(error: Exception, target: DirectTarget) -> UpstreamError:
    model, origin = target.name, target.head.origin
    if isinstance(error, TimeoutError):
        return UpstreamError(f"{model} did not answer in time", timed_out=True)
    if isinstance(error, RemoteProtocolError):
        return not_http(model)
    if isinstance(error, ConnectionClosed):
        return connection_lost(model)
    return unreachable(error, model, f"{origin.host}:{origin.port}")
