"""When to ask again and how long to wait; what an answer costs and can cost. Grades nothing, stores nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from proxy.jobs.answering import Answer, Answerer, AnswerFailed, Message
from proxy.storage.models import ModelRecord
from proxy.storage.usage import cost_usd
from router_core.pricing import max_price_usd
from router_core.types import Price

THINKING_TOKENS = 4096
"""Added to the limit of an answer where the model thinks first: thinking counts against the limit."""
TOKENS_PER_MESSAGE = 16
"""For the roles and marks that a provider puts around a message."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How a provider that is busy or broken is treated."""

    attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0
    """Also the longest `retry-after` that is honoured."""
    timeout_s: float = 120.0
    """For one attempt."""

    def wait_s(self, attempt: int, failure: AnswerFailed) -> float:
        """What the provider asked for, else exponential; with jitter, so that many do not come back at once."""
        wait = self.first_wait_s * 2**attempt if failure.retry_after_s is None else failure.retry_after_s
        return min(self.longest_wait_s, wait) * random.uniform(1.0, 1.25)  # noqa: S311


class Asker:
    """Asks one model for one job. When the provider says to wait, all prompts wait."""

    def __init__(self, answerer: Answerer, record: ModelRecord, patience: Patience) -> None:
        self.record = record
        self._answerer = answerer
        self._patience = patience
        self._not_before = 0.0

    async def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        """Raises AnswerFailed once it is not worth another attempt."""
        for attempt in range(self._patience.attempts):
            await asyncio.sleep(max(0.0, self._not_before - monotonic()))
            try:
                return await self._answerer.answer(
                    self.record, messages, max_tokens=max_tokens, timeout_s=self._patience.timeout_s
                )
            except AnswerFailed as failure:
                if not failure.worth_retrying or attempt + 1 == self._patience.attempts:
                    raise
                self._not_before = monotonic() + self._patience.wait_s(attempt, failure)
        raise AnswerFailed(f"{self.record.name} was not asked: patience.attempts is {self._patience.attempts}")


def own_limit(record: ModelRecord) -> int | None:
    """The token limit that is part of the arm itself: users get answers cut there too."""
    limits = (record.litellm_params.get(name) for name in ("max_tokens", "max_completion_tokens"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def cost_of(answer: Answer, price: Price, at_most: float) -> float:
    """USD of one answer; `at_most` where the provider did not count."""
    usd = cost_usd(answer.counts, price)
    return at_most if usd is None else usd


def most_it_can_cost(messages: Sequence[Message], record: ModelRecord, price: Price, max_tokens: int) -> float:
    """USD that is set aside before asking: a token is at least one byte of what is sent."""
    sent = [message["content"] for message in messages] + [str(record.litellm_params.get("system") or "")]
    prompt_tokens = sum(len(text.encode("utf-8", "replace")) + TOKENS_PER_MESSAGE for text in sent)
    return max_price_usd(prompt_tokens, max_tokens, price, audio_input=False, audio_output=False, images=False)
