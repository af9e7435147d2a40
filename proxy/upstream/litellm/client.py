from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Any

import httpx

from proxy.concurrency import GRACE_PERIOD_S, LRU, cancel_and_wait, in_own_thread, iterate_uncancelled, run_uncancelled
from proxy.errors import UpstreamError
from proxy.outbound import Outbound, OutboundError, Trust
from proxy.settings.models import SettingsError, resolve_secret
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord
from proxy.upstream.answer_room import AnswerRoom
from proxy.upstream.errors import redact, unreachable
from proxy.upstream.litellm.params import (
    FOLLOWS_REDIRECTS,
    LiteLLMTarget,
    call_arguments,
    is_provider_param,
    merge_model_params,
    secrets_of,
)
from proxy.upstream.litellm.setup import disable_request_logging, http_handler, import_litellm, warm_up
from proxy.upstream.litellm.transport import CapturedResponse, capture, chunks_of, open_pool, reap_connections
from proxy.upstream.origins import STAND_IN, key_of_call
from proxy.upstream.payload import ChoiceEnds, answers_of, is_finished
from proxy.words import words

log = logging.getLogger("uniroute.upstream")

MAX_CLIENTS = 256

LITELLM_PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What litellm raises where a caller's or a model's JSON has another shape than it expects."""

Chunks = AsyncGenerator[dict[str, Any]]


class LiteLLMClient:
    """One per process, on one event loop. `prepare` before the first call."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        room: AnswerRoom | None = None,
        outbound: Outbound | None = None,
    ) -> None:
        self._settings = settings
        self._room = room or AnswerRoom()
        self._outbound = outbound or Outbound(environ)
        self._environ = environ
        self._litellm: Any = None
        self._longest_s = max(settings.request_timeout_s, settings.stream_timeout_s)  # shorter ones are the attempts'
        self._pool = open_pool(self._longest_s, self._outbound)
        self._handler: Any = None
        self._tidying: asyncio.Task[None] | None = None
        self._clients: LRU[tuple[str, ...], Any] = LRU(MAX_CLIENTS)

    @property
    def ready(self) -> bool:
        return self._litellm is not None

    async def prepare(self) -> None:
        """Imports litellm, which takes seconds, in a thread."""
        if self._litellm is None:
            litellm = await in_own_thread(import_litellm)
            await warm_up(litellm)
            litellm.aclient_session = self._pool  # for azure, which else gets a client that nobody tidies or bounds
            self._handler = http_handler(self._pool)
            self._tidying = asyncio.create_task(reap_connections(self._pool), name="uniroute-tidying")
            self._litellm = litellm

    async def complete(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        connect_s: float | None = None,
    ) -> dict[str, Any]:
        """The whole answer in OpenAI's format, untouched where that is the upstream's own. Raises UpstreamFailure."""
        await self.prepare()
        with self._watched(record, body, connect_s) as exchange:
            provider, arguments = self._arguments(record, body, headers, exchange)
            disable_request_logging()
            try:
                answer = await self._called(arguments)
            except self._failures as error:
                if not provider.openai_format or exchange.completion is None:
                    raise redact(provider.secrets, exchange.failure_of(error)) from error
                return exchange.completion
            if not (provider.openai_format and exchange.is_chat_format):
                return _to_json(answer)
            if exchange.completion is None:
                raise redact(provider.secrets, exchange.failure_of(None))
            return exchange.completion

    async def stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        connect_s: float | None = None,
        asks_usage: bool = True,
    ) -> Chunks:
        """Chunks in OpenAI's format, the last with usage and no choices. Close it to close the upstream's connection.

        Raises:
            UpstreamFailure: here if the upstream refused, later where the stream breaks or ends without its end.
        """
        await self.prepare()
        with self._watched(record, body, connect_s, streams=True) as exchange:
            provider, arguments = self._arguments(record, body, headers, exchange, asks_usage=asks_usage)
            exchange.in_openais_format = provider.openai_format
            disable_request_logging()
            try:
                answer = await self._called(arguments)
            except self._failures as error:
                raise redact(provider.secrets, exchange.failure_of(error)) from error
            except BaseException:
                await exchange.aclose()
                raise
            if exchange.response is not None and exchange.is_read_here:
                chunks = chunks_of(exchange.response, self._room, exchange.answers)
            else:
                chunks = self._converted(answer, exchange)
            return _redacted(chunks, exchange, provider.secrets)

    def _watched(
        self, record: ModelRecord, body: Mapping[str, Any], connect_s: float | None, *, streams: bool = False
    ) -> contextlib.AbstractContextManager[CapturedResponse]:
        within_s = connect_s or self._settings.connect_timeout_s
        return capture(within_s, streams=streams, answers=answers_of(body), room=self._room, model=record.name)

    async def _called(self, arguments: Mapping[str, Any]) -> Any:
        return await run_uncancelled(self._litellm.acompletion(**arguments), cancelled_again_s=GRACE_PERIOD_S)

    async def _converted(self, answer: Any, exchange: CapturedResponse) -> AsyncGenerator[dict[str, Any]]:
        """Chunks that litellm made of another format; its usage chunk carries a choice, ours none."""
        ends, first_id = ChoiceEnds(), None
        try:
            async for converted in iterate_uncancelled(answer):
                chunk = _to_json(converted)
                first_id = chunk["id"] = first_id or chunk.get("id")  # it gives some formats a new id with every chunk
                if chunk.get("usage") and ends.all():
                    chunk["choices"] = []
                if is_finished(chunk) and _has_fabricated_end(answer):
                    break
                ends.see(chunk["choices"])
                yield chunk
        except self._failures as error:
            if not ends.all(exchange.answers):
                raise exchange.failure_of(error) from error
        if not ends.all():
            raise UpstreamError("the model's stream ended before its answer did")

    async def aclose(self) -> None:
        await cancel_and_wait(self._tidying)
        if self._litellm is not None and self._litellm.aclient_session is self._pool:
            self._litellm.aclient_session = None
            self._litellm.in_memory_llm_clients_cache.flush_cache()  # of clients around the pool
        await self._pool.aclose()

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        import openai

        return (openai.OpenAIError, httpx.HTTPError, httpx.StreamError, OSError, *LITELLM_PARSE_ERRORS)

    def _arguments(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None,
        exchange: CapturedResponse,
        *,
        asks_usage: bool = True,
    ) -> tuple[LiteLLMTarget, dict[str, Any]]:
        params = self._provider_params(record)
        exchange.transport, exchange.trust = self._pool._transport, self._trust(record, params.pop("ssl_verify", None))
        provider = self._provider(record, params)
        if provider.api_key == STAND_IN:
            params["api_key"] = STAND_IN  # else litellm looks one up
        merged = merge_model_params(record.litellm_params, body)
        own_headers = {**(params.pop("extra_headers", None) or {}), **(headers or {})}
        return provider, {
            **params,
            **call_arguments(provider, merged, stream=exchange.streams, asks_usage=asks_usage),
            "model": record.litellm_params["model"],
            "client": self._client(provider, params),
            "extra_headers": own_headers or None,
            "timeout": self._longest_s,
            "max_retries": 0,
            "_skip_mcp_handler": True,
            "no-log": True,
        }

    def _provider_params(self, record: ModelRecord) -> dict[str, Any]:
        """Addresses, keys and the like, with os.environ/NAME resolved now, so that nothing else ever holds a key."""
        params = {name: value for name, value in record.litellm_params.items() if is_provider_param(name)}
        if "base_url" in params:
            params["api_base"] = params.pop("base_url")
        try:
            return {name: self._resolved(value) for name, value in params.items()}
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamError(f"{record.name}: this server has no key for it", retryable=True) from None

    def _trust(self, record: ModelRecord, stated: Any) -> Trust | None:
        try:
            return None if stated is None else self._outbound.trust_of(stated)
        except OutboundError as error:
            raise unreachable(error, record.name) from error

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, str):
            return resolve_secret(value, self._environ, self._settings.allowed_env)
        if isinstance(value, dict):
            return {name: self._resolved(inner) for name, inner in value.items()}
        return value

    def _provider(self, record: ModelRecord, params: Mapping[str, Any]) -> LiteLLMTarget:
        try:
            model, name, key, api_base = self._litellm.get_llm_provider(
                record.litellm_params["model"],
                custom_llm_provider=params.get("custom_llm_provider"),
                api_base=params.get("api_base"),
                api_key=params.get("api_key"),
            )
        except self._failures as error:
            log.error("model %s: %s", record.name, error)
            message = f"{record.name}: no provider is known by its name {record.litellm_params['model'][:128]!r}"
            raise UpstreamError(message, retryable=True) from error
        if name in FOLLOWS_REDIRECTS:
            raise UpstreamError(f"{record.name}: {name} is not served, for it follows redirects", retryable=True)
        try:
            given = key_of_call(params, name, self._default_base(record, params), self._environ)
        except OutboundError as error:
            raise unreachable(error, record.name) from error
        key = given or key
        return LiteLLMTarget(name, model, api_base or params.get("api_base"), key, secrets_of(params, key))

    def _default_base(self, record: ModelRecord, params: Mapping[str, Any]) -> str | None:
        """Where litellm would go if no address were stated."""
        if params.get("api_key") or not params.get("api_base"):
            return None
        model, provider = record.litellm_params["model"], params.get("custom_llm_provider")
        base: str | None = self._litellm.get_llm_provider(model, custom_llm_provider=provider)[3]
        return base

    def _client(self, provider: LiteLLMTarget, params: Mapping[str, Any]) -> Any:
        """Our pool behind the client class that this provider takes; azure's litellm makes around the pool itself."""
        if provider.name == "azure":
            return None
        if self._takes_openais_sdk(provider):
            return self._openai_client(provider, params)
        return self._handler

    def _takes_openais_sdk(self, provider: LiteLLMTarget) -> bool:
        compatible = provider.name in self._litellm.openai_compatible_providers and provider.name not in _OWN_HANDLER
        return compatible or provider.name in _OPENAI_SDK

    def _openai_client(self, provider: LiteLLMTarget, params: Mapping[str, Any]) -> Any:
        import openai

        at_openai = provider.name == "openai" and not provider.api_base
        key = provider.api_key or (self._environ.get("OPENAI_API_KEY") if at_openai else None) or "-"
        base, organization = provider.api_base or "https://api.openai.com/v1", params.get("organization")
        known = (base, key, str(organization))
        client = self._clients.get(known)
        if client is None:
            client = openai.AsyncOpenAI(api_key=key, base_url=base, http_client=self._pool, max_retries=0)
            if organization or not at_openai:
                # it reads OPENAI_ORG_ID and OPENAI_PROJECT_ID by itself, and would name them to anybody
                client.organization, client.project = organization, None
            self._clients[known] = client
        return client


