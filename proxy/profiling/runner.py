from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic, time

import numpy as np

from proxy.concurrency import cancel_until_done
from proxy.profiling.grading import (
    AssignedPrompts,
    GraderRunner,
    GradingProcess,
    JudgeNotConfigured,
    ValidationPrompts,
    column,
)
from proxy.profiling.job_store import AnswerText, Job, JobStore, Lease, LeaseLost, PromptAnswer
from proxy.profiling.model_client import (
    REASONING_TOKENS,
    TRUNCATED,
    Budget,
    ModelAnswer,
    ModelCallError,
    ModelClient,
    RetryingClient,
    RetryPolicy,
    configured_token_limit,
    cost_of,
    max_cost_usd,
)
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.price_map import bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.storage.redis import StoreUnavailable, retry_until_available
from proxy.storage.snapshot import SnapshotWatcher, capabilities_of, price_of
from router_core.errors import InvalidInput
from router_core.profiles import Profile, measure
from router_core.text import rfc3339
from router_core.types import Capabilities, Price
from router_core.validation.validation_set import ValidationPrompt

log = logging.getLogger("uniroute.jobs")

# Stores how many USD a prompt may cost, before it is put to the model.
Reserve = Callable[[str, float], Awaitable[None]]


@dataclass(frozen=True)
class ProfiledModel:
    """The model that a job measures, and what is known of it."""

    client: RetryingClient
    price: Price | None
    """None: not known, and so neither is what the job spends."""
    reasons: bool
    """Whether it is known to reason before it answers."""
    max_output_tokens: int | None
    keep_texts: bool = False
    """Whether the texts of its answers are kept with their grades."""

    def limit(self, tokens: int) -> int:
        """Return the token limit to send. A lower limit that is configured applies to users too, and so is measured."""
        bounds = (tokens, configured_token_limit(self.client.record), self.max_output_tokens)
        return min(bound for bound in bounds if bound is not None)


@dataclass(slots=True)
class PromptCost:
    """What is reserved for one prompt and what it has cost so far, in USD."""

    reserved: float = 0.0
    spent: float = 0.0


class PromptRunner:
    """Put validation prompts to one model and grade the answers; count how many fail in a row."""

    def __init__(self, model: ProfiledModel, judge: GraderRunner, budget: Budget, reserve: Reserve) -> None:
        self._model = model
        self._judge = judge
        self._budget = budget
        self._reserve = reserve
        self.consecutive_failures = 0
        self.last_failure = ""

    async def run(self, prompt: ValidationPrompt) -> PromptAnswer | None:
        """Return the outcome of a prompt; None if the budget does not allow it."""
        limit = self._model.limit(prompt.max_tokens + (REASONING_TOKENS if self._model.reasons else 0))
        cost = PromptCost(self._max_cost_usd(prompt, limit))
        if not await self._budget.reserve(cost.reserved):
            return None
        try:
            await self._reserve(prompt.id, cost.reserved)
            outcome = await self._outcome(prompt, limit, cost)
        finally:
            await self._budget.settle(cost.reserved, cost.spent)
        return replace(outcome, cost_usd=None if self._model.price is None else cost.spent)

    async def _outcome(self, prompt: ValidationPrompt, limit: int, cost: PromptCost) -> PromptAnswer:
        try:
            answer, limit = await self._answer(prompt, limit, cost)
        except ModelCallError as failure:
            # A server that takes no tools answers other prompts.
            if not prompt.tools or failure.retryable:
                self._count_failure(failure)
            return PromptAnswer(failed=True)
        return PromptAnswer(
            score=await self._score(prompt, answer, limit, cost),
            output_tokens=answer.output_tokens,
            seconds=answer.seconds,
            finish_reason=answer.finish_reason,
            text=AnswerText.of(answer.text) if self._model.keep_texts else None,
        )

    async def _answer(self, prompt: ValidationPrompt, limit: int, cost: PromptCost) -> tuple[ModelAnswer, int]:
        """Return the answer and its token limit. If reasoning used up the limit, ask again with a larger one."""
        answer = await self._ask(prompt, limit, cost)
        larger_limit = self._model.limit(prompt.max_tokens + REASONING_TOKENS)
        if not _truncated_reasoning(answer) or larger_limit <= limit:
            return answer, limit
        extra_usd = self._max_cost_usd(prompt, larger_limit)
        if not await self._budget.add(extra_usd):
            return answer, limit
        cost.reserved += extra_usd
        await self._reserve(prompt.id, cost.reserved)
        return await self._ask(prompt, larger_limit, cost), larger_limit

    async def _ask(self, prompt: ValidationPrompt, limit: int, cost: PromptCost) -> ModelAnswer:
        answer = await self._model.client.complete(prompt.request, limit)
        if self._model.price is not None:
            cost.spent += cost_of(answer, self._model.price, self._max_cost_usd(prompt, limit))
        return answer

    async def _score(self, prompt: ValidationPrompt, answer: ModelAnswer, limit: int, cost: PromptCost) -> float | None:
        """Return the score; None (unlabelled) if our limit cut off the answer or its reasoning, or grading failed."""
        truncated = answer.finish_reason == TRUNCATED
        # Users would get the same truncated answer, so it is graded.
        by_configuration = truncated and limit == configured_token_limit(self._model.client.record)
        if (truncated or _truncated_reasoning(answer)) and not by_configuration:
            self.consecutive_failures = 0
            return None
        try:
            score, grading_usd = await self._judge.score(prompt, answer)
        except ModelCallError as failure:
            self._count_failure(failure)
            return None
        self.consecutive_failures = 0
        cost.spent += grading_usd
        return score

    def _count_failure(self, failure: ModelCallError) -> None:
        self.consecutive_failures += 1
        self.last_failure = str(failure)

    def _max_cost_usd(self, prompt: ValidationPrompt, limit: int) -> float:
        if self._model.price is None:
            return 0.0
        answering = max_cost_usd(prompt.request, self._model.client.record, self._model.price, limit)
        return answering + self._judge.max_cost_usd(prompt, limit)


