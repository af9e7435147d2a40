"""Measuring one model: its prompts side by side, a checkpoint after each, one profile at the end. Holds no lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

from proxy.concurrency import cancel_until_done
from proxy.jobs.budget import Budget
from proxy.jobs.examining import Arm, Examiner
from proxy.jobs.judging import Judge
from proxy.jobs.leases import Lease
from proxy.jobs.ledger import Ledger
from proxy.jobs.records import Job, PromptAnswer
from proxy.jobs.validation_prompts import PlacedPrompts, column
from proxy.storage.redis import until_it_answers
from router_core.profiles import Profile, measure
from router_core.validation.prompts import ValidationPrompt

ENOUGH_LABELS = 20
FAILURES_IN_A_ROW = 5
"""So many prompts that fail one after the other, their retries included, end the asking."""


@dataclass(frozen=True)
class Verdict:
    """What a job ends with: a profile, or the reason why there is none."""

    profile: Profile | None = None
    error: str | None = None


class Profiling:
    """One run of one job. The next run goes on where this one stopped: nothing that was answered is asked again."""

    def __init__(self, job: Job, lease: Lease, ledger: Ledger, placed: PlacedPrompts) -> None:
        self._job = job
        self._lease = lease
        self._ledger = ledger
        self._placed = placed
        self._budget = Budget(job.max_usd, job.spent_usd or 0.0)
        self._stopped: str | None = None
        self._left = 0
        self._ended = 0
        self._started = monotonic()

    async def run(self, arm: Arm, judge: Judge, *, concurrency: int, map_id: str) -> Verdict:
        """Raises LeaseLost; then nothing was decided."""
        finished = await self._ledger.answers(self._job.id)
        waiting = [prompt for prompt in self._placed.prompts if prompt.id not in finished]
        self._left = len(waiting)
        examiner = Examiner(arm, judge, self._budget, self._reserve)
        await _side_by_side(self._examine_from, examiner, iter(waiting), min(concurrency, len(waiting)))
        return self._verdict(await self._ledger.answers(self._job.id), map_id)

    async def _examine_from(self, examiner: Examiner, queue: Iterator[ValidationPrompt]) -> None:
        for prompt in queue:
            if self._stopped is not None:
                return
            ended = await examiner.examine(prompt)
            if ended is None:
                self._stopped = f"max_usd={self._job.max_usd:g} does not allow another prompt"
                return
            self._ended += 1
            await until_it_answers(lambda prompt=prompt, ended=ended: self._checkpoint(prompt.id, ended))  # type: ignore[misc]
            if examiner.failures_in_a_row >= FAILURES_IN_A_ROW:
                self._stopped = f"{FAILURES_IN_A_ROW} prompts in a row failed: {examiner.last_failure}"

    async def _reserve(self, prompt_id: str, usd: float) -> None:
        await until_it_answers(lambda: self._ledger.reserve(self._lease, prompt_id, usd))

    async def _checkpoint(self, prompt_id: str, ended: PromptAnswer) -> None:
        pace = (monotonic() - self._started) / self._ended
        await self._ledger.checkpoint(self._lease, prompt_id, ended, pace * (self._left - self._ended))

    def _verdict(self, stored: Mapping[str, PromptAnswer], map_id: str) -> Verdict:
        """Enough labels make a profile even where the money or the model gave out before the end."""
        answers = {prompt.id: stored[prompt.id] for prompt in self._placed.prompts if prompt.id in stored}
        asked, total = len(answers), len(self._placed.prompts)
        labelled = sum(answer.score is not None for answer in answers.values())
        needed = min(ENOUGH_LABELS, total)
        if labelled >= needed:
            measured_at = self._job.measured_at or _rfc3339(datetime.now(UTC))
            return Verdict(profile_of(self._placed, answers, map_id, measured_at))
        failed = sum(answer.failed for answer in answers.values())
        reason = f"{self._stopped}; " if self._stopped else ""
        return Verdict(
            error=f"{reason}{labelled} of {needed} labels that a profile needs, after {asked} of {total} prompts:"
            f" {failed} not answered, {asked - labelled - failed} cut off, lost in thought or not judged"
        )


def profile_of(placed: PlacedPrompts, answers: Mapping[str, PromptAnswer], map_id: str, measured_at: str) -> Profile:
    """The sums run over the prompts in their own order, so that the order of the answers leaves no trace."""
    ended = [answers.get(prompt.id, PromptAnswer()) for prompt in placed.prompts]
    return measure(
        map_id,
        placed.clusters,
        placed.assignment,
        column([answer.score for answer in ended]),
        output_tokens=column([answer.output_tokens for answer in ended]),
        seconds=column([answer.seconds for answer in ended]),
        measured_at=measured_at,
    )


def _rfc3339(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


async def _side_by_side(
    examine: Callable[[Examiner, Iterator[ValidationPrompt]], Awaitable[None]],
    examiner: Examiner,
    queue: Iterator[ValidationPrompt],
    count: int,
) -> None:
    tasks = [asyncio.ensure_future(examine(examiner, queue)) for _ in range(count)]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await cancel_until_done(tasks)
        failures = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    if failures:  # what one of them loses, a lease say, the others lose too
        raise failures[0]
