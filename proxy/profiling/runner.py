from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    cost_of,
    max_cost_usd,
)
from proxy.routing.token_limits import stated_limit
from proxy.settings.effort import usual_tokens
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.price_map import bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.storage.redis import StoreUnavailable, retry_until_available
from proxy.storage.snapshot import SnapshotWatcher, capabilities_of, unstored_price
from proxy.storage.variants import joint_fingerprint
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

    @property
    def reasoning_tokens(self) -> int:
        """Return what is added to the limit of an answer for what is thought before it."""
        effort = self.client.record.effort
        return REASONING_TOKENS if effort is None else max(REASONING_TOKENS, usual_tokens(effort))

    def limit(self, tokens: int) -> int:
        """Return the token limit to send. A lower limit that is configured applies to users too, and so is measured."""
        bounds = (tokens, stated_limit(self.client.record.litellm_params), self.max_output_tokens)
        return min(bound for bound in bounds if bound is not None)


@dataclass(slots=True)
class PromptCost:
    """What is reserved for one prompt and what it has cost so far, in USD."""

    reserved: float = 0.0
    spent: float = 0.0


class PromptRunner:
    """Put validation prompts to one model and grade the answers; count how many fail in a row."""

    def __init__(
        self, model: ProfiledModel, judge: GraderRunner, budget: Budget, reserve: Reserve, id_end: str = ""
    ) -> None:
        """`id_end`: what the ids of the model's answers end with after the prompt's."""
        self._model = model
        self._id_end = id_end
        self._judge = judge
        self._budget = budget
        self._reserve = reserve
        self.consecutive_failures = 0
        self.last_failure = ""

    async def run(self, prompt: ValidationPrompt) -> PromptAnswer | None:
        """Return the outcome of a prompt; None if the budget does not allow it."""
        limit = self._model.limit(prompt.max_tokens + (self._model.reasoning_tokens if self._model.reasons else 0))
        cost = PromptCost(self._max_cost_usd(prompt, limit))
        if not await self._budget.reserve(cost.reserved):
            return None
        try:
            await self._reserve(prompt.id + self._id_end, cost.reserved)
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
        larger_limit = self._model.limit(prompt.max_tokens + self._model.reasoning_tokens)
        if not _truncated_reasoning(answer) or larger_limit <= limit:
            return answer, limit
        extra_usd = self._max_cost_usd(prompt, larger_limit)
        if not await self._budget.add(extra_usd):
            return answer, limit
        cost.reserved += extra_usd
        await self._reserve(prompt.id + self._id_end, cost.reserved)
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
        by_configuration = truncated and limit == stated_limit(self._model.client.record.litellm_params)
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


@dataclass(frozen=True)
class Question:
    """A prompt that a job puts to one of the models that it measures."""

    id: str
    """Under which its answer is stored."""
    model: str
    prompt: ValidationPrompt


# Efforts of a model share what they learn, so each is asked two of four prompts in a row, and its neighbour the same
# but one further on: they differ in half of their prompts, and are compared by the other half.
ROW, SHARE = 4, 2


def turns_of(families: Iterable[str]) -> list[int]:
    """Return the turn of each prompt: prompts of one family take turns, and each family begins at the next turn.

    By their places alone an effort could be asked no prompt of some families, where these alternate.
    """
    next_turns: dict[str, int] = {}
    turns = []
    for family in families:
        turn = next_turns.setdefault(family, len(next_turns))
        turns.append(turn)
        next_turns[family] = turn + 1
    return turns


def is_asked(effort: int, turn: int, efforts: int) -> bool:
    """Tell whether an effort, by its number, is asked the prompt of a turn. A model that is alone is asked all."""
    return efforts == 1 or (turn - effort) % ROW < SHARE


def deal(
    prompts: Sequence[ValidationPrompt], measured: Mapping[str, str], answered: Collection[str] = ()
) -> list[Question]:
    """Deal prompts out among the models that a job measures; what is answered already takes the place of the last.

    Args:
        measured: each model, ascending by effort, with what the ids of its answers end with.
    """
    fixed, others, count = [], [], 0
    for turn, prompt in zip(turns_of(prompt.family for prompt in prompts), prompts, strict=True):
        for number, (model, end) in enumerate(measured.items()):
            question, asked = Question(prompt.id + end, model, prompt), is_asked(number, turn, len(measured))
            count += asked
            if question.id in answered:
                fixed.append(question)
            elif asked:
                others.append(question)
    return [*fixed, *others[: max(0, count - len(fixed))]]