REASONING_TAGS = ("<think>", "<thinking>", "<reasoning>")


def _truncated_reasoning(answer: ModelAnswer) -> bool:
    """Return whether the model reasoned, and then was cut off or gave no answer."""
    reasoned = answer.reasoned or any(tag in answer.text for tag in REASONING_TAGS)
    return reasoned and (answer.finish_reason == TRUNCATED or not answer.text.strip())


# Labels that a profile needs, unless the job has fewer prompts.
ENOUGH_LABELS = 20

# A job stops after so many prompts in a row have failed, each with all its retries.
MAX_CONSECUTIVE_FAILURES = 5


@dataclass(frozen=True)
class ProfilingResult:
    """The end of a job: a profile, or the reason why there is none."""

    profile: Profile | None = None
    error: str | None = None


class ProfilingRun:
    """Run one job once. A later run of the same job continues: it leaves out prompts that have an answer."""

    def __init__(self, job: Job, lease: Lease, job_store: JobStore, assigned: AssignedPrompts) -> None:
        self._job = job
        self._lease = lease
        self._job_store = job_store
        self._assigned = assigned
        self._budget = Budget(job.max_usd, job.spent_usd or 0.0)
        # Why no further prompt is put to the model.
        self._stopped: str | None = None
        self._open_prompts = 0
        self._ended_prompts = 0
        self._started = monotonic()

    async def run(self, model: ProfiledModel, judge: GraderRunner, *, concurrency: int, map_id: str) -> ProfilingResult:
        """Put the prompts without an answer to the model, and make a profile of all answers.

        Raises:
            LeaseLost: the job neither succeeded nor failed.
        """
        answered = await self._job_store.answers(self._job.id)
        prompts = [prompt for prompt in self._assigned.prompts if prompt.id not in answered]
        self._open_prompts = len(prompts)
        runner = PromptRunner(model, judge, self._budget, self._reserve)
        await _run_concurrently(self._run_prompts, runner, iter(prompts), min(concurrency, len(prompts)))
        return self._result(await self._job_store.answers(self._job.id), map_id)

    async def _run_prompts(self, runner: PromptRunner, queue: Iterator[ValidationPrompt]) -> None:
        """Take prompts from the shared queue until it is empty, the budget is used up, or too many in a row fail."""
        for prompt in queue:
            if self._stopped is not None:
                return
            outcome = await runner.run(prompt)
            if outcome is None:
                self._stopped = f"max_usd={self._job.max_usd:g} does not allow another prompt"
                return
            self._ended_prompts += 1
            await retry_until_available(partial(self._checkpoint, prompt.id, outcome))
            if runner.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                self._stopped = f"{MAX_CONSECUTIVE_FAILURES} prompts in a row failed: {runner.last_failure}"

    async def _reserve(self, prompt_id: str, usd: float) -> None:
        await retry_until_available(lambda: self._job_store.reserve(self._lease, prompt_id, usd))

    async def _checkpoint(self, prompt_id: str, outcome: PromptAnswer) -> None:
        """Store the outcome of a prompt, and the time that the other prompts will take at the pace so far."""
        seconds_per_prompt = (monotonic() - self._started) / self._ended_prompts
        eta_s = seconds_per_prompt * (self._open_prompts - self._ended_prompts)
        await self._job_store.checkpoint(self._lease, prompt_id, outcome, eta_s)

    def _result(self, stored: Mapping[str, PromptAnswer], map_id: str) -> ProfilingResult:
        """Make a profile if there are enough labels, even if the budget or the model failed before the end."""
        answers = {prompt.id: stored[prompt.id] for prompt in self._assigned.prompts if prompt.id in stored}
        asked, total = len(answers), len(self._assigned.prompts)
        labelled = sum(answer.score is not None for answer in answers.values())
        needed = min(ENOUGH_LABELS, total)
        if labelled >= needed:
            measured_at = self._job.measured_at or rfc3339(time())
            return ProfilingResult(profile_of(self._assigned, answers, map_id, measured_at))
        failed = sum(answer.failed for answer in answers.values())
        reason = f"{self._stopped}; " if self._stopped else ""
        return ProfilingResult(
            error=f"{reason}{labelled} of {needed} labels that a profile needs, after {asked} of {total} prompts:"
            f" {failed} not answered, {asked - labelled - failed} cut off, lost in thought or not judged"
        )


