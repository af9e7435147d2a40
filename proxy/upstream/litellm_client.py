from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from proxy.concurrency import GRACE_PERIOD_S, await_cancellable, cancel_until_done, in_own_thread, run_uncancelled
from proxy.errors import UpstreamError
from proxy.json_text import MAX_VALUES
from proxy.settings.litellm_params import (
    CHAT_FIELDS,
    NOT_SERVED,
    OPENAI_ONLY,
    PASSTHROUGH,
    is_openai_url,
    is_provider_param,
    merge_model_params,
    secrets_of,
)
from proxy.settings.model_config import SettingsError, resolve_secret
from proxy.settings.outbound import Outbound, OutboundError, Trust
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.chunk_reader import (
    ChunkReader,
    ChunkReceiver,
    ChunkSource,
    FinishTracker,
    is_finished,
    requested_choices,
)
from proxy.upstream.embeddings import EmbeddingsRequest, check_embeddings, with_encoding
from proxy.upstream.errors import redact, unreachable
from proxy.upstream.httpx_transport import PooledTransport
from proxy.upstream.key_scope import PLACEHOLDER_KEY, key_for_litellm
from proxy.upstream.litellm_transport import (
    CapturedResponse,
    ResponseTaken,
    capture,
    client_over,
    disable_request_logging,
    http_handler,
    import_litellm,
    in_call,
    warm_up,
)
from proxy.upstream.openai_client import UpstreamChunks, read_completion
from proxy.upstream.payload import JSONPayload
from proxy.upstream.pool import ConnectionPool
from proxy.upstream.response_memory import ResponseMemory

log = logging.getLogger("uniroute.upstream")

MAX_CLIENTS = 256

