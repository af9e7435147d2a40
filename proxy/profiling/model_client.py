from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.storage.records import ModelRecord
from proxy.storage.usage import ObservedTraffic, TokenCounts, cost_usd, parse_usage, plausible_usage, usage_of
from proxy.upstream.circuit_breaker import parse_retry_after
from proxy.upstream.payload import JSONPayload
from router_core.pricing import max_price_usd
from router_core.types import Price
from router_core.validation.graders.answers import MAX_CALLS, ToolCall, write_reply

RETRYABLE_STATUSES = frozenset({408, 409, 425, 429})

MAX_REASON_CHARS = 300

# A longer answer is cut before it is graded.
MAX_GRADED_CHARS = 100_000

STATUS_HINTS: Mapping[int, str] = {
    400: "the provider refuses the request: check litellm_params",
    401: "the provider refuses the key: check litellm_params.api_key and its variable",
    403: "the provider refuses the key for this model",
    404: "check litellm_params.model and api_base",
    429: "the provider limits the rate or the quota is used up: try later, or with a lower profile.concurrency",
}

TRUNCATED = "length"

# Added to the limit of an answer if the model reasons first: reasoning counts against the limit.
REASONING_TOKENS = 4096

# For the roles and marks that a provider puts around a message.
TOKENS_PER_MESSAGE = 16

# Providers explain tools to a model in words of their own, which they bill: Anthropic names up to 530 tokens.
TOKENS_OF_TOOLS = 1024

# The members of a chat request that a prompt fixes: `messages`, and perhaps `tools` and `tool_choice`.
ChatRequest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The answer of a model. None: the provider did not say."""

    text: str
    """With its tool calls, in the form of `write_reply`."""
    finish_reason: str | None
    counts: TokenCounts
    reasoned: bool
    seconds: float

    @property
    def output_tokens(self) -> int | None:
        """Return the tokens that are billed, reasoning included."""
        return self.counts.output_tokens


class ModelCallError(Exception):
    """A model gave no answer; the message says why and what may help."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        permanent: bool = False,
    ) -> None:
        """`permanent`: another attempt would fail in the same way, whatever the status."""
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self._permanent = permanent

    @property
    def retryable(self) -> bool:
        if self._permanent:
            return False
        return self.status is None or self.status in RETRYABLE_STATUSES or self.status >= 500


class ModelClient(Protocol):
    async def complete(
        self, record: ModelRecord, request: ChatRequest, *, max_tokens: int, timeout_s: float
    ) -> ModelAnswer:
        """Return the model's answer. Raise ModelCallError, also when `timeout_s` is over."""


class Upstream(Protocol):
    async def complete(self, record: ModelRecord, body: Mapping[str, Any]) -> JSONPayload:
        """Return an OpenAI chat completion, or raise UpstreamError."""


class UpstreamModelClient:
    """Call models through the same client that serves requests, so that a profile measures what is served."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def complete(
        self, record: ModelRecord, request: ChatRequest, *, max_tokens: int, timeout_s: float
    ) -> ModelAnswer:
        body = {"model": record.name, **request, "max_tokens": max_tokens}
        started = monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                completion = (await self._upstream.complete(record, body)).body
        except TimeoutError as error:
            raise ModelCallError(f"{record.name} did not answer within {timeout_s:g} s") from error
        except UpstreamError as error:
            raise _failed(error) from error
        return read_answer(completion, monotonic() - started, record.name)


def read_answer(completion: Mapping[str, Any], seconds: float, model: str) -> ModelAnswer:
    """Read the first choice of an OpenAI completion, or raise ModelCallError if there is none."""
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ModelCallError(f"{model} answered without any choice", status=502)
    counts = parse_usage(usage_of(completion))
    text = write_reply(_text(message.get("content")), _calls(message.get("tool_calls")))[:MAX_GRADED_CHARS]
    counts = plausible_usage(counts, ObservedTraffic(0, len(text.encode("utf-8", "replace")), unreported_bytes=0))
    return ModelAnswer(
        text=text,
        finish_reason=_word(choice.get("finish_reason")),
        counts=counts,
        reasoned=bool(counts.reasoning_tokens or message.get("reasoning_content") or message.get("reasoning")),
        seconds=seconds,
    )


def _failed(error: UpstreamError) -> ModelCallError:
    """Translate an error. The upstream's own message is left out: some providers repeat the key in it."""
    hint = STATUS_HINTS.get(error.status or 0)
    reason = f"{error}; {hint}" if hint else str(error)
    return ModelCallError(
        reason[:MAX_REASON_CHARS],
        status=error.status,
        retry_after_s=parse_retry_after(error.headers, time.time()),
        permanent=isinstance(error, ResponseTooLarge),
    )


