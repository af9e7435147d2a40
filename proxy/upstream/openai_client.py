from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.concurrency import end, shares
from proxy.errors import MOST_ERROR_BYTES, UpstreamFailure
from proxy.outbound import Outbound, OutboundError
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, Resolved
from proxy.upstream.answer_room import AnswerBounds, AnswerRoom
from proxy.upstream.connection import BrokenOff, Connection, NotHttp, Unanswered
from proxy.upstream.endpoint import Target, Targets
from proxy.upstream.errors import lost, redirecting, refused, unreachable, without
from proxy.upstream.payload import LAST_WORDS_S, ChunkReader, CompletionReader, Payload, answers_of
from proxy.upstream.pool import Connections, Origin, ProxyRefused

log = logging.getLogger("uniroute.upstream")

DRAIN_S = 1.0
"""How long the end of a stream is waited for after its last word, to use the connection again."""

_ENDS = (Unanswered, BrokenOff, NotHttp, OSError)
"""Of a connection in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class RelayedCall:
    """One request to one model."""

    record: ModelRecord
    resolved: Resolved
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


class Answer:
    """What an upstream says on one connection, until it is given back or dropped."""

    def __init__(self, connections: Connections, origin: Origin, connection: Connection) -> None:
        self._connections = connections
        self._origin = origin
        self._connection: Connection | None = connection
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
            self._connections.give_back(self._origin, connection)


class RelayUpstream:
    """One per process, on one event loop."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], outbound: Outbound, room: AnswerRoom | None = None
    ) -> None:
        self.room = room or AnswerRoom()
        self.targets = Targets(settings, environ, outbound)
        self._connect_s = settings.connect_timeout_s
        self._connections = Connections(shares().upstreams, outbound.context)
        self._draining: set[asyncio.Task[None]] = set()

    async def complete(self, call: RelayedCall) -> Payload:
        """The whole answer. Raises UpstreamFailure."""
        target = self.targets.of(call.record, call.resolved)
        answer = await self._post(target, call, stream=False)
        with AnswerBounds(self.room) as bounds:
            reader = CompletionReader(target.name, bounds, answers=call.answers, headers=answer.headers)
            try:
                await _read(answer, target, reader)
                return await reader.completion_in_turns()
            except UpstreamFailure as failure:
                raise without(target.secrets, failure) from failure.__cause__

    async def stream(self, call: RelayedCall) -> RelayedStream:
        """Raises UpstreamFailure: here if the upstream refused, later where the stream breaks or ends too early."""
        target = self.targets.of(call.record, call.resolved)
        answer = await self._post(target, call, stream=True)
        reader = ChunkReader(room=self.room, answers=call.answers, headers=answer.headers)
        return RelayedStream(self, answer, reader, target.secrets)

    async def aclose(self) -> None:
        await end(*self._draining)
        await self._connections.aclose()

    async def _post(self, target: Target, call: RelayedCall, *, stream: bool) -> Answer:
        """One that may hold a completion. Raises UpstreamFailure."""
        body = target.body(call.body, call.raw, stream=stream, asks_usage=call.asks_usage)
        try:
            answer = await self._asked(target, call, body)
        except (ProxyRefused, OutboundError, *_ENDS) as error:
            raise without(target.secrets, _failure_of(error, target)) from error
        if answer.status != 200:
            await self._refuse(answer, target)
        return answer

    async def _asked(self, target: Target, call: RelayedCall, body: bytes) -> Answer:
        connection = await self._connections.take(target.heads.origin, call.connect_s or self._connect_s)
        try:
            await connection.send(target.heads.head(call.headers), body)
            await connection.answered()
        except BaseException:
            self._connections.drop(connection)
            raise
        return Answer(self._connections, target.heads.origin, connection)

    async def _refuse(self, answer: Answer, target: Target) -> None:
        """Raises for whatever status is no success."""
        if 200 <= answer.status < 300:
            return
        try:
            if answer.status < 400:
                raise redirecting(target.name)
            said = await _beginning(answer, target)
            raise without(target.secrets, refused(answer.status, said, answer.headers, target.name))
        finally:
            answer.done()

    def give_back(self, answer: Answer) -> None:
        """The connection of a stream that said its last word, as soon as nothing more is on the way."""
        if answer.ended:
            answer.done()
            return
        task = asyncio.create_task(_drain(answer), name="uniroute-drain")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)


