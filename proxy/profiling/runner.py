from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import monotonic, time

from proxy.concurrency import cancel_until_done
from proxy.profiling.grading import (
    CUT_OFF,
    THINKING_TOKENS,
    Budget,
    GraderRunner,
    GradingProcess,
    JudgeNotConfigured,
    ModelAnswer,
    ModelCallError,
    ModelClient,
    RetryingClient,
    RetryPolicy,
    configured_token_limit,
    cost_of,
    max_cost_usd,
)
from proxy.profiling.job import Job, Lease, LeaseLost, PromptAnswer
from proxy.profiling.job_store import JobStore
from proxy.profiling.prompts import AssignedPrompts, ValidationPrompts, column
from proxy.settings.models import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord
from proxy.storage.price_map import bundled_catalog
from proxy.storage.redis import StoreUnavailable, retry_until_available
from proxy.storage.snapshot import SnapshotWatcher, capabilities_of, price_of
from router_core.errors import InvalidInput
from router_core.profiles import Profile, measure
from router_core.text import rfc3339
from router_core.types import Price
from router_core.validation.validation_set import ValidationPrompt

THINKING_MARKS = ("<think>", "<thinking>", "<reasoning>")

Reserve = Callable[[str, float], Awaitable[None]]
"""Writes down that so many USD may be spent on this prompt, before they are."""


@dataclass(frozen=True)
class ProfiledModel:
    """A model as a job asks it."""

    asker: RetryingClient
    price: Price | None
    """None: unknown, and so is what is spent."""
    thinks: bool
    """Known to think before it answers."""
    max_output_tokens: int | None

    def limit(self, tokens: int) -> int:
        """The limit to send: the arm's own one, if it is lower, is part of what users get."""
        bounds = (tokens, configured_token_limit(self.asker.record), self.max_output_tokens)
        return min(bound for bound in bounds if bound is not None)


@dataclass(slots=True)
class PromptCost:
    """What was set aside for one prompt and what it has cost so far, in USD."""

    set_aside: float = 0.0
    spent: float = 0.0


class PromptRunner:
    """Puts prompts to one arm. Knows how many failed in a row."""

    def __init__(self, arm: ProfiledModel, judge: GraderRunner, budget: Budget, reserve: Reserve) -> None:
        self._arm = arm
        self._judge = judge
        self._budget = budget
        self._reserve = reserve
        self.failures_in_a_row = 0
        self.last_failure = ""

    async def examine(self, prompt: ValidationPrompt) -> PromptAnswer | None:
        """What became of the prompt; None where the budget does not allow to ask it."""
        limit = self._arm.limit(prompt.max_tokens + (THINKING_TOKENS if self._arm.thinks else 0))
        bill = PromptCost(self._most(prompt, limit))
        if not await self._budget.set_aside(bill.set_aside):
            return None
        try:
            await self._reserve(prompt.id, bill.set_aside)
            ended = await self._ended(prompt, limit, bill)
        finally:
            await self._budget.settle(bill.set_aside, bill.spent)
        return replace(ended, cost_usd=None if self._arm.price is None else bill.spent)

    async def _ended(self, prompt: ValidationPrompt, limit: int, bill: PromptCost) -> PromptAnswer:
        try:
            answer, limit = await self._answer(prompt, limit, bill)
        except ModelCallError as failure:
            self._failed(failure)
            return PromptAnswer(failed=True)
        return PromptAnswer(
            score=await self._score(prompt, answer, limit, bill),
            output_tokens=answer.output_tokens,
            seconds=answer.seconds,
            finish_reason=answer.finish_reason,
        )

    async def _answer(self, prompt: ValidationPrompt, limit: int, bill: PromptCost) -> tuple[ModelAnswer, int]:
        """The answer and the limit it was given; asked again with room to think if thinking used all of the first."""
        answer = await self._ask(prompt, limit, bill)
        roomy = self._arm.limit(prompt.max_tokens + THINKING_TOKENS)
        if not _truncated_reasoning(answer) or roomy <= limit:
            return answer, limit
        more = self._most(prompt, roomy)
        if not await self._budget.add(more):
            return answer, limit
        bill.set_aside += more
        await self._reserve(prompt.id, bill.set_aside)
        return await self._ask(prompt, roomy, bill), roomy

    async def _ask(self, prompt: ValidationPrompt, limit: int, bill: PromptCost) -> ModelAnswer:
        answer = await self._arm.asker.ask(prompt.messages, limit)
        if self._arm.price is not None:
            bill.spent += cost_of(answer, self._arm.price, self._most(prompt, limit))
        return answer

    async def _score(self, prompt: ValidationPrompt, answer: ModelAnswer, limit: int, bill: PromptCost) -> float | None:
        """None, unlabelled: our own limit cut the answer off, or thinking left nothing of it."""
        cut_off = answer.finish_reason == CUT_OFF
        by_the_arm = cut_off and limit == configured_token_limit(self._arm.asker.record)
        if (cut_off or _truncated_reasoning(answer)) and not by_the_arm:
            self.failures_in_a_row = 0
            return None
        try:
            score, cost = await self._judge.score(prompt, answer)
        except ModelCallError as failure:
            self._failed(failure)
            return None
        self.failures_in_a_row = 0
        bill.spent += cost
        return score

    def _failed(self, failure: ModelCallError) -> None:
        self.failures_in_a_row += 1
        self.last_failure = str(failure)

    def _most(self, prompt: ValidationPrompt, limit: int) -> float:
        if self._arm.price is None:
            return 0.0
        asking = max_cost_usd(prompt.messages, self._arm.asker.record, self._arm.price, limit)
        return asking + self._judge.max_cost_usd(prompt, limit)


