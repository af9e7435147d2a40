"""Calls to models that speak OpenAI's format: the caller's bytes there, the upstream's bytes back. No litellm."""

from __future__ import annotations

import asyncio
import io
import logging
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import aiohttp
import certifi
from aiohttp.http_exceptions import ContentEncodingError

from proxy.descriptors import shares
from proxy.errors import UpstreamFailure
from proxy.settings import Settings
from proxy.state.records import ModelRecord
from proxy.state.resolved import Resolved
from proxy.tasks import end
from proxy.upstream.events import ChunkReader
from proxy.upstream.failures import lost, no_completion, redirecting, refused, unreachable, without
from proxy.upstream.payload import Payload, parsed
from proxy.upstream.proxies import Proxies
from proxy.upstream.targets import Target, Targets
from proxy.upstream.wire import KEPT_ALIVE_S, MOST_ANSWER_BYTES, MOST_ERROR_BYTES, has_choices

log = logging.getLogger("uniroute.upstream")

DRAIN_S = 1.0
"""How long the end of a stream is waited for after its last word, to use the connection again."""
LONGEST_HEADER = 64 * 2**10
"""Of an answer: some servers behind others send a policy or cookies of many kilobytes."""
IN_ONE_PIECE = 2**20
"""A larger body is written bit by bit, so that others get a turn."""


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


