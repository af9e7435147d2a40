from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxy.concurrency import BackgroundTasks
from proxy.errors import NotProfiled
from proxy.profiling.grading import AssignedPrompts, GradingProcess, ValidationPrompts
from proxy.profiling.job import Job, JobStore, PromptAnswer, ReusedAnswers
from proxy.profiling.model_client import ModelClient, RetryPolicy
from proxy.profiling.runner import ENOUGH_LABELS, JobRunner
from proxy.profiling.worker import JobWorker
from proxy.routing.candidates import listed
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, StoredProfile
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, retry_until_available
from proxy.storage.registry import Registry, UnknownModel
from proxy.storage.snapshot import SnapshotWatcher
from router_core.errors import InvalidInput
from router_core.types import Embedder

QUEUED_RETRY_S = 5

MAX_RETRY_S = 60


def with_progress(error: NotProfiled, jobs: Mapping[str, Job], settings: Settings) -> NotProfiled:
    """Add how far each model's latest job is, or why it failed, and a `retry-after` if waiting helps."""
    latest = {name: jobs[name] for name in error.why if name in jobs}
    reasons = {name: _progress(latest[name], why) if name in latest else why for name, why in error.why.items()}
    under_way = [job for job in latest.values() if job.unfinished]
    message = "no model can be chosen yet"
    if under_way:
        done, total = sum(job.done for job in under_way), sum(job.total for job in under_way)
        message += f": models are being measured, {done} of {total} prompts are done"
    headers = {"retry-after": str(_retry_after_s(under_way))} if under_way else {}
    return NotProfiled(f"{message}{listed(reasons)}; {_meanwhile(settings)}", error.why, headers)


def _progress(job: Job, why: str) -> str:
    match job.state:
        case "queued":
            return "waits to be measured"
        case "running":
            left = "" if job.eta_s is None else f", about {math.ceil(job.eta_s)} s left"
            return f"{job.done} of {job.total} prompts are done{left}"
        case "failed":
            return f"measuring it failed: {job.error}"
    return why


def _retry_after_s(under_way: Iterable[Job]) -> int:
    """Return the seconds until the first one is measured, as far as known."""
    left = [job.eta_s for job in under_way if job.eta_s is not None]
    return min(MAX_RETRY_S, max(1, math.ceil(min(left, default=QUEUED_RETRY_S))))


def _meanwhile(settings: Settings) -> str:
    if settings.default_model is None:
        return "set default_model, and that model answers meanwhile"
    return f"default_model {settings.default_model!r} cannot take this request, or is not there"


log = logging.getLogger("uniroute.jobs")


@dataclass(frozen=True)
class RecordedAnswers:
    """What is left of the job behind a profile."""

    prompts: int
    """How many prompts that job was for."""
    reused: ReusedAnswers

    @property
    def enough(self) -> bool:
        """Return whether a profile can be made of them alone."""
        return 0 < min(ENOUGH_LABELS, self.prompts) <= self.reused.labels


class ProfileMigration:
    """Make profiles for this process's map from the recorded answers of profiles for other maps, by ordinary jobs."""

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
        """Migrate every model's profile once. Wait for a store that is away."""
        await retry_until_available(self._state.refresh)
        for model in sorted(self._state.current.profiles_of_other_maps):
            try:
                await retry_until_available(partial(self._migrate_or_warn, model))
            except StoreUnreadable as error:
                log.error("the answers of model %s are not carried over: %s", model, error)

    async def run_for(self, model: str) -> bool:
        """Submit a job that reuses the model's answers: one job, however many processes ask for it.

        Prompts without a recorded answer are put only to configured models, and only if those are profiled on start.

        Returns:
            Whether there is such a job.

        Raises:
            StoreUnavailable: try again.
        """
        state = self._state.current
        entry, record = state.profiles_of_other_maps.get(model), state.models.get(model)
        recorded = await self._recorded(entry) if entry else None
        if entry is None or record is None or recorded is None:
            return False
        asks = self._may_ask(record) and model in state.prices
        if not (recorded.enough or asks):
            return False
        prompts = recorded.prompts if asks else len(recorded.reused.answers)
        max_usd = self._settings.profile.max_usd if asks else 0.0
        job_id = await self._job_store.submit(record, prompts, max_usd, recorded.reused)
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

    def _may_ask(self, record: ModelRecord) -> bool:
        """Return whether the model may be sent prompts because this process starts."""
        return record.source == "config" and self._settings.profile.on_start

    async def _migrate_or_warn(self, model: str) -> None:
        await self._state.refresh()
        state = self._state.current
        entry = state.profiles_of_other_maps.get(model)
        if entry is None or await self.run_for(model) or self._may_ask(state.models[model]):
            return
        log.warning(
            "model %s was measured on map %s, and too few answers are recorded to carry over:"
            " `uniroute models profile %s` measures it on this map",
            model,
            entry.profile.map_id,
            model,
        )

    async def _recorded(self, entry: StoredProfile) -> RecordedAnswers | None:
        """Return the answers behind a profile.

        None: there are none. The profile was handed over, its job ended too long ago, or its prompts are gone.
        """
        job = await self._job_store.get(entry.job) if entry.job else None
        if job is None:
            return None
        stored = await self._job_store.answers(job.id)
        cluster_map = self._state.current.cluster_map
        try:
            assigned = await self._prompts.load(cluster_map)
        except InvalidInput as error:  # a job that is submitted instead fails with it, and shows it
            log.error("no answers can be carried over: %s", error)
            return None
        answered = (prompt.id for prompt in assigned.prompts if prompt.id in stored and not stored[prompt.id].failed)
        answers = {prompt_id: stored[prompt_id] for prompt_id in answered}
        measured_at = entry.profile.measured_at
        return (
            RecordedAnswers(job.total, ReusedAnswers(job.id, cluster_map.id, answers, measured_at)) if answers else None
        )


