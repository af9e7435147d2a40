"""One answer of one model, as profiling needs it. How the model is reached is upstream; when to try again is asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from proxy.errors import AnswerTooLarge, UpstreamFailure
from proxy.storage.models import ModelRecord
from proxy.storage.usage import Received, TokenCounts, believed, counts_of, usage_of
from proxy.upstream.circuit_breaker import stated_wait_s
from proxy.upstream.payload import Payload

WORTH_RETRYING = frozenset({408, 409, 425, 429})
LONGEST_REASON = 300
LONGEST_ANSWER = 100_000
"""Characters of an answer that are graded or judged; what is longer is cut."""
HINTS: Mapping[int, str] = {
    400: "the provider refuses the request: check litellm_params",
    401: "the provider refuses the key: check litellm_params.api_key and its variable",
    403: "the provider refuses the key for this model",
    404: "check litellm_params.model and api_base",
    429: "the provider limits the rate or the quota is used up: try later, or with a lower profile.concurrency",
}

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. None: the provider did not say."""

    text: str
    finish_reason: str | None
    counts: TokenCounts
    reasoned: bool
    seconds: float

    @property
    def output_tokens(self) -> int | None:
        """Reasoning included, as it is billed."""
        return self.counts.output_tokens


class AnswerFailed(Exception):
    """The model gave no answer; the message says why and what may help."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        hopeless: bool = False,
    ) -> None:
        """`hopeless`: the same is to be expected of another attempt, whatever the status."""
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self._hopeless = hopeless

    @property
    def worth_retrying(self) -> bool:
        if self._hopeless:
            return False
        return self.status is None or self.status in WORTH_RETRYING or self.status >= 500


class Answerer(Protocol):
    async def answer(
        self, record: ModelRecord, messages: Sequence[Message], *, max_tokens: int, timeout_s: float
    ) -> Answer:
        """Raises AnswerFailed, also when `timeout_s` is over."""


class Upstream(Protocol):
    async def complete(self, record: ModelRecord, body: Mapping[str, Any]) -> Payload:
        """An OpenAI chat completion, or UpstreamFailure."""


class UpstreamAnswerer:
    """Asks through the same provider layer that serves requests, so that a profile measures what is served."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def answer(
        self, record: ModelRecord, messages: Sequence[Message], *, max_tokens: int, timeout_s: float
    ) -> Answer:
        body = {"model": record.name, "messages": [dict(message) for message in messages], "max_tokens": max_tokens}
        started = monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                completion = (await self._upstream.complete(record, body)).body
        except TimeoutError as error:
            raise AnswerFailed(f"{record.name} did not answer within {timeout_s:g} s") from error
        except UpstreamFailure as error:
            raise _failed(error) from error
        return read_answer(completion, monotonic() - started, record.name)


def read_answer(completion: Mapping[str, Any], seconds: float, model: str) -> Answer:
    """The first choice of an OpenAI completion. Raises AnswerFailed where there is none."""
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise AnswerFailed(f"{model} answered without any choice", status=502)
    counts = counts_of(usage_of(completion))
    text = _text(message.get("content"))
    counts = believed(counts, Received(0, len(text.encode("utf-8", "replace")), unreported_bytes=0))
    return Answer(
        text=text,
        finish_reason=_word(choice.get("finish_reason")),
        counts=counts,
        reasoned=bool(counts.reasoning_tokens or message.get("reasoning_content") or message.get("reasoning")),
        seconds=seconds,
    )


def _failed(error: UpstreamFailure) -> AnswerFailed:
    """The upstream's words are left out: some providers repeat the key in them."""
    hint = HINTS.get(error.status or 0)
    reason = f"{error}; {hint}" if hint else str(error)
    return AnswerFailed(
        reason[:LONGEST_REASON],
        status=error.status,
        retry_after_s=stated_wait_s(error.headers, time.time()),
        hopeless=isinstance(error, AnswerTooLarge),
    )


def _text(content: Any) -> str:
    """No more than is graded."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content[:LONGEST_ANSWER] if isinstance(part, Mapping)]
        content = "".join(part[:LONGEST_ANSWER] for part in parts if isinstance(part, str))
    return content[:LONGEST_ANSWER] if isinstance(content, str) else ""


def _word(value: Any) -> str | None:
    return value[:40] if isinstance(value, str) else None
