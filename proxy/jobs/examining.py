"""One validation prompt put to one model: asked, given room to think, graded, paid for. Stores nothing itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from proxy.jobs.answering import Answer, AnswerFailed
from proxy.jobs.asking import THINKING_TOKENS, Asker, cost_of, most_it_can_cost, own_limit
from proxy.jobs.budget import Budget
from proxy.jobs.judging import CUT_OFF, Judge
from proxy.jobs.records import PromptAnswer
from router_core.types import Price
from router_core.validation.prompts import ValidationPrompt

THINKING_MARKS = ("<think>", "<thinking>", "<reasoning>")

Reserve = Callable[[str, float], Awaitable[None]]
"""Writes down that so many USD may be spent on this prompt, before they are."""


@dataclass(frozen=True)
class Arm:
    """A model as a job asks it."""

    asker: Asker
    price: Price | None
    """None: unknown, and so is what is spent."""
    thinks: bool
    """Known to think before it answers."""
    max_output_tokens: int | None

    def limit(self, tokens: int) -> int:
        """The limit to send: the arm's own one, if it is lower, is part of what users get."""
        bounds = (tokens, own_limit(self.asker.record), self.max_output_tokens)
        return min(bound for bound in bounds if bound is not None)


@dataclass(slots=True)
class Bill:
    """What was set aside for one prompt and what it has cost so far, in USD."""

    set_aside: float = 0.0
    spent: float = 0.0


class Examiner:
    """Puts prompts to one arm. Knows how many failed in a row."""

    def __init__(self, arm: Arm, judge: Judge, budget: Budget, reserve: Reserve) -> None:
        self._arm = arm
        self._judge = judge
        self._budget = budget
        self._reserve = reserve
        self.failures_in_a_row = 0
        self.last_failure = ""

    async def examine(self, prompt: ValidationPrompt) -> PromptAnswer | None:
        """What became of the prompt; None where the budget does not allow to ask it."""
        limit = self._arm.limit(prompt.max_tokens + (THINKING_TOKENS if self._arm.thinks else 0))
        bill = Bill(self._most(prompt, limit))
        if not await self._budget.set_aside(bill.set_aside):
            return None
        try:
            await self._reserve(prompt.id, bill.set_aside)
            ended = await self._ended(prompt, limit, bill)
        finally:
            await self._budget.settle(bill.set_aside, bill.spent)
        return replace(ended, cost_usd=None if self._arm.price is None else bill.spent)

    async def _ended(self, prompt: ValidationPrompt, limit: int, bill: Bill) -> PromptAnswer:
        try:
            answer, limit = await self._answer(prompt, limit, bill)
        except AnswerFailed as failure:
            self._failed(failure)
            return PromptAnswer(failed=True)
        return PromptAnswer(
            score=await self._score(prompt, answer, limit, bill),
            output_tokens=answer.output_tokens,
            seconds=answer.seconds,
            finish_reason=answer.finish_reason,
        )

    async def _answer(self, prompt: ValidationPrompt, limit: int, bill: Bill) -> tuple[Answer, int]:
        """The answer and the limit it was given; asked again with room to think if thinking used all of the first."""
        answer = await self._ask(prompt, limit, bill)
        roomy = self._arm.limit(prompt.max_tokens + THINKING_TOKENS)
        if not _lost_in_thought(answer) or roomy <= limit:
            return answer, limit
        more = self._most(prompt, roomy)
        if not await self._budget.add(more):
            return answer, limit
        bill.set_aside += more
        await self._reserve(prompt.id, bill.set_aside)
        return await self._ask(prompt, roomy, bill), roomy

    async def _ask(self, prompt: ValidationPrompt, limit: int, bill: Bill) -> Answer:
        answer = await self._arm.asker.ask(prompt.messages, limit)
        if self._arm.price is not None:
            bill.spent += cost_of(answer, self._arm.price, self._most(prompt, limit))
        return answer

    async def _score(self, prompt: ValidationPrompt, answer: Answer, limit: int, bill: Bill) -> float | None:
        """None, unlabelled: our own limit cut the answer off, or thinking left nothing of it."""
        cut_off = answer.finish_reason == CUT_OFF
        by_the_arm = cut_off and limit == own_limit(self._arm.asker.record)
        if (cut_off or _lost_in_thought(answer)) and not by_the_arm:
            self.failures_in_a_row = 0
            return None
        try:
            score, cost = await self._judge.score(prompt, answer)
        except AnswerFailed as failure:
            self._failed(failure)
            return None
        self.failures_in_a_row = 0
        bill.spent += cost
        return score

    def _failed(self, failure: AnswerFailed) -> None:
        self.failures_in_a_row += 1
        self.last_failure = str(failure)

    def _most(self, prompt: ValidationPrompt, limit: int) -> float:
        if self._arm.price is None:
            return 0.0
        asking = most_it_can_cost(prompt.messages, self._arm.asker.record, self._arm.price, limit)
        return asking + self._judge.most_it_can_cost(prompt, limit)


def _lost_in_thought(answer: Answer) -> bool:
    """It thought, and either was cut off or had nothing left to say."""
    thought = answer.reasoned or any(mark in answer.text for mark in THINKING_MARKS)
    return thought and (answer.finish_reason == CUT_OFF or not answer.text.strip())
