from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.concurrency import cancel_and_wait, connection_budget
from proxy.errors import MAX_ERROR_BYTES, UpstreamError
from proxy.settings.outbound import Outbound, OutboundError
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.upstream.chunk_reader import LAST_WORDS_S, ChunkReader, answers_of
from proxy.upstream.completion_reader import CompletionReader
from proxy.upstream.connection import ConnectionClosed, HTTP11Connection, IncompleteResponse, RemoteProtocolError
from proxy.upstream.endpoint import Endpoint, Endpoints
from proxy.upstream.errors import connection_lost, error_from_response, redact, redirect_refused, unreachable
from proxy.upstream.payload import JSONPayload
from proxy.upstream.pool import ConnectionPool, Origin, ProxyError
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory

log = logging.getLogger("uniroute.upstream")

# How long the end of a stream is waited for after its last word, to use the connection again.
DRAIN_S = 1.0

# Of a connection in the middle of an answer.
_ENDS = (ConnectionClosed, IncompleteResponse, RemoteProtocolError, OSError)


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One request to one model."""

    record: ModelRecord
    resolved: ResolvedProvider
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    raw: bytes | None
    """What `body` was parsed from, if all of it is for the upstream."""
    connect_s: float | None
    """None: as in the settings."""
    asks_usage: bool = True
    """Of a stream, by `stream_options`."""

    @property
    def answers(self) -> int:
        return answers_of(self.body)


class UpstreamResponse:
    """What an upstream says on one connection, until it is given back or dropped."""

    def __init__(self, connections: ConnectionPool, origin: Origin, connection: HTTP11Connection) -> None:
        self._connections = connections
        self._origin = origin
        self._connection: HTTP11Connection | None = connection
        self.read = connection.read
        self.status = connection.status or 0
        self.headers: Mapping[str, str] = connection.headers

    @property
    def ended(self) -> bool:
        return self._connection is None or self._connection.ended

    def done(self) -> None:
        """The connection is kept where the answer has ended, and closed where it has not. Again is harmless."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._connections.release(self._origin, connection)