# What litellm raises over JSON of another shape than it expects, a caller's or a model's.
LITELLM_PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class LiteLLMClient:
    """Call models of any format through litellm. One per process, on one event loop.

    `prepare` before the first call.
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        outbound: Outbound,
        pool: ConnectionPool,
        memory: ResponseMemory,
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._outbound = outbound
        self._environ = environ
        self._litellm: Any = None
        # Shorter timeouts are those of the attempts, in server/attempts.py.
        self._max_timeout_s = max(settings.request_timeout_s, settings.stream_timeout_s)
        self._transport = PooledTransport(pool, outbound)
        self._http = client_over(self._transport, self._max_timeout_s)
        self._handler: Any = None
        self._openai_clients: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        # By the model's name.
        self._models: dict[str, LiteLLMModel] = {}

    @property
    def ready(self) -> bool:
        return self._litellm is not None

    async def prepare(self) -> None:
        """Import litellm, which takes seconds, in a thread."""
        if self._litellm is None:
            litellm = await in_own_thread(import_litellm)
            await warm_up(litellm)
            litellm.aclient_session = self._http  # for azure, which otherwise gets a client without our limits
            self._handler = http_handler(self._http)
            self._litellm = litellm

    async def complete(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        connect_timeout_s: float | None = None,
    ) -> JSONPayload:
        """Return a whole completion in OpenAI's format, unchanged if that is the upstream's own.

        Raises:
            UpstreamError: there is none.
        """
        await self.prepare()
        with self._capture(record, body, connect_timeout_s) as captured:
            target, arguments = self._prepare_call(record, body, headers, captured)
            disable_request_logging()
            try:
                return JSONPayload(_to_json(await self._call(arguments)))
            except ResponseTaken:
                pass
            except self._call_errors as error:
                raise redact(target.secrets, captured.error_from(error)) from error
            try:
                return await read_completion(captured.hand_over(), record.name, self._memory, captured.choices)
            except UpstreamError as error:
                raise redact(target.secrets, error) from error.__cause__

    async def stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        connect_timeout_s: float | None = None,
        include_usage: bool = True,
    ) -> ChunkSource:
        """Open a stream of chunks in OpenAI's format, the last with usage and no choices.

        Close it to close the upstream's connection.

        Raises:
            UpstreamError: here if the upstream refused, later if the stream breaks or ends without its end.
        """
        await self.prepare()
        with self._capture(record, body, connect_timeout_s, stream=True) as captured:
            target, arguments = self._prepare_call(record, body, headers, captured, include_usage=include_usage)
            disable_request_logging()
            try:
                response = await self._call(arguments)
            except ResponseTaken:
                taken = captured.hand_over()
                reader = ChunkReader(memory=self._memory, choices=captured.choices, headers=taken.headers)
                return UpstreamChunks(taken, reader, target.secrets)
            except self._call_errors as error:
                raise redact(target.secrets, captured.error_from(error)) from error
            captured.openai_format = False  # litellm reads it
            return TranslatedChunks(response, captured, target.secrets, self._call_errors)

    async def embed(
        self,
        record: ModelRecord,
        asked: EmbeddingsRequest,
        headers: Mapping[str, str],
        *,
        connect_timeout_s: float | None = None,
    ) -> JSONPayload:
        """Return embeddings in OpenAI's format. Raises UpstreamError."""
        await self.prepare()
        timeout_s = connect_timeout_s or self._settings.connect_timeout_s
        with capture(timeout_s, memory=self._memory, model=record.name, max_vector_values=MAX_VALUES) as captured:
            target, params = self._connection_params(record, headers, captured)
            client = self._embeddings_client(target, params)
            arguments = {**embedding_arguments(target, merge_model_params(record.litellm_params, asked.body)), **params}
            disable_request_logging()
            try:
                call = self._litellm.aembedding(**arguments, client=client)
                response = await run_uncancelled(call, cancelled_again_s=GRACE_PERIOD_S)
                embeddings: dict[str, Any] = response.model_dump(mode="json", exclude_none=True)
                check_embeddings(record.name, embeddings)
                return with_encoding(record.name, JSONPayload(embeddings), asked.encoding)
            except UpstreamError as error:
                raise redact(target.secrets, error) from error.__cause__
            except self._call_errors as error:
                raise redact(target.secrets, captured.error_from(error)) from error

    def _embeddings_client(self, target: LiteLLMTarget, params: Mapping[str, Any]) -> Any:
        """Return a client of the class that litellm calls this provider's embeddings with, over our connections."""
        if target.name in ("azure", "azure_text"):
            return None
        return self._openai_client(target, params) if target.name in _EMBEDS_WITH_OPENAI_SDK else self._handler

    def _capture(
        self, record: ModelRecord, body: Mapping[str, Any], connect_timeout_s: float | None, *, stream: bool = False
    ) -> contextlib.AbstractContextManager[CapturedResponse]:
        return capture(
            connect_timeout_s or self._settings.connect_timeout_s,
            stream=stream,
            choices=requested_choices(body),
            memory=self._memory,
            model=record.name,
        )

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        return await run_uncancelled(self._litellm.acompletion(**arguments), cancelled_again_s=GRACE_PERIOD_S)

    async def aclose(self) -> None:
        if self._litellm is not None and self._litellm.aclient_session is self._http:
            self._litellm.aclient_session = None
            self._litellm.in_memory_llm_clients_cache.flush_cache()  # its clients use ours
        await self._http.aclose()

    @property
    def _call_errors(self) -> tuple[type[Exception], ...]:
        import openai

        return (openai.OpenAIError, httpx.HTTPError, httpx.StreamError, OSError, *LITELLM_PARSE_ERRORS)

    def _prepare_call(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None,
        captured: CapturedResponse,
        *,
        include_usage: bool = True,
    ) -> tuple[LiteLLMTarget, dict[str, Any]]:
        """Return who serves the model, and the arguments of `litellm.acompletion`."""
        target, params = self._connection_params(record, headers, captured)
        merged = merge_model_params(record.litellm_params, body)
        return target, {
            **params,
            **call_arguments(target, merged, stream=captured.stream, include_usage=include_usage),
            "client": self._client(target, params),
            "_skip_mcp_handler": True,
        }

    def _connection_params(
        self, record: ModelRecord, headers: Mapping[str, str] | None, captured: CapturedResponse
    ) -> tuple[LiteLLMTarget, dict[str, Any]]:
        """Return who serves the model, and the arguments of any call of it."""
        model = self._models.get(record.name)
        if model is None or model.record is not record:
            model = self._models[record.name] = self._read_model(record)
        captured.transport, captured.trust = self._transport, model.trust
        captured.openai_format = model.target.openai_format
        return model.target, {
            **{name: _copied(value) for name, value in model.params.items()},
            "model": record.litellm_params["model"],
            "extra_headers": {**model.headers, **(headers or {})} or None,
            "timeout": self._max_timeout_s,
            "max_retries": 0,
            "no-log": True,
        }

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        """Forget what is known of models that are gone or changed."""
        self._models = {name: model for name, model in self._models.items() if models.get(name) is model.record}

    def _read_model(self, record: ModelRecord) -> LiteLLMModel:
        """Find out what is the same for all calls of a model. Raises UpstreamError."""
        params = self._provider_params(record)
        trust = self._trust(record, params.pop("ssl_verify", None))
        target = self._target(record, params)
        if target.api_key == PLACEHOLDER_KEY:
            params["api_key"] = PLACEHOLDER_KEY
        headers = params.pop("extra_headers", None) or {}
        return LiteLLMModel(record, target, params, headers, trust)

    def _provider_params(self, record: ModelRecord) -> dict[str, Any]:
        """Return addresses, keys and the like, with os.environ/NAME resolved."""
        params = {name: value for name, value in record.litellm_params.items() if is_provider_param(name)}
        if "base_url" in params:
            params["api_base"] = params.pop("base_url")
        try:
            return {name: self._resolve(value) for name, value in params.items()}
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamError(f"{record.name}: this server has no key for it", retryable=True) from None

    def _trust(self, record: ModelRecord, stated: Any) -> Trust | None:
        try:
            return None if stated is None else self._outbound.trust_of(stated)
        except OutboundError as error:
            raise unreachable(error, record.name) from error

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, str):
            return resolve_secret(value, self._environ, self._settings.allowed_env)
        if isinstance(value, dict):
            return {name: self._resolve(inner) for name, inner in value.items()}
        return value

    def _target(self, record: ModelRecord, params: Mapping[str, Any]) -> LiteLLMTarget:
        try:
            model, name, key, api_base = self._litellm.get_llm_provider(
                record.litellm_params["model"],
                custom_llm_provider=params.get("custom_llm_provider"),
                api_base=params.get("api_base"),
                api_key=params.get("api_key"),
            )
        except self._call_errors as error:
            log.error("model %s: %s", record.name, error)
            message = f"{record.name}: no provider is known by its name {record.litellm_params['model'][:128]!r}"
            raise UpstreamError(message, retryable=True) from error
        if why := NOT_SERVED.get(name):
            raise UpstreamError(f"{record.name}: {name} is not served, for {why}", retryable=True)
        try:
            given = key_for_litellm(params, name, self._default_base(record, params), self._environ)
        except OutboundError as error:
            raise unreachable(error, record.name) from error
        key = given or key
        return LiteLLMTarget(name, model, api_base or params.get("api_base"), key, secrets_of(params, key))

    def _default_base(self, record: ModelRecord, params: Mapping[str, Any]) -> str | None:
        """Return where litellm would go if no address were stated."""
        if params.get("api_key") or not params.get("api_base"):
            return None
        model, provider = record.litellm_params["model"], params.get("custom_llm_provider")
        base: str | None = self._litellm.get_llm_provider(model, custom_llm_provider=provider)[3]
        return base

    def _client(self, target: LiteLLMTarget, params: Mapping[str, Any]) -> Any:
        """Return a client of the class that this provider needs, over our connections.

        For azure, litellm makes one over the pool itself.
        """
        if target.name in ("azure", "azure_text"):
            return None
        if self._needs_openai_sdk(target):
            return self._openai_client(target, params)
        return self._handler

    def _needs_openai_sdk(self, target: LiteLLMTarget) -> bool:
        from litellm.llms.openai_like.json_loader import JSONProviderRegistry

        name = target.name
        compatible = name in self._litellm.openai_compatible_providers and name not in _OWN_HANDLER
        return compatible or name in _OPENAI_SDK or JSONProviderRegistry.exists(name)

    def _openai_client(self, target: LiteLLMTarget, params: Mapping[str, Any]) -> Any:
        import openai

        at_openai = target.name in _OPENAI and not target.api_base
        key = target.api_key or (self._environ.get("OPENAI_API_KEY") if at_openai else None) or "-"
        base, organization = target.api_base or "https://api.openai.com/v1", params.get("organization")
        cache_key = (base, key, str(organization))
        if cache_key not in self._openai_clients:
            client = openai.AsyncOpenAI(api_key=key, base_url=base, http_client=self._http, max_retries=0)
            if organization or not at_openai:
                # it reads OPENAI_ORG_ID and OPENAI_PROJECT_ID by itself, and would send them to any address
                client.organization, client.project = organization, None
            self._openai_clients[cache_key] = client
            if len(self._openai_clients) > MAX_CLIENTS:
                self._openai_clients.popitem(last=False)
        return self._openai_clients[cache_key]


