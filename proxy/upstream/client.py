from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, TypeVar

from proxy.concurrency import cancel_and_wait, connection_budget
from proxy.errors import LiteLLMUnavailable, UpstreamError
from proxy.json_text import encode_json
from proxy.settings.model_config import NativeAPI
from proxy.settings.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.chunk_reader import ChunkSource
from proxy.upstream.embeddings import EmbeddingsRequest
from proxy.upstream.litellm_client import LiteLLMClient
from proxy.upstream.native_api import native_provider
from proxy.upstream.native_body import native_body
from proxy.upstream.openai_client import OpenAIClient, UpstreamRequest
from proxy.upstream.payload import JSONPayload, NativePayload
from proxy.upstream.pool import ConnectionPool
from proxy.upstream.provider_resolution import resolve_static
from proxy.upstream.response_memory import ResponseMemory

log = logging.getLogger("uniroute.upstream")

T = TypeVar("T")

# Between two attempts to import litellm; doubled after each failure.
MIN_RETRY_INTERVAL_S = 10.0

MAX_RETRY_INTERVAL_S = 300.0

# Statuses with which servers refuse `stream_options`.
_REFUSING_STATUSES = frozenset({400, 422, 500, 501})


@dataclass(frozen=True, slots=True)
class NativeRequest:
    """A request in the client's own API, for an upstream that speaks it."""

    api: NativeAPI
    document: Mapping[str, Any]
    """The client's body, without UniRoute's own fields."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The client's `anthropic-version` and `anthropic-beta` may be among them."""
    max_output_tokens: int | None = None
    """An upper bound of the answer's tokens. None: the client's own holds."""
    reads_reasoning: bool = True
    """Whether the model may be able to read the reasoning that earlier answers carry."""