def profile_of(
    assigned: AssignedPrompts, answers: Mapping[str, PromptAnswer], map_id: str, measured_at: str
) -> Profile:
    """Return the profile. It sums over the prompts in their own order, so the order of the answers does not matter."""
    outcomes = [answers.get(prompt.id, PromptAnswer()) for prompt in assigned.prompts]
    return measure(
        map_id,
        assigned.clusters,
        assigned.assignment,
        column([answer.score for answer in outcomes]),
        output_tokens=column([answer.output_tokens for answer in outcomes]),
        seconds=column([answer.seconds for answer in outcomes]),
        offers_tools=np.array([bool(prompt.tools) for prompt in assigned.prompts]),
        measured_at=measured_at,
    )


async def _run_concurrently(
    run_prompts: Callable[[PromptRunner, Iterator[ValidationPrompt]], Awaitable[None]],
    runner: PromptRunner,
    queue: Iterator[ValidationPrompt],
    count: int,
) -> None:
    """Run `count` tasks that share one queue of prompts. If one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(run_prompts(runner, queue)) for _ in range(count)]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await cancel_until_done(tasks)
        failures = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    if failures:  # one is enough: what one task loses, such as the lease, the others lose too
        raise failures[0]


MODEL_CHANGED = "litellm_params were changed while the model was being measured; profile it again"


class JobRejected(Exception):
    """The job cannot begin; the message says what to change."""


class JobRunner:
    """Run the jobs that this process takes."""

    def __init__(
        self,
        settings: Settings,
        state: SnapshotWatcher,
        model_client: ModelClient,
        job_store: JobStore,
        prompts: ValidationPrompts,
        retry_policy: RetryPolicy,
        grading: GradingProcess,
    ) -> None:
        self._settings = settings
        self._state = state
        self._model_client = model_client
        self._job_store = job_store
        self._prompts = prompts
        self._retry_policy = retry_policy
        self._grading = grading

    async def measure(self, lease: Lease) -> None:
        """Run the job of this lease, and store its profile or why it failed.

        Raises:
            LeaseLost, StoreUnavailable: the job is unfinished, and can be continued.
        """
        job = await self._job_store.get(lease.job_id)
        if job is None:
            raise LeaseLost("the job is gone from the store")
        await self._state.refresh()
        record = self._state.current.models.get(job.model)
        if record is None:
            error = "no such model here: it was removed, or this worker was started with another configuration"
            await self._job_store.fail(lease, error)
            return
        result = await self._run_job(job, lease, record)
        if result.profile is not None and not await self._is_unchanged(record):
            result = ProfilingResult(error=MODEL_CHANGED)
        if result.profile is None:
            await self._job_store.fail(lease, result.error or "")
        else:
            await self._job_store.finish(lease, record, result.profile, self._settings.recipe)
        if result.error:
            log.warning("job %s: measuring model %s failed: %s", job.id, job.model, result.error)
            return
        log.info("job %s for model %s: ready", job.id, job.model)
        with contextlib.suppress(StoreUnavailable):  # the job is done all the same
            await self._state.refresh()
            if doubt := self._state.current.measuring_doubt:
                log.warning("%s", doubt)

    async def _is_unchanged(self, record: ModelRecord) -> bool:
        """Return whether the model that was measured is still the one that is served."""
        await self._state.refresh()
        now = self._state.current.models.get(record.name)
        # A model that was removed meanwhile is reported by `JobStore.finish`.
        return now is None or now.fingerprint == record.fingerprint

    async def _run_job(self, job: Job, lease: Lease, record: ModelRecord) -> ProfilingResult:
        cluster_map = self._state.current.cluster_map
        answered = await self._job_store.answers(job.id)
        try:
            tools = self._capabilities(record).tools is not False
            assigned = (await self._prompts.load(cluster_map)).select(job.total, answered, tools=tools)
            if not assigned.prompts:
                raise JobRejected(
                    f"{record.name!r} is known to call no tools, and every validation prompt offers some: add others"
                )
            open_prompts = tuple(prompt for prompt in assigned.prompts if prompt.id not in answered)
            model = self._profiled_model(job, record, will_ask=bool(open_prompts))
            judge = GraderRunner(self._grader_client, self._settings.judge_model, self._grading)
            judge.check(open_prompts, capped=job.max_usd is not None)
        except (JobRejected, JudgeNotConfigured, InvalidInput) as reason:
            return ProfilingResult(error=str(reason))
        await self._job_store.begin(lease, len(assigned.prompts), priced=model.price is not None)
        begun = await self._job_store.get(job.id) or job
        profiling = ProfilingRun(begun, lease, self._job_store, assigned)
        return await profiling.run(model, judge, concurrency=self._settings.profile.concurrency, map_id=cluster_map.id)

    def _profiled_model(self, job: Job, record: ModelRecord, *, will_ask: bool) -> ProfiledModel:
        """Return the model of a job.

        Args:
            will_ask: whether any prompt is to be put to it. Then a budget needs a price.

        Raises:
            JobRejected: the model has changed since the job was submitted, or its price is not known.
        """
        if job.fingerprint and job.fingerprint != record.fingerprint:
            raise JobRejected(MODEL_CHANGED)
        price = self._state.current.prices.get(record.name)
        if will_ask and price is None and job.max_usd is not None:
            raise JobRejected(
                f"no price is known for {record.name!r}, so max_usd cannot be kept: put a price, or state it or"
                " free: true in model_info, and profile the model again"
            )
        capabilities = self._capabilities(record)
        return ProfiledModel(
            client=RetryingClient(self._model_client, record, self._retry_policy),
            price=None if price is None else price.price,
            reasons=capabilities.reasoning is True,
            max_output_tokens=capabilities.max_output_tokens,
            keep_texts=self._settings.profile.keep_answers,
        )

    def _capabilities(self, record: ModelRecord) -> Capabilities:
        return capabilities_of(record.info, bundled_price_map().find(str(record.litellm_params["model"])))

    def _grader_client(self, name: str) -> tuple[RetryingClient, Price | None]:
        """Return client and price of a judge: a registered model, or one that litellm knows by name.

        The key of the latter is in the environment.
        """
        state = self._state.current
        record = state.models.get(name) or ModelRecord(name, {"model": name}, ModelInfo(), "config", 0.0)
        listed = bundled_price_map().find(str(record.litellm_params["model"]))
        price = state.prices.get(name) or price_of(record.info, None, listed)
        return RetryingClient(self._model_client, record, self._retry_policy), price.price if price else None