class RelayUpstream:
    """One per process, on one event loop."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.targets = Targets(settings, environ)
        self._connect_s = settings.connect_timeout_s
        self._proxies = Proxies()
        self._opened: aiohttp.ClientSession | None = None
        self._certificates = _certificates_of(environ)
        self._draining: set[asyncio.Task[None]] = set()

    async def complete(self, call: RelayedCall) -> Payload:
        """The whole answer. Raises UpstreamFailure."""
        target = self.targets.of(call.record, call.resolved)
        response = await self._post(target, call, stream=False)
        try:
            answer = await _read(response, target, MOST_ANSWER_BYTES)
        finally:
            response.release()
        try:
            completion, data = parsed(answer)
        except ValueError:
            completion = data = None
        if not isinstance(completion, dict) or completion.get("error") or not has_choices(completion):
            raise without(target.secrets, no_completion(target.name, answer, response.headers))
        return Payload(completion, data)

    async def stream(self, call: RelayedCall) -> RelayedStream:
        """Raises UpstreamFailure: here if the upstream refused, later where the stream breaks or ends too early."""
        target = self.targets.of(call.record, call.resolved)
        response = await self._post(target, call, stream=True)
        if "event-stream" in response.headers.get("content-type", "event-stream").lower():
            return RelayedStream(self, response, target.secrets)
        try:
            said = await _read(response, target, MOST_ANSWER_BYTES)
        finally:
            response.close()
        failure = UpstreamFailure(f"{target.name} answered a stream with something else", status=502, body=said)
        raise without(target.secrets, failure)

    async def aclose(self) -> None:
        await end(*self._draining)
        if self._opened is not None:
            await self._opened.close()

    async def _post(self, target: Target, call: RelayedCall, *, stream: bool) -> aiohttp.ClientResponse:
        """A response that may hold an answer. Raises UpstreamFailure."""
        body = target.body(call.body, call.raw, stream=stream)
        try:
            response = await self.open().post(
                target.url,
                data=aiohttp.BytesPayload(body) if len(body) < IN_ONE_PIECE else io.BytesIO(body),
                headers={**target.headers, **call.headers},
                allow_redirects=False,
                proxy=self._proxies.of(target.url),
                timeout=_within(call.connect_s or self._connect_s),
            )
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise without(target.secrets, _failure_of(error, target.name)) from error
        if response.status == 200:
            return response
        await self._refuse(response, target)
        return response

    async def _refuse(self, response: aiohttp.ClientResponse, target: Target) -> None:
        """Raises for whatever status is no success."""
        if 200 <= response.status < 300:
            return
        try:
            if response.status < 400:
                raise redirecting(target.name)
            said = await _beginning(response, target)
            raise without(target.secrets, refused(response.status, said, response.headers, target.name))
        finally:
            response.close()

    def open(self) -> aiohttp.ClientSession:
        """The pool, on this event loop; before the first request, so that none waits for it."""
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=shares().upstreams,
                    keepalive_timeout=KEPT_ALIVE_S,
                    ssl=ssl.create_default_context(cafile=self._certificates),
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                max_line_size=LONGEST_HEADER,
                max_field_size=LONGEST_HEADER,
                trust_env=False,  # it would look for a .netrc file with every request; proxies are ours
            )
        return self._opened

    def give_back(self, response: aiohttp.ClientResponse) -> None:
        """The connection of a stream that said its last word, as soon as nothing more is on the way."""
        if response.content.at_eof() or response.connection is None:
            response.release()
            return
        task = asyncio.create_task(_drain(response), name="uniroute-drain")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)


class RelayedStream:
    """Blocks of chunks, each what one reading held. To be closed, however it ended."""

    def __init__(self, upstream: RelayUpstream, response: aiohttp.ClientResponse, secrets: Collection[str]) -> None:
        self._upstream = upstream
        self._response = response
        self._secrets = secrets
        self._reader = ChunkReader()
        self._closed = False

    def __aiter__(self) -> RelayedStream:
        return self

    async def __anext__(self) -> list[Payload]:
        """Raises UpstreamFailure where the stream breaks, or ends before its answer does."""
        reader = self._reader
        while not reader.over:
            piece = await self._read()
            block = reader.feed(piece) if piece else reader.close()
            if block:
                return block
        await self.aclose()
        if (fault := reader.fault) is not None:
            raise without(self._secrets, fault)
        raise StopAsyncIteration

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._response.close()
            raise UpstreamFailure(
                f"the model's stream broke: {type(error).__name__}",
                timed_out=isinstance(error, TimeoutError),
                lost=not self._reader.begun and not isinstance(error.__cause__, ContentEncodingError),
            ) from error

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._reader.over and self._reader.failure is None:
            self._upstream.give_back(self._response)
        else:
            self._response.close()


@lru_cache(maxsize=64)
def _within(connect_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect_s)


def _certificates_of(environ: Mapping[str, str]) -> str | None:
    """Mozilla's, as every HTTP client of Python brings them, unless the system's are asked for (None)."""
    if environ.get("SSL_CERT_FILE") or environ.get("SSL_CERT_DIR"):
        return None
    return certifi.where()


async def _drain(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(DRAIN_S):
            while not response.content.at_eof():
                await response.content.readany()
        response.release()
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass
    finally:
        response.close()


async def _read(response: aiohttp.ClientResponse, target: Target, most: int) -> bytes:
    """All of a body. Raises UpstreamFailure where it breaks off or is larger than can be held."""
    pieces, size = [], 0
    try:
        while piece := await response.content.readany():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                response.close()
                raise UpstreamFailure(f"{target.name} broke off its answer: it is larger than {most} bytes")
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailure(f"{target.name} broke off its answer: {type(error).__name__}") from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _beginning(response: aiohttp.ClientResponse, target: Target) -> bytes:
    """Of an error's body; what broke off says as much as it said."""
    said = b""
    try:
        while len(said) < MOST_ERROR_BYTES and (piece := await response.content.readany()):
            said += piece
    except (aiohttp.ClientError, OSError):
        log.info("%s broke off the words of its error", target.name)
    return said[:MOST_ERROR_BYTES]


def _failure_of(error: Exception, model: str) -> UpstreamFailure:
    if isinstance(error, TimeoutError):
        return UpstreamFailure(f"{model} did not answer in time", timed_out=True)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UpstreamFailure(f"{model} cannot be reached: its certificate is not trusted (SSL_CERT_FILE)")
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.InvalidURL | ValueError):
        return unreachable(error, model)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return UpstreamFailure(f"{model} cannot be reached: the HTTP proxy answered with status {error.status}")
    if isinstance(error, aiohttp.ClientResponseError):  # it may have worked for this, so it is not asked again
        return UpstreamFailure(f"{model} answered with something that is not HTTP")
    if isinstance(error, aiohttp.ClientError):
        return lost(model)
    return unreachable(error, model)