class UpstreamClient:
    """Call any model, directly or through litellm. One per process, on one event loop.

    litellm is imported in a thread, when a model first needs it.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        outbound = Outbound(environ)
        for problem in outbound.problems():
            log.warning("environment: %s", problem)
        self.memory = ResponseMemory(settings.max_answer_bytes, settings.max_answers_in_flight_bytes)
        # One for both, so that its bound holds for all connections of this process to models.
        self._pool = ConnectionPool(connection_budget().upstreams, outbound.context)
        self._openai = OpenAIClient(settings, environ, outbound, self._pool, self.memory)
        self._litellm = LiteLLMClient(settings, environ, outbound, self._pool, self.memory)
        self._stream_options = StreamOptions()
        # By name, each with the record that it was found for.
        self._direct: dict[str, tuple[ModelRecord, ResolvedProvider | None]] = {}
        self._import: asyncio.Task[None] | None = None
        # Set once an attempt to import litellm has ended, either way.
        self._import_tried = asyncio.Event()
        # Why the last attempt failed.
        self._import_error: str | None = None
        self._next_import = 0.0
        # Models that cannot be called until litellm is imported.
        self.not_ready: frozenset[str] = frozenset()

    def complete(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        raw: bytes | None = None,
        connect_timeout_s: float | None = None,
    ) -> Coroutine[Any, Any, JSONPayload]:
        """Return a whole completion in OpenAI's format.

        Args:
            raw: the bytes that `body` was parsed from, if all of it is for the upstream: they are sent as they are.

        Raises:
            UpstreamError: there is none.
        """
        resolved = self._resolved(record)
        if resolved is None:
            return self._complete_through_litellm(record, body, headers, connect_timeout_s)
        return self._openai.complete(UpstreamRequest(record, resolved, body, headers or {}, raw, connect_timeout_s))

    async def _complete_through_litellm(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None,
        connect_timeout_s: float | None,
    ) -> JSONPayload:
        await self.ensure_litellm()
        return await self._litellm.complete(record, body, headers, connect_timeout_s=connect_timeout_s)

    async def stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        raw: bytes | None = None,
        connect_timeout_s: float | None = None,
    ) -> ChunkSource:
        """Open a stream of chunks in OpenAI's format, the last with usage and no choices.

        Close it to close the upstream's connection.

        Raises:
            UpstreamError: here if the upstream refused, later if the stream breaks or ends without its end.
        """
        try:
            return await self._stream(record, body, headers or {}, raw, connect_timeout_s)
        except UpstreamError as error:
            if not self._stream_options.may_be_refused(record, error):
                raise
        stream = await self._stream(record, body, headers or {}, raw, connect_timeout_s, without_options=True)
        self._stream_options.mark_refused(record)
        return stream

    async def complete_native(
        self, record: ModelRecord, request: NativeRequest, *, connect_timeout_s: float | None = None
    ) -> NativePayload:
        """Return a whole answer of a model in the client's own API, which must be one of `native_apis(record)`.

        Raises:
            UpstreamError: there is none.
        """
        return await _ask_native(self._openai.complete_native, record, request, connect_timeout_s)

    async def stream_native(
        self, record: ModelRecord, request: NativeRequest, *, connect_timeout_s: float | None = None
    ) -> ChunkSource:
        """Open a stream of NativePayload, the events of a model in the client's own API. Close it as any other.

        Raises:
            UpstreamError: here if the upstream refused, later if the stream breaks or ends without its end.
        """
        return await _ask_native(self._openai.stream_native, record, request, connect_timeout_s)

    async def _stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        raw: bytes | None,
        connect_timeout_s: float | None,
        *,
        without_options: bool = False,
    ) -> ChunkSource:
        include_usage = not without_options and self._stream_options.are_accepted_by(record)
        resolved = self._resolved(record)
        if resolved is not None:
            request = UpstreamRequest(record, resolved, body, headers, raw, connect_timeout_s, include_usage)
            return await self._openai.stream(request)
        await self.ensure_litellm()
        return await self._litellm.stream(
            record, body, headers, connect_timeout_s=connect_timeout_s, include_usage=include_usage
        )

    async def embed(
        self,
        record: ModelRecord,
        asked: EmbeddingsRequest,
        headers: Mapping[str, str],
        *,
        connect_timeout_s: float | None = None,
    ) -> JSONPayload:
        """Return embeddings in OpenAI's format. Raises UpstreamError."""
        resolved = self._resolved(record)
        if resolved is not None:
            request = UpstreamRequest(record, resolved, asked.body, headers, asked.raw, connect_timeout_s)
            return await self._openai.embed(request, asked)
        await self.ensure_litellm()
        return await self._litellm.embed(record, asked, headers, connect_timeout_s=connect_timeout_s)

    def _resolved(self, record: ModelRecord) -> ResolvedProvider | None:
        """Return `is_direct(record)`, found out once."""
        found = self._direct.get(record.name)
        if found is None or found[0] is not record:
            found = self._direct[record.name] = record, is_direct(record)
        return found[1]

    async def warm_up(self) -> None:
        """Do what the first request would wait for otherwise: import litellm if a model needs it."""
        if self._import is not None:
            await self._import_tried.wait()

    def set_models(self, models: Mapping[str, ModelRecord]) -> None:
        """Replace the models. Forget what is known of those that are gone or changed."""
        self._openai.targets.retain(models)
        self._litellm.retain(models)
        self._stream_options.retain(models)
        self._direct = {name: (record, is_direct(record)) for name, record in models.items()}
        through_litellm = frozenset(name for name, (_, resolved) in self._direct.items() if resolved is None)
        self.not_ready = frozenset() if self._litellm.ready else through_litellm
        if self._import is None and through_litellm:
            log.info("loading litellm, for models of other formats than OpenAI's")
            self._start_import()

    async def ensure_litellm(self) -> None:
        """Wait until litellm is imported. Raises LiteLLMUnavailable while it cannot be."""
        if self._litellm.ready:
            return
        if self._import is None:
            self._start_import()
        await self._import_tried.wait()
        if self._import_error is not None:
            raise LiteLLMUnavailable(
                f"{self._import_error}; it is tried again", max(1.0, self._next_import - monotonic())
            )

    def _start_import(self) -> None:
        self._import = asyncio.create_task(self._import_litellm(), name="uniroute-litellm")

    async def _import_litellm(self) -> None:
        interval_s = MIN_RETRY_INTERVAL_S
        while not self._litellm.ready:
            try:
                await self._litellm.prepare()
                self._import_error, self.not_ready = None, frozenset()
            except Exception as error:
                # The import may fail for want of memory, files or descriptors, all of which is temporary.
                self._import_error = f"litellm cannot be imported ({type(error).__name__}: {error})"[:300]
                log.exception(
                    "%s: models of other formats than OpenAI's cannot be called; it is tried again in %g s",
                    self._import_error,
                    interval_s,
                )
                self._next_import = monotonic() + interval_s
            self._import_tried.set()
            if self._import_error is not None:
                await asyncio.sleep(interval_s)
                interval_s = min(2 * interval_s, MAX_RETRY_INTERVAL_S)

    async def aclose(self) -> None:
        await cancel_and_wait(self._import)
        await self._litellm.aclose()
        await self._pool.aclose()