# OpenAI itself, by its chat completions and by its text completions.
_OPENAI = frozenset({"openai", "text-completion-openai"})

# Providers for which litellm needs an AsyncOpenAI, besides most of its `openai_compatible_providers`.
_OPENAI_SDK = _OPENAI | frozenset({"custom_openai", "lm_studio", "llamafile", "litellm_proxy", "docker_model_runner"})

# Exceptions to these: they need litellm's own handler, as all other providers do.
_OWN_HANDLER = frozenset(
    """
    deepseek azure_ai fireworks_ai together_ai ragflow xai groq cometapi hosted_vllm edenai github_copilot chatgpt
    """.split()
)


# Providers whose embeddings litellm asks for with an AsyncOpenAI.
_EMBEDS_WITH_OPENAI_SDK = frozenset(
    "openai together_ai nvidia_nim litellm_proxy mistral fireworks_ai nebius wandb xinference".split()
)


class TranslatedChunks:
    """The chunks that litellm makes of a stream in another format. They are pulled out of it in a task of its own."""

    def __init__(
        self,
        response: Any,
        captured: CapturedResponse,
        secrets: frozenset[str],
        call_errors: tuple[type[Exception], ...],
    ) -> None:
        """
        Args:
            response: an iterator over litellm's own objects.
            secrets: to be cut out of errors.
            call_errors: what litellm raises.
        """
        self._response = response
        self._captured = captured
        self._secrets = secrets
        self._call_errors = call_errors
        self._chunks = self._convert()
        self._pulling: asyncio.Task[None] | None = None
        self._goes_on = asyncio.Event()

    def start(self, receiver: ChunkReceiver) -> None:
        self._goes_on.set()
        self._pulling = asyncio.create_task(self._pull(receiver), name="uniroute-chunks")

    def hold(self) -> None:
        self._goes_on.clear()

    def resume(self) -> None:
        self._goes_on.set()

    async def aclose(self) -> None:
        try:
            if self._pulling is not None:
                await cancel_until_done((self._pulling,))
        finally:
            self._captured.end()
            await self._chunks.aclose()

    async def _pull(self, receiver: ChunkReceiver) -> None:
        error: Exception | None = None
        try:
            while (chunk := await self._next()) is not None:
                receiver.receive([chunk])
                await self._goes_on.wait()
        except Exception as failure:  # noqa: BLE001  it is raised where the chunks are waited for
            error = failure
        receiver.end(error)

    async def _next(self) -> JSONPayload | None:
        """Return the next chunk, or None at the end. Raises UpstreamError if the stream breaks, or ends too early."""
        captured = self._captured
        try:
            with in_call(captured):
                return JSONPayload(await anext(self._chunks))
        except StopAsyncIteration:
            captured.end()
            if captured.error is not None:  # in some formats litellm takes a body that breaks off for its end
                raise redact(self._secrets, captured.error) from captured.error.__cause__
            return None
        except UpstreamError as error:
            captured.end()
            raise redact(self._secrets, captured.error or error) from error.__cause__

    async def _convert(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield litellm's chunks as JSON. Its usage chunk has a choice; ours has none."""
        response, captured = aiter(self._response), self._captured
        tracker, first_id = FinishTracker(), None
        try:
            while (converted := await await_cancellable(anext(response, None))) is not None:
                chunk = _to_json(converted)
                first_id = chunk["id"] = first_id or chunk.get("id")  # litellm gives some formats an id per chunk
                if chunk.get("usage") and tracker.all_finished():
                    chunk["choices"] = []
                if is_finished(chunk) and _has_fabricated_end(self._response):
                    break
                tracker.observe(chunk["choices"])
                yield chunk
        except self._call_errors as error:
            if not tracker.all_finished(captured.choices):
                raise captured.error_from(error) from error
        if not tracker.all_finished():
            raise UpstreamError("the model's stream ended before its answer did")


def _has_fabricated_end(response: Any) -> bool:
    # If the upstream broke off, litellm ends the stream with "stop". These are the reasons that it really received.
    received = ("received_finish_reason", "intermittent_finish_reason")
    return all(hasattr(response, name) for name in received) and not any(getattr(response, name) for name in received)


def _to_json(response: Any) -> dict[str, Any]:
    """Return litellm's object as JSON, without the fields that it adds to every message."""
    plain: dict[str, Any] = response.model_dump(mode="json", exclude_none=True, exclude={"provider_specific_fields"})
    for choice in plain.get("choices", ()):
        for part in ("message", "delta"):
            if isinstance(choice.get(part), dict):
                choice[part].pop("provider_specific_fields", None)
                if part == "message":
                    choice[part].setdefault("content", None)
    return plain


@dataclass(frozen=True)
class LiteLLMTarget:
    """Which provider litellm calls for a model, and where."""

    name: str
    model: str
    api_base: str | None
    api_key: str | None = field(default=None, repr=False)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """Text to cut out of this provider's errors."""

    @property
    def passthrough(self) -> bool:
        """Return whether the provider reads OpenAI's own body, at an address that the administrator configured."""
        return self.name in PASSTHROUGH and bool(self.api_base) and not is_openai_url(self.api_base or "")

    @property
    def openai_format(self) -> bool:
        return self.name in PASSTHROUGH or self.name == "azure"


@dataclass(frozen=True)
class LiteLLMModel:
    """What is the same for all calls of a model."""

    record: ModelRecord = field(repr=False)
    target: LiteLLMTarget
    params: Mapping[str, Any] = field(repr=False)
    """Arguments of litellm."""
    headers: Mapping[str, str] = field(repr=False)
    trust: Trust | None
    """Which certificates are trusted. None: the default."""


def _copied(value: Any) -> Any:
    """Copy what litellm might change in place."""
    return copy.deepcopy(value) if isinstance(value, dict | list) else value


def call_arguments(
    target: LiteLLMTarget, body: Mapping[str, Any], *, stream: bool, include_usage: bool = True
) -> dict[str, Any]:
    """Return the arguments of a litellm call that come from the body, after merge_model_params."""
    sent = {name: value for name, value in body.items() if name not in ("model", "stream", "stream_options")}
    if stream and include_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    if target.passthrough:
        # litellm checks, rewrites and logs its arguments. It gets a blank turn, which the real body overrides.
        return {
            "messages": [{"role": "user", "content": "-"}],
            "extra_body": sent,
            "stream": stream,
            "_skip_responses_api_bridge": True,
        }
    fields = {name: value for name, value in sent.items() if name in CHAT_FIELDS and value is not None}
    rest = {name: value for name, value in sent.items() if name not in CHAT_FIELDS}
    arguments = {"messages": rest.pop("messages"), "stream": stream}
    if "stream_options" in rest:
        arguments["stream_options"] = rest.pop("stream_options")
    if not target.openai_format:
        fields, rest = _without(fields, OPENAI_ONLY), _without(rest, OPENAI_ONLY)
    return copy.deepcopy({**arguments, **fields, **({"extra_body": rest} if rest else {})})  # litellm rewrites in place


def embedding_arguments(target: LiteLLMTarget, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a litellm call for embeddings that come from the body.

    Vectors are asked for as numbers, which every provider knows. Fields for OpenAI's own records stay here.
    """
    sent = {
        name: value for name, value in body.items() if name not in ("model", "encoding_format") and value is not None
    }
    if target.openai_format:
        sent |= {"encoding_format": "float", "allowed_openai_params": ["dimensions"]}
    else:
        sent.pop("user", None)
    return copy.deepcopy(sent)


def _without(fields: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