RECENT_S = 1.0


class Jobs:
    """Submit, read and cancel profiling jobs. One per process; a worker may be in this process or in any other."""

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
            UnknownModel, ValueError: no such model; less than one prompt.
            StoreUnavailable: nothing was submitted.
        """
        if prompts < 1:
            raise ValueError(f"prompts must be 1 or more; got {prompts}")
        await self._state.refresh()
        record = self._state.current.models.get(model)
        if record is None:
            raise UnknownModel(f"no model named {model!r} is registered")
        job_id = await self._job_store.submit(record, prompts, max_usd)
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
            The job's id, and the version since which the model is there.

        Raises:
            StoreUnavailable, ModelExists.
        """
        step = self._job_store.submission(record, prompts, max_usd)
        version, job_id = await registry.add_model_with(record, step)
        await self.worker.enqueue(job_id)
        return job_id, version

    async def migrate_profile(self, model: str) -> bool:
        """Submit a job that reuses the model's answers on another map, if that can be. Raise StoreUnavailable."""
        return await self._migration.run_for(model)

    async def get(self, job_id: str) -> Job | None:
        return await self._job_store.get(job_id)

    async def for_model(self, name: str) -> Job | None:
        """Return the model's latest job."""
        return await self._job_store.for_model(name)

    async def latest(self) -> Mapping[str, Job]:
        """Return each model's latest job, in two round trips."""
        return await self._job_store.latest()

    async def recent(self) -> Mapping[str, Job]:
        """Return what `latest` does, up to RECENT_S old, for error messages; nothing while Redis is away."""
        async with self._reading:
            if time.monotonic() >= self._read_at + RECENT_S:
                try:
                    self._recent = await self._job_store.latest() if self._state.available else {}
                except StoreUnavailable:
                    self._recent = {}
                self._read_at = time.monotonic()
            return self._recent

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job; its worker stops at the next answer, or within two seconds. Return False if it was over."""
        return await self._job_store.cancel(job_id)

    async def cancel_for(self, model: str, why: str) -> None:
        """Cancel the model's unfinished job, if there is one."""
        job = await self._job_store.for_model(model)
        if job is not None and job.unfinished:
            await self._job_store.cancel(job.id, why)

    async def outcomes(self, job_id: str) -> list[dict[str, Any]]:
        """Return the graded answers of a job as lines of an outcomes file, without prompts that have no label."""
        job = await self._job_store.get(job_id)
        if job is None:
            return []
        assigned = await self._prompts.load(self._state.current.cluster_map)
        return outcome_lines(assigned, job.model, await self._job_store.answers(job_id))

    async def start_worker(self) -> None:
        """Work on jobs in this process's event loop, and migrate profiles of other maps. Redis may be away."""
        await self.worker.start()
        self._tasks.start("uniroute-carrying-over", self._migration.run, restart=False)

    async def close(self) -> None:
        await self._tasks.close()
        await self.worker.close()
        await self._grading.close()


def outcome_lines(assigned: AssignedPrompts, model: str, answers: Mapping[str, PromptAnswer]) -> list[dict[str, Any]]:
    """Return `{"id", "source", "prompt", "scores": {model: score}, "output_tokens": {model: n}}`, if labelled."""
    lines = []
    for prompt in assigned.prompts:
        answer = answers.get(prompt.id)
        if answer is None or answer.score is None:
            continue
        line = {"id": prompt.id, "source": prompt.family, "prompt": prompt.text, "scores": {model: answer.score}}
        tokens = {} if answer.output_tokens is None else {"output_tokens": {model: answer.output_tokens}}
        lines.append({**line, **tokens})
    return lines


onboarding_log = logging.getLogger("uniroute.onboarding")


async def profile_new_models(settings: Settings, state: SnapshotWatcher, jobs: Jobs) -> None:
    """Submit a profiling job for each configured model that has no profile, and wait for a store that is away.

    One job a model, however many processes ask for it.
    """
    if not settings.profile.on_start:
        return
    for model in settings.model_list:
        try:
            await retry_until_available(partial(_submit, model.model_name, settings, state, jobs))
        except StoreUnreadable as error:
            onboarding_log.error("model %s is not measured: %s", model.model_name, error)


async def _submit(name: str, settings: Settings, state: SnapshotWatcher, jobs: Jobs) -> None:
    await state.refresh()
    snapshot = state.current
    if name in snapshot.profiles or await jobs.migrate_profile(name):
        return
    if name not in snapshot.prices:
        onboarding_log.warning(
            "model %s has no price, so it is not measured: state one in model_info, or free: true", name
        )
        return
    prompts, max_usd = settings.profile.prompts, settings.profile.max_usd
    job = await jobs.submit(name, prompts, max_usd)
    onboarding_log.info(
        "model %s has no profile: asking it %d prompts for at most $%g (job %s)",
        *(name, prompts, max_usd, job.id),
    )