# Labels that a profile needs, unless the job has fewer prompts.
ENOUGH_LABELS = 20

# A job stops after so many prompts in a row have failed, each with all its retries.
MAX_CONSECUTIVE_FAILURES = 5


@dataclass(frozen=True)
class ProfilingResult:
    """The end of a job: the profile of each model that it measured, and why others have none."""

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    error: str | None = None
    spent_usd: Mapping[str, float] = field(default_factory=dict)
    """Of the answers of each of several models."""


class ProfilingRun:
    """Run one job once. A later run of the same job continues: it leaves out questions that have an answer."""

    def __init__(
        self, job: Job, lease: Lease, job_store: JobStore, assigned: AssignedPrompts, questions: Sequence[Question]
    ) -> None:
        self._job = job
        self._lease = lease
        self._job_store = job_store
        self._assigned = assigned
        self._questions = questions
        self._budget = Budget(job.max_usd, job.spent_usd or 0.0)
        # Why no further prompt is put to any model.
        self._stopped: str | None = None
        # Models that no further prompt is put to, and why.
        self._failing: dict[str, str] = {}
        self._open_questions = 0
        self._ended_questions = 0
        self._started = monotonic()

    async def run(
        self, models: Mapping[str, ProfiledModel], judge: GraderRunner, *, concurrency: int, map_id: str
    ) -> ProfilingResult:
        """Put the questions without an answer to the models, and make a profile of all answers of each.

        Raises:
            LeaseLost: the job neither succeeded nor failed.
        """
        answered = await self._job_store.answers(self._job.id)
        open_questions = [question for question in self._questions if question.id not in answered]
        self._open_questions = len(open_questions)
        runners = {
            name: PromptRunner(model, judge, self._budget, self._reserve, self._job.measured[name])
            for name, model in models.items()
        }
        tasks = min(concurrency, len(open_questions))
        await _run_concurrently(self._run_questions, runners, iter(open_questions), tasks)
        return self._result(await self._job_store.answers(self._job.id), map_id)

    async def _run_questions(self, runners: Mapping[str, PromptRunner], queue: Iterator[Question]) -> None:
        """Take questions from the shared queue until it is empty, the budget is used up, or too many in a row fail."""
        for question in queue:
            if self._stopped is not None or len(self._failing) == len(runners):
                return
            if question.model in self._failing:
                continue
            runner = runners[question.model]
            outcome = await runner.run(question.prompt)
            if outcome is None:
                self._stopped = f"max_usd={self._job.max_usd:g} does not allow another prompt"
                return
            self._ended_questions += 1
            await retry_until_available(partial(self._checkpoint, question.id, outcome))
            if runner.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                why = f"{MAX_CONSECUTIVE_FAILURES} prompts in a row failed: {runner.last_failure}"
                self._failing[question.model] = why

    async def _reserve(self, question_id: str, usd: float) -> None:
        await retry_until_available(lambda: self._job_store.reserve(self._lease, question_id, usd))

    async def _checkpoint(self, question_id: str, outcome: PromptAnswer) -> None:
        """Store the outcome of a question, and the time that the others will take at the pace so far."""
        seconds_per_prompt = (monotonic() - self._started) / self._ended_questions
        eta_s = seconds_per_prompt * (self._open_questions - self._ended_questions)
        await self._job_store.checkpoint(self._lease, question_id, outcome, eta_s)

    def _result(self, stored: Mapping[str, PromptAnswer], map_id: str) -> ProfilingResult:
        """Make a profile of each model with enough labels, even if the budget or a model failed before the end."""
        measured_at = self._job.measured_at or rfc3339(time())
        profiles: dict[str, Profile] = {}
        errors: list[str] = []
        spent = {}
        for name, end in self._job.measured.items():
            asked = {question.id for question in self._questions if question.model == name}
            answers = {place.removesuffix(end): stored[place] for place in asked if place in stored}
            spent[name] = math.fsum(answer.cost_usd or 0.0 for answer in answers.values())
            error = self._shortfall(name, answers, len(asked))
            if error is None:
                profiles[name] = profile_of(self._assigned, answers, map_id, measured_at)
            else:
                errors.append(error if len(self._job.measured) == 1 else f"{name}: {error}")
        return ProfilingResult(
            profiles, "; ".join(errors) or None, spent if len(spent) > 1 and self._job.spent_usd is not None else {}
        )

    def _shortfall(self, name: str, answers: Mapping[str, PromptAnswer], total: int) -> str | None:
        """Say why a model's answers make no profile; None: they do."""
        labelled = sum(answer.score is not None for answer in answers.values())
        needed = min(ENOUGH_LABELS, total)
        if total and labelled >= needed:
            return None
        stopped = self._failing.get(name, self._stopped)
        failed = sum(answer.failed for answer in answers.values())
        return (
            f"{f'{stopped}; ' if stopped else ''}{labelled} of {needed} labels that a profile needs, after"
            f" {len(answers)} of {total} prompts: {failed} not answered, {len(answers) - labelled - failed} cut off,"
            " lost in thought or not judged"
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
    run_questions: Callable[[Mapping[str, PromptRunner], Iterator[Question]], Awaitable[None]],
    runners: Mapping[str, PromptRunner],
    queue: Iterator[Question],
    count: int,
) -> None:
    """Run `count` tasks that share one queue of questions. If one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(run_questions(runners, queue)) for _ in range(count)]
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
        records = self._state.current.measured_records(record.name)
        result = await self._run_job(job, lease, records)
        if result.profiles and not await self._is_unchanged(records):
            result = ProfilingResult(error=MODEL_CHANGED)
        measured = [
            (each, result.profiles[each.name], result.spent_usd.get(each.name))
            for each in records
            if each.name in result.profiles
        ]
        if measured:
            await self._job_store.finish(lease, measured, self._settings.recipe, result.error or "")
        else:
            await self._job_store.fail(lease, result.error or "")
        if result.error:
            log.warning("job %s: measuring model %s failed: %s", job.id, job.model, result.error)
        if not measured:
            return
        log.info("job %s for model %s: ready", job.id, job.model)
        with contextlib.suppress(StoreUnavailable):  # the job is done all the same
            await self._state.refresh()
            if doubt := self._state.current.measuring_doubt:
                log.warning("%s", doubt)

    async def _is_unchanged(self, records: Sequence[ModelRecord]) -> bool:
        """Return whether the models that were measured are still those that are served."""
        await self._state.refresh()
        now = self._state.current.models
        # A model that was removed meanwhile is reported by `JobStore.finish`.
        return all(each.name not in now or now[each.name].fingerprint == each.fingerprint for each in records)

    async def _run_job(self, job: Job, lease: Lease, records: Sequence[ModelRecord]) -> ProfilingResult:
        cluster_map, name = self._state.current.cluster_map, records[0].registered_name
        answered = await self._job_store.answers(job.id)
        try:
            if job.fingerprint and job.fingerprint != joint_fingerprint(records):
                raise JobRejected(MODEL_CHANGED)
            job = replace(job, efforts=tuple(str(each.effort) for each in records if each.effort is not None))
            tools = self._capabilities(records[0]).tools is not False
            prompt_ids = {each for end in job.measured.values() for each in job.answers_of(end, answered)}
            assigned = (await self._prompts.load(cluster_map)).select(job.prompts, prompt_ids, tools=tools)
            if not assigned.prompts:
                raise JobRejected(
                    f"{name!r} is known to call no tools, and every validation prompt offers some: add others"
                )
            questions = deal(assigned.prompts, job.measured, answered)
            if job.carried_over and job.max_usd == 0:  # made of what is there
                questions = [question for question in questions if question.id in answered]
            open_prompts = tuple(question.prompt for question in questions if question.id not in answered)
            models = {each.name: self._profiled_model(job, each, will_ask=bool(open_prompts)) for each in records}
            judge = GraderRunner(self._grader_client, self._settings.judge_model, self._grading)
            judge.check(open_prompts, capped=job.max_usd is not None)
        except (JobRejected, JudgeNotConfigured, InvalidInput) as reason:
            return ProfilingResult(error=str(reason))
        priced = all(model.price is not None for model in models.values())
        await self._job_store.begin(lease, len(questions), priced=priced)
        begun = await self._job_store.get(job.id) or job
        profiling = ProfilingRun(replace(begun, efforts=job.efforts), lease, self._job_store, assigned, questions)
        concurrency = self._settings.profile.concurrency
        return await profiling.run(models, judge, concurrency=concurrency, map_id=cluster_map.id)

    def _profiled_model(self, job: Job, record: ModelRecord, *, will_ask: bool) -> ProfiledModel:
        """Return a model of a job.

        Args:
            will_ask: whether any prompt is to be put to it. Then a budget needs a price.

        Raises:
            JobRejected: its price is not known.
        """
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
        price = state.prices.get(name) or unstored_price(record.info, listed)
        return RetryingClient(self._model_client, record, self._retry_policy), price.price if price else None