def _truncated_reasoning(answer: ModelAnswer) -> bool:
    """It thought, and either was cut off or had nothing left to say."""
    thought = answer.reasoned or any(mark in answer.text for mark in THINKING_MARKS)
    return thought and (answer.finish_reason == CUT_OFF or not answer.text.strip())


ENOUGH_LABELS = 20

FAILURES_IN_A_ROW = 5
"""So many prompts that fail one after the other, their retries included, end the asking."""


@dataclass(frozen=True)
class ProfilingResult:
    """What a job ends with: a profile, or the reason why there is none."""

    profile: Profile | None = None
    error: str | None = None


class ProfilingRun:
    """One run of one job. The next run goes on where this one stopped: nothing that was answered is asked again."""

    def __init__(self, job: Job, lease: Lease, ledger: JobStore, placed: AssignedPrompts) -> None:
        self._job = job
        self._lease = lease
        self._ledger = ledger
        self._placed = placed
        self._budget = Budget(job.max_usd, job.spent_usd or 0.0)
        self._stopped: str | None = None
        self._left = 0
        self._ended = 0
        self._started = monotonic()

    async def run(self, arm: ProfiledModel, judge: GraderRunner, *, concurrency: int, map_id: str) -> ProfilingResult:
        """Raises LeaseLost; then nothing was decided."""
        finished = await self._ledger.answers(self._job.id)
        waiting = [prompt for prompt in self._placed.prompts if prompt.id not in finished]
        self._left = len(waiting)
        examiner = PromptRunner(arm, judge, self._budget, self._reserve)
        await _run_concurrently(self._examine_from, examiner, iter(waiting), min(concurrency, len(waiting)))
        return self._verdict(await self._ledger.answers(self._job.id), map_id)

    async def _examine_from(self, examiner: PromptRunner, queue: Iterator[ValidationPrompt]) -> None:
        for prompt in queue:
            if self._stopped is not None:
                return
            ended = await examiner.examine(prompt)
            if ended is None:
                self._stopped = f"max_usd={self._job.max_usd:g} does not allow another prompt"
                return
            self._ended += 1
            await retry_until_available(lambda prompt=prompt, ended=ended: self._checkpoint(prompt.id, ended))  # type: ignore[misc]
            if examiner.failures_in_a_row >= FAILURES_IN_A_ROW:
                self._stopped = f"{FAILURES_IN_A_ROW} prompts in a row failed: {examiner.last_failure}"

    async def _reserve(self, prompt_id: str, usd: float) -> None:
        await retry_until_available(lambda: self._ledger.reserve(self._lease, prompt_id, usd))

    async def _checkpoint(self, prompt_id: str, ended: PromptAnswer) -> None:
        pace = (monotonic() - self._started) / self._ended
        await self._ledger.checkpoint(self._lease, prompt_id, ended, pace * (self._left - self._ended))

    def _verdict(self, stored: Mapping[str, PromptAnswer], map_id: str) -> ProfilingResult:
        """Enough labels make a profile even where the money or the model gave out before the end."""
        answers = {prompt.id: stored[prompt.id] for prompt in self._placed.prompts if prompt.id in stored}
        asked, total = len(answers), len(self._placed.prompts)
        labelled = sum(answer.score is not None for answer in answers.values())
        needed = min(ENOUGH_LABELS, total)
        if labelled >= needed:
            measured_at = self._job.measured_at or rfc3339(time())
            return ProfilingResult(profile_of(self._placed, answers, map_id, measured_at))
        failed = sum(answer.failed for answer in answers.values())
        reason = f"{self._stopped}; " if self._stopped else ""
        return ProfilingResult(
            error=f"{reason}{labelled} of {needed} labels that a profile needs, after {asked} of {total} prompts:"
            f" {failed} not answered, {asked - labelled - failed} cut off, lost in thought or not judged"
        )


def profile_of(placed: AssignedPrompts, answers: Mapping[str, PromptAnswer], map_id: str, measured_at: str) -> Profile:
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