def is_direct(record: ModelRecord) -> ResolvedProvider | None:
    """Return what the model was resolved to if it is called directly, else None."""
    resolved = record.resolved or resolve_static(record.litellm_params, record.info.forward)
    return resolved if resolved is not None and resolved.mode == "relay" else None


def _native_request(record: ModelRecord, request: NativeRequest, connect_timeout_s: float | None) -> UpstreamRequest:
    resolved = native_provider(record)
    if resolved is None:
        raise UpstreamError(f"{record.name}: its provider is not known yet", retryable=True)
    # Some models are listed under a prefix that tells litellm to use this very API.
    resolved = replace(resolved, model=resolved.model.removeprefix(f"{request.api}/"))
    body = native_body(
        request.api,
        request.document,
        record,
        max_output_tokens=request.max_output_tokens,
        reads_reasoning=request.reads_reasoning,
    )
    return UpstreamRequest(record, resolved, body, request.headers, None, connect_timeout_s, api=request.api)


async def _ask_native(
    ask: Callable[[UpstreamRequest], Awaitable[T]],
    record: ModelRecord,
    request: NativeRequest,
    connect_timeout_s: float | None,
) -> T:
    """Ask a model in its own API, and once more without the reasoning of earlier answers if it refuses that."""
    asked = _native_request(record, request, connect_timeout_s)
    try:
        return await ask(asked)
    except UpstreamError as error:
        without = _without_reasoning(record, request, asked, error)
        if without is None:
            raise
    return await ask(without)


# How providers name what they cannot verify or decrypt of earlier reasoning.
_REASONING_PROOFS = (b"signature", b"encrypted_content", b"encrypted content", b"redacted_thinking")


def _without_reasoning(
    record: ModelRecord, request: NativeRequest, asked: UpstreamRequest, error: UpstreamError
) -> UpstreamRequest | None:
    """Return a request without the reasoning of earlier answers, if an upstream has refused that; else None.

    Another model may have written it, of another provider or account, and who it was may be forgotten.
    """
    if error.status != 400 or not request.reads_reasoning or not _mentions(error, *_REASONING_PROOFS):
        return None
    without = _native_request(record, replace(request, reads_reasoning=False), asked.connect_timeout_s)
    if without.body == asked.body:
        return None
    log.warning("model %s refuses the reasoning of earlier answers: it is asked without", record.name)
    return without


class StreamOptions:
    """Know which models accept `stream_options`: those that state it, and those that have not refused it yet."""

    def __init__(self) -> None:
        self._refused: dict[str, ModelRecord] = {}

    def are_accepted_by(self, record: ModelRecord) -> bool:
        stated = record.info.supports_stream_options
        return self._refused.get(record.name) is not record if stated is None else stated

    def may_be_refused(self, record: ModelRecord, error: UpstreamError) -> bool:
        """Return whether the model seems to refuse them, and is worth one more attempt without."""
        unknown = record.info.supports_stream_options is None and self.are_accepted_by(record)
        return unknown and error.status in _REFUSING_STATUSES and _mentions(error, b"stream_options", b"include_usage")

    def mark_refused(self, record: ModelRecord) -> None:
        """Remember that the model answered without them. A changed record is asked anew."""
        log.warning(
            "model %s refuses stream_options: it is asked without, and its usage is estimated where it reports none"
            " (model_info: supports_stream_options: false)",
            record.name,
        )
        self._refused[record.name] = record

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        self._refused = {name: record for name, record in self._refused.items() if models.get(name) is record}


def _mentions(error: UpstreamError, *words: bytes) -> bool:
    body = error.body if isinstance(error.body, bytes) else encode_json({"": error.body})
    return any(word in body for word in words)