def _text(content: Any) -> str:
    """Return the text of a message, no longer than is graded."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content[:MAX_GRADED_CHARS] if isinstance(part, Mapping)]
        content = "".join(part[:MAX_GRADED_CHARS] for part in parts if isinstance(part, str))
    return content[:MAX_GRADED_CHARS] if isinstance(content, str) else ""


def _calls(calls: Any) -> list[ToolCall]:
    """Return the calls of a message, however odd each is. Their ids do not matter: nothing answers them."""
    functions = [
        call.get("function") if isinstance(call, Mapping) else None
        for call in (calls[:MAX_CALLS] if isinstance(calls, list) else ())
    ]
    return [
        ToolCall.received(function.get("name"), function.get("arguments"))
        if isinstance(function, Mapping)
        else ToolCall.received(None, None)
        for function in functions
    ]


def _word(value: Any) -> str | None:
    return value[:40] if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which wait, a failed call is repeated."""

    attempts: int = 5
    first_wait_s: float = 0.5
    max_wait_s: float = 20.0
    """Also the longest `retry-after` that is honoured."""
    timeout_s: float = 120.0
    """For one attempt."""

    def wait_s(self, attempt: int, failure: ModelCallError) -> float:
        """Return the wait that the provider asked for, else an exponential one; with jitter, so that calls spread."""
        wait = self.first_wait_s * 2**attempt if failure.retry_after_s is None else failure.retry_after_s
        return min(self.max_wait_s, wait) * random.uniform(1.0, 1.25)  # noqa: S311


class RetryingClient:
    """Call one model for one job, and repeat failed calls. If the provider says to wait, all prompts wait."""

    def __init__(self, client: ModelClient, record: ModelRecord, retry_policy: RetryPolicy) -> None:
        self.record = record
        self._client = client
        self._retry_policy = retry_policy
        self._not_before = 0.0

    async def complete(self, request: ChatRequest, max_tokens: int) -> ModelAnswer:
        """Return the answer. Raise ModelCallError if another attempt is not worth it."""
        for attempt in range(self._retry_policy.attempts):
            await asyncio.sleep(max(0.0, self._not_before - monotonic()))
            try:
                return await self._client.complete(
                    self.record, request, max_tokens=max_tokens, timeout_s=self._retry_policy.timeout_s
                )
            except ModelCallError as failure:
                if not failure.retryable or attempt + 1 == self._retry_policy.attempts:
                    raise
                self._not_before = monotonic() + self._retry_policy.wait_s(attempt, failure)
        raise ModelCallError(
            f"{self.record.name} was not asked: retry_policy.attempts is {self._retry_policy.attempts}"
        )


def cost_of(answer: ModelAnswer, price: Price, at_most: float) -> float:
    """Return the USD of one answer; `at_most` if the provider did not count."""
    usd = cost_usd(answer.counts, price)
    return at_most if usd is None else usd


def max_cost_usd(request: ChatRequest, record: ModelRecord, price: Price, max_tokens: int) -> float:
    """Return the USD to reserve before a call: a token is at least one byte of what is sent."""
    sent = [message["content"] or "" for message in request["messages"]]
    sent += [json.dumps(message["tool_calls"]) for message in request["messages"] if "tool_calls" in message]
    sent.append(str(record.litellm_params.get("system") or ""))
    prompt_tokens = sum(len(text.encode("utf-8", "replace")) + TOKENS_PER_MESSAGE for text in sent)
    if tools := request.get("tools"):
        prompt_tokens += len(json.dumps(tools)) + TOKENS_OF_TOOLS
    return max_price_usd(prompt_tokens, max_tokens, price, audio_input=False, audio_output=False, images=False)


class Budget:
    """The money of one job. `max_usd` None: no limit. Used on one event loop."""

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0) -> None:
        self._left = math.inf if max_usd is None else max_usd - spent_usd
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def reserve(self, usd: float) -> bool:
        """Reserve an amount. Wait while pending answers may give money back; return False once it can never suffice."""
        async with self._settled:
            while usd > self._left and self._in_flight:
                await self._settled.wait()
            if usd > self._left:
                return False
            self._left -= usd
            self._in_flight += 1
            return True

    async def add(self, usd: float) -> bool:
        """Reserve more for a prompt. It never waits: two prompts could wait for each other for ever."""
        async with self._settled:
            enough = usd <= self._left
            if enough:
                self._left -= usd
            return enough

    async def settle(self, reserved: float, spent: float) -> None:
        """Release what was not spent."""
        async with self._settled:
            self._left += reserved - spent
            self._in_flight -= 1
            self._settled.notify_all()