_OPENAI_SDK = frozenset({"openai", "custom_openai", "lm_studio", "llamafile", "litellm_proxy", "docker_model_runner"})
"""Providers for which litellm takes an AsyncOpenAI, with most of its `openai_compatible_providers`."""

_OWN_HANDLER = words("""
    deepseek azure_ai fireworks_ai together_ai ragflow xai groq cometapi hosted_vllm edenai github_copilot chatgpt
""")
"""Those that take litellm's own handler around our pool after all, as every other provider does."""


async def _redacted(chunks: Chunks, exchange: CapturedResponse, secrets: Collection[str]) -> Chunks:
    """The same chunks, and then the upstream's connection is closed. A failure is told without the provider's keys."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
        if exchange.fault is not None:  # litellm takes a body that breaks off for its end, in some formats
            raise exchange.fault
    except UpstreamError as failure:
        raise redact(secrets, exchange.fault or failure) from failure.__cause__
    finally:
        await exchange.aclose()


def _has_fabricated_end(answer: Any) -> bool:
    """Where the upstream broke off, litellm ends the stream with "stop". This is what it was really told."""
    told = ("received_finish_reason", "intermittent_finish_reason")
    return all(hasattr(answer, name) for name in told) and not any(getattr(answer, name) for name in told)


def _to_json(answer: Any) -> dict[str, Any]:
    """litellm's object as JSON, without the fields that it adds to every message."""
    plain: dict[str, Any] = answer.model_dump(mode="json", exclude_none=True, exclude={"provider_specific_fields"})
    for choice in plain.get("choices", ()):
        for part in ("message", "delta"):
            if isinstance(choice.get(part), dict):
                choice[part].pop("provider_specific_fields", None)
                if part == "message":
                    choice[part].setdefault("content", None)
    return plain