class OpenAIClient:
    """One per process, on one event loop."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], outbound: Outbound, room: ResponseMemory | None = None
    ) -> None:
        self.room = room or ResponseMemory()
        self.targets = Endpoints(settings, environ, outbound)
        self._connect_s = settings.connect_timeout_s
        self._connections = ConnectionPool(connection_budget().upstreams, outbound.context)
        self._draining: set[asyncio.Task[None]] = set()

    async def complete(self, call: UpstreamRequest) -> JSONPayload:
        """The whole answer. Raises UpstreamFailure."""
        target = self.targets.of(call.record, call.resolved)
        answer = await self._post(target, call, stream=False)
        with ResponseBounds(self.room) as bounds:
            reader = CompletionReader(target.name, bounds, answers=call.answers, headers=answer.headers)
            try:
                await _read(answer, target, reader)
                return await reader.completion_in_turns()
            except UpstreamError as failure:
                raise redact(target.secrets, failure) from failure.__cause__

    async def stream(self, call: UpstreamRequest) -> UpstreamChunks:
        """Raises UpstreamFailure: here if the upstream refused, later where the stream breaks or ends too early."""
        target = self.targets.of(call.record, call.resolved)
        answer = await self._post(target, call, stream=True)
        reader = ChunkReader(room=self.room, answers=call.answers, headers=answer.headers)
        return UpstreamChunks(self, answer, reader, target.secrets)

    async def aclose(self) -> None:
        await cancel_and_wait(*self._draining)
        await self._connections.aclose()

    async def _post(self, target: Endpoint, call: UpstreamRequest, *, stream: bool) -> UpstreamResponse:
        """One that may hold a completion. Raises UpstreamFailure."""
        body = target.body(call.body, call.raw, stream=stream, asks_usage=call.asks_usage)
        try:
            answer = await self._asked(target, call, body)
        except (ProxyError, OutboundError, *_ENDS) as error:
            raise redact(target.secrets, _failure_of(error, target)) from error
        if answer.status != 200:
            await self._refuse(answer, target)
        return answer

    async def _asked(self, target: Endpoint, call: UpstreamRequest, body: bytes) -> UpstreamResponse:
        connection = await self._connections.take(target.heads.origin, call.connect_s or self._connect_s)
        try:
            await connection.send(target.heads.head(call.headers), body)
            await connection.answered()
        except BaseException:
            self._connections.drop(connection)
            raise
        return UpstreamResponse(self._connections, target.heads.origin, connection)

    async def _refuse(self, answer: UpstreamResponse, target: Endpoint) -> None:
        """Raises for whatever status is no success."""
        if 200 <= answer.status < 300:
            return
        try:
            if answer.status < 400:
                raise redirect_refused(target.name)
            said = await _read_prefix(answer, target)
            raise redact(target.secrets, error_from_response(answer.status, said, answer.headers, target.name))
        finally:
            answer.done()

    def release(self, answer: UpstreamResponse) -> None:
        """The connection of a stream that said its last word, as soon as nothing more is on the way."""
        if answer.ended:
            answer.done()
            return
        task = asyncio.create_task(_drain(answer), name="uniroute-drain")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)


class UpstreamChunks:
    """Blocks of chunks, each what one reading held. To be closed, however it ended."""

    def __init__(
        self, upstream: OpenAIClient, answer: UpstreamResponse, reader: ChunkReader, secrets: Collection[str]
    ) -> None:
        self._upstream = upstream
        self._answer = answer
        self._secrets = secrets
        self._reader = reader
        self._closed = False

    def __aiter__(self) -> UpstreamChunks:
        return self

    async def __anext__(self) -> list[JSONPayload]:
        """Raises UpstreamFailure where the stream breaks, or ends before its answer does."""
        reader = self._reader
        while not reader.over:
            piece = await self._read()
            if not reader.over and (block := reader.feed(piece) if piece else reader.close()):
                return block
        await self.aclose()
        if (fault := reader.fault) is not None:
            raise redact(self._secrets, fault)
        raise StopAsyncIteration

    async def _read(self) -> bytes:
        """Nothing at the end of the stream, and where it broke off after the end of its answer."""
        try:
            return await _next(self._answer, self._reader)
        except _ENDS as error:
            self._answer.done()
            if self._reader.break_off():
                return b""
            raise UpstreamError(
                f"the model's stream broke: {type(error).__name__}",
                lost=not self._reader.begun and not isinstance(error, RemoteProtocolError),
            ) from error

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reader.drop()
        if self._reader.over and self._reader.failure is None:
            self._upstream.release(self._answer)
        else:
            self._answer.done()


async def _drain(answer: UpstreamResponse) -> None:
    try:
        async with asyncio.timeout(DRAIN_S):
            while await answer.read():
                pass
    except (TimeoutError, *_ENDS):
        pass
    finally:
        answer.done()


async def _next(answer: UpstreamResponse, reader: ChunkReader | CompletionReader) -> bytes:
    """What comes next. TimeoutError where the answer has ended and nothing more comes soon."""
    if not reader.finished:
        return await answer.read()
    async with asyncio.timeout(LAST_WORDS_S):
        return await answer.read()


async def _read(answer: UpstreamResponse, target: Endpoint, reader: CompletionReader) -> None:
    """All of a body, and the connection is done with. Raises UpstreamFailure where it breaks off or is larger than can
    be held."""
    try:
        while not reader.over and (piece := await _next(answer, reader)):
            reader.feed(piece)
    except _ENDS as error:
        if not reader.break_off():
            raise UpstreamError(f"{target.name} broke off its answer: {type(error).__name__}") from error
    finally:
        answer.done()


async def _read_prefix(answer: UpstreamResponse, target: Endpoint) -> bytes:
    """Of an error's body; what broke off says as much as it said."""
    said = b""
    try:
        while len(said) < MAX_ERROR_BYTES and (piece := await answer.read()):
            said += piece
    except _ENDS:
        log.info("%s broke off the words of its error", target.name)
    return said[:MAX_ERROR_BYTES]


def _failure_of(error: Exception, target: Endpoint) -> UpstreamError:
    model, origin = target.name, target.heads.origin
    if isinstance(error, TimeoutError):
        return UpstreamError(f"{model} did not answer in time", timed_out=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return UpstreamError(f"{model} cannot be reached: its certificate is not trusted (ssl_verify, SSL_CERT_FILE)")
    if isinstance(error, ProxyError):
        return UpstreamError(f"{model} cannot be reached: {error}")
    if isinstance(error, RemoteProtocolError):  # it may have worked for this, so it is not asked again
        return UpstreamError(f"{model} answered with something that is not HTTP")
    if isinstance(error, ConnectionClosed):
        return connection_lost(model)
    return unreachable(error, model, f"{origin.host}:{origin.port}")
