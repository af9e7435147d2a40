"""From an answer to a score, or to none: graders in a child process, judges through the model that judges."""

from __future__ import annotations

from collections.abc import Callable

from proxy.jobs.answering import Answer
from proxy.jobs.asking import Asker, cost_of, most_it_can_cost
from proxy.jobs.grading import GradingProcess
from router_core.types import Price
from router_core.validation.graders import JudgeGrader
from router_core.validation.prompts import ValidationPrompt

JUDGE_TOKENS = 512
CUT_OFF = "length"


class NoJudge(Exception):
    """A prompt needs a judge, and no model is configured to be it."""


class Judge:
    """The models that grade what no rule can."""

    def __init__(
        self, asker_of: Callable[[str], tuple[Asker, Price | None]], default: str | None, grading: GradingProcess
    ) -> None:
        self._find = asker_of
        self._default = default
        self._grading = grading
        self._found: dict[str, tuple[Asker, Price | None]] = {}

    def check(self, prompts: tuple[ValidationPrompt, ...], *, capped: bool) -> None:
        """Before anything is spent. Raises NoJudge."""
        for prompt in prompts:
            if not isinstance(prompt.grader, JudgeGrader):
                continue
            name = prompt.grader.model or self._default
            if name is None:
                raise NoJudge(f"the validation prompt {prompt.id!r} needs a judge: set judge_model")
            if capped and self._asker_of(name)[1] is None:
                raise NoJudge(f"no price is known for the judge {name!r}, so max_usd cannot be kept")

    def _asker_of(self, name: str) -> tuple[Asker, Price | None]:
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def most_it_can_cost(self, prompt: ValidationPrompt, answer_tokens: int) -> float:
        """USD to set aside for judging one answer; a token of it is at most 8 bytes on the way to the judge."""
        if not isinstance(prompt.grader, JudgeGrader):
            return 0.0
        asker, price = self._asker_of(prompt.grader.model or self._default or "")
        messages = prompt.grader.messages(prompt.text, "")
        if price is None:
            return 0.0
        return most_it_can_cost(messages, asker.record, price, JUDGE_TOKENS) + (
            8 * answer_tokens * price.input_cost_per_token
        )

    async def score(self, prompt: ValidationPrompt, answer: Answer) -> tuple[float | None, float]:
        """The score, None where there is none, and what judging cost in USD. Raises AnswerFailed."""
        grader = prompt.grader
        if not isinstance(grader, JudgeGrader):
            return await self._grading.grade(prompt, answer.text), 0.0
        asker, price = self._asker_of(grader.model or self._default or "")
        messages = grader.messages(prompt.text, answer.text)
        verdict = await asker.ask(messages, JUDGE_TOKENS)
        cost = 0.0
        if price is not None:
            cost = cost_of(verdict, price, most_it_can_cost(messages, asker.record, price, JUDGE_TOKENS))
        return (None if verdict.finish_reason == CUT_OFF else grader.parse(verdict.text)), cost