class RelayedStream:
    """Blocks of chunks, each what one reading held. To be closed, however it ended."""

    def __init__(self, upstream: RelayUpstream, answer: Answer, reader: ChunkReader, secrets: Collection[str]) -> None:
        self._upstream = upstream
        self._answer = answer
        self._secrets = secrets
        self._reader = reader
        self._closed = False

    def __aiter__(self) -> RelayedStream:
        return self

    async def __anext__(self) -> list[Payload]:
        """Raises UpstreamFailure where the stream breaks, or ends before its answer does."""
        reader = self._reader
        while not reader.over:
            piece = await self._read()
            if not reader.over and (block := reader.feed(piece) if piece else reader.close()):
                return block
        await self.aclose()
        if (fault := reader.fault) is not None:
            raise without(self._secrets, fault)
        raise StopAsyncIteration

    async def _read(self) -> bytes:
        """Nothing at the end of the stream, and where it broke off after the end of its answer."""
        try:
            return await _next(self._answer, self._reader)
        except _ENDS as error:
            self._answer.done()
            if self._reader.break_off():
                return b""
            raise UpstreamFailure(
                f"the model's stream broke: {type(error).__name__}",
                lost=not self._reader.begun and not isinstance(error, NotHttp),
            ) from error

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reader.drop()
        if self._reader.over and self._reader.failure is None:
            self._upstream.give_back(self._answer)
        else:
            self._answer.done()


async def _drain(answer: Answer) -> None:
    try:
        async with asyncio.timeout(DRAIN_S):
            while await answer.read():
                pass
    except (TimeoutError, *_ENDS):
        pass
    finally:
        answer.done()


async def _next(answer: Answer, reader: ChunkReader | CompletionReader) -> bytes:
    """What comes next. TimeoutError where the answer has ended and nothing more comes soon."""
    if not reader.finished:
        return await answer.read()
    async with asyncio.timeout(LAST_WORDS_S):
        return await answer.read()


async def _read(answer: Answer, target: Target, reader: CompletionReader) -> None:
    """All of a body, and the connection is done with. Raises UpstreamFailure where it breaks off or is larger than can
    be held."""
    try:
        while not reader.over and (piece := await _next(answer, reader)):
            reader.feed(piece)
    except _ENDS as error:
        if not reader.break_off():
            raise UpstreamFailure(f"{target.name} broke off its answer: {type(error).__name__}") from error
    finally:
        answer.done()


async def _beginning(answer: Answer, target: Target) -> bytes:
    """Of an error's body; what broke off says as much as it said."""
    said = b""
    try:
        while len(said) < MOST_ERROR_BYTES and (piece := await answer.read()):
            said += piece
    except _ENDS:
        log.info("%s broke off the words of its error", target.name)
    return said[:MOST_ERROR_BYTES]


def _failure_of(error: Exception, target: Target) -> UpstreamFailure:
    model, origin = target.name, target.heads.origin
    if isinstance(error, TimeoutError):
        return UpstreamFailure(f"{model} did not answer in time", timed_out=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return UpstreamFailure(f"{model} cannot be reached: its certificate is not trusted (ssl_verify, SSL_CERT_FILE)")
    if isinstance(error, ProxyRefused):
        return UpstreamFailure(f"{model} cannot be reached: {error}")
    if isinstance(error, NotHttp):  # it may have worked for this, so it is not asked again
        return UpstreamFailure(f"{model} answered with something that is not HTTP")
    if isinstance(error, Unanswered):
        return lost(model)
    return unreachable(error, model, f"{origin.host}:{origin.port}")
