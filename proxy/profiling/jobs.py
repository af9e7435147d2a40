from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxy.concurrency import BackgroundTasks
from proxy.errors import NotProfiled
from proxy.profiling.grading import AssignedPrompts, GradingProcess, ValidationPrompts
from proxy.profiling.job_store import Job, JobStore, PromptAnswer, ReusedAnswers
from proxy.profiling.model_client import ModelClient, RetryPolicy
from proxy.profiling.runner import ENOUGH_LABELS, ROW, SHARE, JobRunner
from proxy.profiling.worker import JobWorker
from proxy.routing.selection_context import listed
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, StoredProfile
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, retry_until_available
from proxy.storage.registry import Registry, UnknownModel
from proxy.storage.snapshot import SnapshotWatcher
from proxy.storage.variants import joint_fingerprint
from router_core.errors import InvalidInput
from router_core.types import Embedder

log = logging.getLogger("uniroute.jobs")

onboarding_log = logging.getLogger("uniroute.onboarding")


@dataclass(frozen=True)
class RecordedAnswers:
    """The answers that are still stored of the job that measured a profile."""

    prompts: int
    """How many prompts that job was for."""
    reused: ReusedAnswers
    efforts: int = 1
    """How many efforts of the model were measured; 1: the model itself."""

    @property
    def answered_prompts(self) -> int:
        """Return how many prompts have an answer, of any effort."""
        return len({place.rpartition("@")[0] if self.efforts > 1 else place for place in self.reused.answers})

    @property
    def enough(self) -> bool:
        """Return whether these answers are enough for a profile without asking the model again."""
        asked = self.prompts if self.efforts == 1 else self.efforts * self.prompts * SHARE // ROW
        needed = min(ENOUGH_LABELS * self.efforts, asked)
        return 0 < needed <= self.reused.labels