async def _run_concurrently(
    examine: Callable[[PromptRunner, Iterator[ValidationPrompt]], Awaitable[None]],
    examiner: PromptRunner,
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


log = logging.getLogger("uniroute.jobs")

MODEL_CHANGED = "litellm_params were changed while the model was being measured; profile it again"


class JobRejected(Exception):
    """The job fails before a prompt is asked; the message says what to change."""


class JobRunner:
    """Carries out jobs for this process."""

    def __init__(
        self,
        settings: Settings,
        state: SnapshotWatcher,
        answerer: ModelClient,
        ledger: JobStore,
        prompts: ValidationPrompts,
        patience: RetryPolicy,
        grading: GradingProcess,
    ) -> None:
        self._settings = settings
        self._state = state
        self._answerer = answerer
        self._ledger = ledger
        self._prompts = prompts
        self._patience = patience
        self._grading = grading

    async def measure(self, lease: Lease) -> None:
        """Carry out the job of this lease to its end.

        Raises:
            LeaseLost, StoreUnavailable: the job is as it was and can be taken up again.
        """
        job = await self._ledger.get(lease.job_id)
        if job is None:
            raise LeaseLost("the job is gone from the store")
        await self._state.refresh()
        record = self._state.current.models.get(job.model)
        if record is None:
            error = "no such model here: it was removed, or this worker was started with another configuration"
            await self._ledger.fail(lease, error)
            return
        verdict = await self._carry_out(job, lease, record)
        if verdict.profile is not None and not await self._is_still(record):
            verdict = ProfilingResult(error=MODEL_CHANGED)
        if verdict.profile is None:
            await self._ledger.fail(lease, verdict.error or "")
        else:
            await self._ledger.finish(lease, record, verdict.profile)
        if verdict.error:
            log.warning("job %s: measuring model %s failed: %s", job.id, job.model, verdict.error)
            return
        log.info("job %s for model %s: ready", job.id, job.model)
        with contextlib.suppress(StoreUnavailable):  # the job is done, whatever can be said of it
            await self._state.refresh()
            if doubt := self._state.current.measuring_doubt:
                log.warning("%s", doubt)

    async def _is_still(self, record: ModelRecord) -> bool:
        """Whether what was measured is what is served: only then is its profile of any use."""
        await self._state.refresh()
        now = self._state.current.models.get(record.name)
        return now is None or now.fingerprint == record.fingerprint  # None: removed, as `finish` finds and says

    async def _carry_out(self, job: Job, lease: Lease, record: ModelRecord) -> ProfilingResult:
        cluster_map = self._state.current.cluster_map
        answered = await self._ledger.answers(job.id)
        try:
            placed = (await self._prompts.placed(cluster_map)).chosen(job.total, answered)
            waiting = tuple(prompt for prompt in placed.prompts if prompt.id not in answered)
            arm = self._arm(job, record, asked=bool(waiting))
            judge = GraderRunner(self._judge_named, self._settings.judge_model, self._grading)
            judge.check(waiting, capped=job.max_usd is not None)
        except (JobRejected, JudgeNotConfigured, InvalidInput) as reason:
            return ProfilingResult(error=str(reason))
        await self._ledger.begin(lease, len(placed.prompts), priced=arm.price is not None)
        begun = await self._ledger.get(job.id) or job
        profiling = ProfilingRun(begun, lease, self._ledger, placed)
        return await profiling.run(arm, judge, concurrency=self._settings.profile.concurrency, map_id=cluster_map.id)

    def _arm(self, job: Job, record: ModelRecord, *, asked: bool) -> ProfiledModel:
        """Money that cannot be counted cannot be capped, so a model without a price is asked only without a cap."""
        if job.fingerprint and job.fingerprint != record.fingerprint:
            raise JobRejected(MODEL_CHANGED)
        price = self._state.current.prices.get(record.name)
        if asked and price is None and job.max_usd is not None:
            raise JobRejected(
                f"no price is known for {record.name!r}, so max_usd cannot be kept: put a price, or state it or"
                " free: true in model_info, and profile the model again"
            )
        known = bundled_catalog().find(str(record.litellm_params["model"]))
        capabilities = capabilities_of(record.info, known)
        return ProfiledModel(
            asker=RetryingClient(self._answerer, record, self._patience),
            price=None if price is None else price.price,
            thinks=capabilities.reasoning is True,
            max_output_tokens=capabilities.max_output_tokens,
        )

    def _judge_named(self, name: str) -> tuple[RetryingClient, Price | None]:
        """A registered model, or a name of litellm's with its usual key in the environment."""
        state = self._state.current
        record = state.models.get(name) or ModelRecord(name, {"model": name}, ModelInfo(), "config", 0.0)
        known = bundled_catalog().find(str(record.litellm_params["model"]))
        price = state.prices.get(name) or price_of(record.info, None, known)
        return RetryingClient(self._answerer, record, self._patience), price.price if price else None