class ProfileMigration:
    """Submit jobs that turn profiles for other cluster maps into profiles for this process's map.

    They reuse the answers that the earlier jobs recorded.
    """

    def __init__(
        self,
        settings: Settings,
        state: SnapshotWatcher,
        job_store: JobStore,
        prompts: ValidationPrompts,
        enqueue: Callable[[str], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._state = state
        self._job_store = job_store
        self._prompts = prompts
        self._enqueue = enqueue

    async def run(self) -> None:
        """Migrate every model's profile once, waiting for Redis as long as it is not available."""
        await retry_until_available(self._state.refresh)
        state = self._state.current
        for model in sorted({state.models[name].registered_name for name in state.profiles_of_other_maps}):
            try:
                await retry_until_available(partial(self._migrate_or_warn, model))
            except StoreUnreadable as error:
                log.error("the answers of model %s are not carried over: %s", model, error)

    async def run_for(self, model: str) -> bool:
        """Submit a job that reuses the model's answers; only one, however many processes call this.

        Prompts without a recorded answer are put only to configured models, and only if those are profiled on start.

        Returns:
            False: the profile cannot be migrated.

        Raises:
            StoreUnavailable: try again.
        """
        state = self._state.current
        name = self._measured_before(model)
        entry, record = state.profiles_of_other_maps.get(name), state.models.get(model)
        recorded = await self._recorded(name, entry) if entry else None
        if entry is None or record is None or recorded is None:
            return False
        can_ask = self._may_ask(record) and model in state.prices
        if not (recorded.enough or can_ask):
            return False
        prompts = recorded.prompts if can_ask else recorded.answered_prompts
        max_usd = self._settings.profile.max_usd if can_ask else 0.0
        job_id = await self._job_store.submit(state.measured_records(model), prompts, max_usd, recorded.reused)
        if job_id:
            log.info(
                "model %s was measured on map %s: %d recorded answers are carried over (job %s)",
                model,
                entry.profile.map_id,
                len(recorded.reused.answers),
                job_id,
            )
            await self._enqueue(job_id)
        return True

    def _measured_before(self, model: str) -> str:
        """Return the name under which a profile for another map is stored: the model's, or that of an effort."""
        state = self._state.current
        names = state.efforts.get(model, (model,))
        return next((name for name in names if name in state.profiles_of_other_maps), model)

    def _may_ask(self, record: ModelRecord) -> bool:
        """Return whether the start of this process may send prompts to the model."""
        return record.source == "config" and self._settings.profile.on_start

    async def _migrate_or_warn(self, model: str) -> None:
        await self._state.refresh()
        state = self._state.current
        entry = state.profiles_of_other_maps.get(self._measured_before(model))
        if entry is None or await self.run_for(model) or self._may_ask(state.models[model]):
            return
        log.warning(
            "model %s was measured on map %s, and too few answers are recorded to carry over:"
            " `uniroute models profile %s` measures it on this map",
            model,
            entry.profile.map_id,
            model,
        )

    async def _recorded(self, name: str, entry: StoredProfile) -> RecordedAnswers | None:
        """Return the recorded answers that a profile, and those of the model's other efforts, were made of.

        Args:
            name: under which the profile is stored.

        Returns:
            None: there are none: the profile was uploaded, its job ended too long ago, or its prompts have changed.
        """
        job = await self._job_store.get(entry.job) if entry.job else None
        if job is None:
            return None
        stored = await self._job_store.answers(job.id)
        cluster_map = self._state.current.cluster_map
        try:
            assigned = await self._prompts.load(cluster_map)
        except InvalidInput as error:  # an ordinary job, which is submitted instead, will fail and show this error
            log.error("no answers can be carried over: %s", error)
            return None
        ids = (prompt.id + end for prompt in assigned.prompts for end in job.measured.values())
        answers = {place: stored[place] for place in ids if place in stored and not stored[place].failed}
        if not answers:
            return None
        keep, measured_at = self._settings.profile.keep_answers, entry.profile.measured_at
        reused = ReusedAnswers(job.id, cluster_map.id, answers, measured_at, with_texts=keep, profile=name)
        return RecordedAnswers(job.prompts, reused, len(job.measured))


# How old the jobs in an error message may be.
RECENT_S = 1.0


class Jobs:
    """Submit, read and cancel profiling jobs. Any process's worker may run them."""

    def __init__(
        self,
        store: Store,
        state: SnapshotWatcher,
        model_client: ModelClient,
        embedder: Embedder,
        settings: Settings,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        self._state = state
        self._job_store = JobStore(store)
        self._prompts = ValidationPrompts(settings.validation_set, embedder)
        retry_policy = retry_policy or RetryPolicy(timeout_s=settings.profile.timeout_s)
        self._grading = GradingProcess()
        runner = JobRunner(settings, state, model_client, self._job_store, self._prompts, retry_policy, self._grading)
        self.worker = JobWorker(store, self._job_store, runner.measure, state.current.cluster_map.id)
        self._migration = ProfileMigration(settings, state, self._job_store, self._prompts, self.worker.enqueue)
        self._tasks = BackgroundTasks()
        self._recent: Mapping[str, Job] = {}
        self._read_at = -RECENT_S
        self._reading = asyncio.Lock()

    async def submit(self, model: str, prompts: int, max_usd: float | None) -> Job:
        """Submit a job for a registered model, or return the unfinished job that measures the same.

        Raises:
            UnknownModel: no such model is registered.
            ValueError: `prompts` is less than one.
            StoreUnavailable: try again.
        """
        if prompts < 1:
            raise ValueError(f"prompts must be 1 or more; got {prompts}")
        await self._state.refresh()
        record = self._state.current.models.get(model)
        if record is None:
            raise UnknownModel(f"no model named {model!r} is registered")
        records = self._state.current.measured_records(record.registered_name)
        job_id = await self._job_store.submit(records, prompts, max_usd)
        await self.worker.enqueue(job_id)
        job = await self._job_store.get(job_id)
        if job is None:
            raise StoreUnavailable("the job that was just stored is gone: the store was emptied")
        return job

    async def submit_with_model(
        self, record: ModelRecord, prompts: int, max_usd: float | None, registry: Registry
    ) -> tuple[str, int]:
        """Add a model and submit its job, both or neither.

        Returns:
            The job's id, and the version of the models from which on this one is there.

        Raises:
            StoreUnavailable, ModelExists: see `Registry.add_model_with`.
        """
        records = self._state.variants_of(record) or (record,)
        step = self._job_store.submission(records, prompts, max_usd)
        version, job_id = await registry.add_model_with(record, step)
        await self.worker.enqueue(job_id)
        return job_id, version

    async def migrate_profile(self, model: str) -> bool:
        """Submit a job that makes the model's profile for another map into one for this map; return False if it cannot.

        Raises:
            StoreUnavailable: try again.
        """
        return await self._migration.run_for(model)

    async def get(self, job_id: str) -> Job | None:
        return await self._job_store.get(job_id)

    async def for_model(self, name: str) -> Job | None:
        """Return the latest job of a model; of an effort, that of its model."""
        record = self._state.current.models.get(name)
        return await self._job_store.for_model(name if record is None else record.registered_name)

    async def latest(self) -> Mapping[str, Job]:
        """Return the latest job of each model and of each effort, in two round trips."""
        latest = await self._job_store.latest()
        efforts = self._state.current.efforts
        of_efforts = {name: job for model, job in latest.items() for name in efforts.get(model, ())}
        return {**of_efforts, **latest}

    async def submitted_between(self, since: float, until: float) -> list[tuple[float, Job]]:
        """Return the jobs that were submitted in a time, Unix seconds, with the time of each."""
        return await self._job_store.submitted_between(since, until)

    async def recent(self) -> Mapping[str, Job]:
        """Return what `latest` does, up to RECENT_S old, for error messages; no jobs while Redis is not available."""
        async with self._reading:
            if time.monotonic() >= self._read_at + RECENT_S:
                try:
                    self._recent = await self.latest() if self._state.available else {}
                except StoreUnavailable:
                    self._recent = {}
                self._read_at = time.monotonic()
            return self._recent

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job; its worker stops at the next answer, or within two seconds. Return False if it had ended."""
        return await self._job_store.cancel(job_id)

    async def cancel_for(self, model: str, why: str) -> None:
        """Cancel the model's unfinished job, if there is one."""
        job = await self._job_store.for_model(model)
        if job is not None and job.unfinished:
            await self._job_store.cancel(job.id, why)

    async def outcomes(self, job_id: str) -> list[dict[str, Any]]:
        """Return the graded answers of a job as the lines of an outcomes file."""
        job = await self._job_store.get(job_id)
        if job is None:
            return []
        assigned = await self._prompts.load(self._state.current.cluster_map)
        answers = await self._job_store.answers(job_id)
        return [
            line
            for name, end in job.measured.items()
            for line in outcome_lines(assigned, name, job.answers_of(end, answers))
        ]

    async def latest_answers(
        self, models: Collection[str], prompt_ids: Sequence[str]
    ) -> dict[str, dict[str, PromptAnswer]]:
        """Return what some models answered to some prompts in their latest jobs, by model and prompt id."""
        jobs = {
            name: (job.id, end)
            for job in (await self._job_store.latest()).values()
            for name, end in job.measured.items()
            if name in models
        }
        return await self._job_store.answers_to(dict(sorted(jobs.items())), prompt_ids)

    async def graded_answers(self) -> dict[str, dict[str, float]]:
        """Return the scores that are still recorded of each model's latest job, by the id of the prompt."""
        found = {}
        for job in (await self._job_store.latest()).values():
            stored = await self._job_store.answers(job.id)
            for name, end in job.measured.items():
                answers = job.answers_of(end, stored)
                scores = {prompt: answer.score for prompt, answer in answers.items() if answer.score is not None}
                if scores:
                    found[name] = scores
        return found

    async def validation_prompts(self) -> AssignedPrompts:
        """Return the prompts that models are measured on, with their clusters. Raise InvalidValidationSet."""
        return await self._prompts.load(self._state.current.cluster_map)

    def start_worker(self) -> None:
        """Run jobs on this process's event loop, and migrate profiles for other maps, once Redis is available."""
        self.worker.start()
        self._tasks.start("uniroute-carrying-over", self._migration.run, restart=False)

    async def close(self) -> None:
        await self._tasks.close()
        await self.worker.close()
        await self._grading.close()


def outcome_lines(assigned: AssignedPrompts, model: str, answers: Mapping[str, PromptAnswer]) -> list[dict[str, Any]]:
    """Return `{"id", "source", "prompt", "scores": {model: score}, "output_tokens": {model: n}}` for each label."""
    lines = []
    for prompt in assigned.prompts:
        answer = answers.get(prompt.id)
        if answer is None or answer.score is None:
            continue
        line = {"id": prompt.id, "source": prompt.family, "prompt": prompt.text, "scores": {model: answer.score}}
        tokens = {} if answer.output_tokens is None else {"output_tokens": {model: answer.output_tokens}}
        lines.append({**line, **tokens})
    return lines


# `retry-after` while no job has begun, and at most.
QUEUED_RETRY_S = 5

MAX_RETRY_S = 60


def with_progress(error: NotProfiled, jobs: Mapping[str, Job], settings: Settings) -> NotProfiled:
    """Return the error with each model's progress, or why profiling it failed, and a `retry-after` if waiting helps."""
    latest = {name: jobs[name] for name in error.why if name in jobs}
    reasons = {name: _progress(latest[name], why) if name in latest else why for name, why in error.why.items()}
    unfinished = [*{job.id: job for job in latest.values() if job.unfinished}.values()]
    message = "no model can be chosen yet"
    if unfinished:
        done, total = sum(job.done for job in unfinished), sum(job.total for job in unfinished)
        message += f": models are being measured, {done} of {total} prompts are done"
    headers = {"retry-after": str(_retry_after_s(unfinished))} if unfinished else {}
    return NotProfiled(f"{message}{listed(reasons)}; {_default_model_hint(settings)}", error.why, headers)


def _progress(job: Job, why: str) -> str:
    """Describe a job that was not successful; return `why` if there is nothing to add."""
    match job.state:
        case "queued":
            return "waits to be measured"
        case "running":
            left = "" if job.eta_s is None else f", about {math.ceil(job.eta_s)} s left"
            return f"{job.done} of {job.total} prompts are done{left}"
        case "failed":
            return f"measuring it failed: {job.error}"
    return why


def _retry_after_s(unfinished: Iterable[Job]) -> int:
    """Return the seconds until the first of these jobs ends, as far as known."""
    left = [job.eta_s for job in unfinished if job.eta_s is not None]
    return min(MAX_RETRY_S, max(1, math.ceil(min(left, default=QUEUED_RETRY_S))))


def _default_model_hint(settings: Settings) -> str:
    """Say how the default model could answer while no model is profiled, or why it did not."""
    if settings.default_model is None:
        return "set default_model, and that model answers meanwhile"
    return f"default_model {settings.default_model!r} cannot take this request, or is not there"


async def profile_new_models(settings: Settings, state: SnapshotWatcher, jobs: Jobs) -> None:
    """Submit a profiling job for each configured model that has no profile, waiting for Redis if necessary.

    Each model gets only one job, however many processes call this.
    """
    if not settings.profile.on_start:
        return
    for model in settings.model_list:
        try:
            await retry_until_available(partial(_profile_if_new, model.model_name, settings, state, jobs))
        except StoreUnreadable as error:
            onboarding_log.error("model %s is not measured: %s", model.model_name, error)


async def _profile_if_new(name: str, settings: Settings, state: SnapshotWatcher, jobs: Jobs) -> None:
    await state.refresh()
    snapshot = state.current
    if name in snapshot.embeddings:  # they answer no prompts
        return
    records = snapshot.measured_records(name)
    measured = [record for record in records if record.name in snapshot.profiles]
    if len(measured) == len(records):
        return
    last = await jobs.for_model(name) if measured else None
    if last is not None and last.state == "ready" and last.fingerprint == joint_fingerprint(records):
        return  # it could not measure the other efforts, and would be paid again at every start
    if await jobs.migrate_profile(name):
        return
    if name not in snapshot.prices:
        onboarding_log.warning(
            "model %s has no price, so it is not measured: state one in model_info, or free: true", name
        )
        return
    prompts, max_usd = settings.profile.prompts, settings.profile.max_usd
    job = await jobs.submit(name, prompts, max_usd)
    onboarding_log.info(
        "model %s has no profile: asking it %d prompts for at most $%g (job %s)", name, prompts, max_usd, job.id
    )
