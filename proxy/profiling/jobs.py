from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxy.concurrency import cancel_and_wait
from proxy.errors import NotProfiled
from proxy.profiling.grading import GradingProcess, ModelClient, RetryPolicy
from proxy.profiling.job import Job, PromptAnswer, ReusedAnswers
from proxy.profiling.job_store import JobStore
from proxy.profiling.prompts import AssignedPrompts, ValidationPrompts
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
    """Say of each model how far its latest job is, or why that failed, with a `retry-after` where waiting helps."""
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
    """Until the first one is measured, as far as known."""
    left = [job.eta_s for job in under_way if job.eta_s is not None]
    return min(MAX_RETRY_S, max(1, math.ceil(min(left, default=QUEUED_RETRY_S))))


def _meanwhile(settings: Settings) -> str:
    if settings.default_model is None:
        return "set default_model, and that model answers meanwhile"
    return f"default_model {settings.default_model!r} cannot take this request, or is not there"


log = logging.getLogger("uniroute.jobs")


@dataclass(frozen=True)
class Recorded:
    """What is left of the job behind a profile."""

    asked: int
    """How many prompts that job was for."""
    carried: ReusedAnswers

    @property
    def suffices(self) -> bool:
        """Whether a profile can be made of it alone."""
        return 0 < min(ENOUGH_LABELS, self.asked) <= self.carried.labels


class ProfileMigration:
    """For the map of this process. What can be carried over becomes a job like any other."""

    def __init__(
        self,
        settings: Settings,
        state: SnapshotWatcher,
        ledger: JobStore,
        prompts: ValidationPrompts,
        kick: Callable[[str], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._state = state
        self._ledger = ledger
        self._prompts = prompts
        self._kick = kick

    async def run(self) -> None:
        """Every model once. Waits for a store that is away."""
        await retry_until_available(self._state.refresh)
        for model in sorted(self._state.current.elsewhere):
            try:
                await retry_until_available(partial(self._carry_over_or_tell, model))
            except StoreUnreadable as error:
                log.error("the answers of model %s are not carried over: %s", model, error)

    async def carry_over(self, model: str) -> bool:
        """Whether the model's answers are carried over: by one job, however many processes ask for it.

        Prompts that are missing are asked only of configured models, and only if those are measured on start.

        Raises:
            StoreUnavailable: ask again.
        """
        state = self._state.current
        entry, record = state.elsewhere.get(model), state.models.get(model)
        recorded = await self._recorded(entry) if entry else None
        if entry is None or record is None or recorded is None:
            return False
        asks = self._may_ask(record) and model in state.prices
        if not (recorded.suffices or asks):
            return False
        prompts = recorded.asked if asks else len(recorded.carried.answers)
        max_usd = self._settings.profile.max_usd if asks else 0.0
        job_id = await self._ledger.submit(record, prompts, max_usd, recorded.carried)
        if job_id:
            log.info(
                "model %s was measured on map %s: %d recorded answers are carried over (job %s)",
                *(model, entry.profile.map_id, len(recorded.carried.answers), job_id),
            )
            await self._kick(job_id)
        return True

    def _may_ask(self, record: ModelRecord) -> bool:
        """Because a process starts: only onboarding's models."""
        return record.source == "config" and self._settings.profile.on_start

    async def _carry_over_or_tell(self, model: str) -> None:
        await self._state.refresh()
        state = self._state.current
        entry = state.elsewhere.get(model)
        if entry is None or await self.carry_over(model) or self._may_ask(state.models[model]):
            return
        log.warning(
            "model %s was measured on map %s, and too few answers are recorded to carry over:"
            " `uniroute models profile %s` measures it on this map",
            *(model, entry.profile.map_id, model),
        )

    async def _recorded(self, entry: StoredProfile) -> Recorded | None:
        """None where nothing is: it was handed over, or its job ended too long ago, or its prompts are gone."""
        job = await self._ledger.get(entry.job) if entry.job else None
        if job is None:
            return None
        stored = await self._ledger.answers(job.id)
        cluster_map = self._state.current.cluster_map
        try:
            placed = await self._prompts.placed(cluster_map)
        except InvalidInput as error:  # whatever job is submitted instead fails with it, and shows it
            log.error("no answers can be carried over: %s", error)
            return None
        answered = (prompt.id for prompt in placed.prompts if prompt.id in stored and not stored[prompt.id].failed)
        answers = {prompt_id: stored[prompt_id] for prompt_id in answered}
        measured_at = entry.profile.measured_at
        return Recorded(job.total, ReusedAnswers(job.id, cluster_map.id, answers, measured_at)) if answers else None


RECENT_S = 1.0


class Jobs:
    """One per process. Submitting needs no worker; a worker may be in this process or in any other."""

    def __init__(
        self,
        store: Store,
        state: SnapshotWatcher,
        answerer: ModelClient,
        embedder: Embedder,
        settings: Settings,
        patience: RetryPolicy | None = None,
    ) -> None:
        self._state = state
        self._ledger = JobStore(store)
        self._prompts = ValidationPrompts(settings.validation_set, embedder)
        patience = patience or RetryPolicy(timeout_s=settings.profile.timeout_s)
        self._grading = GradingProcess()
        measuring = JobRunner(settings, state, answerer, self._ledger, self._prompts, patience, self._grading)
        self.worker = JobWorker(store, self._ledger, measuring.measure, state.current.cluster_map.id)
        self._carrying = ProfileMigration(settings, state, self._ledger, self._prompts, self.worker.kick)
        self._carrying_task: asyncio.Task[None] | None = None
        self._recent: Mapping[str, Job] = {}
        self._read_at = -RECENT_S
        self._reading = asyncio.Lock()

    async def submit(self, model: str, prompts: int, max_usd: float | None) -> Job:
        """Ask a registered model; an unfinished job that asks the same arm is returned instead of a second one.

        Raises:
            UnknownModel, ValueError: no such model, no prompt asked for.
            StoreUnavailable: nothing was submitted.
        """
        if prompts < 1:
            raise ValueError(f"prompts must be 1 or more; got {prompts}")
        await self._state.refresh()
        record = self._state.current.models.get(model)
        if record is None:
            raise UnknownModel(f"no model named {model!r} is registered")
        job_id = await self._ledger.submit(record, prompts, max_usd)
        await self.worker.kick(job_id)
        job = await self._ledger.get(job_id)
        if job is None:
            raise StoreUnavailable("the job that was just stored is gone: the store was emptied")
        return job

    async def submitted_with(
        self, record: ModelRecord, prompts: int, max_usd: float | None, registry: Registry
    ) -> tuple[str, int]:
        """Add a model and submit its job, both or neither.

        Returns:
            The job's id, and the version since which the model is there.

        Raises:
            StoreUnavailable, NameTaken.
        """
        step = self._ledger.submission(record, prompts, max_usd)
        version, job_id = await registry.add_model_with(record, step)
        await self.worker.kick(job_id)
        return job_id, version

    async def carry_over(self, model: str) -> bool:
        """Whether what the model answered on another map is carried over to this one. Raises StoreUnavailable."""
        return await self._carrying.carry_over(model)

    async def get(self, job_id: str) -> Job | None:
        return await self._ledger.get(job_id)

    async def for_model(self, name: str) -> Job | None:
        """The model's latest job."""
        return await self._ledger.for_model(name)

    async def latest(self) -> Mapping[str, Job]:
        """Each model's latest job, in two round trips."""
        return await self._ledger.latest()

    async def recent(self) -> Mapping[str, Job]:
        """As `latest`, at most RECENT_S old, for refusals, of which there may be many; empty while Redis is away."""
        async with self._reading:
            if time.monotonic() >= self._read_at + RECENT_S:
                try:
                    self._recent = await self._ledger.latest() if self._state.available else {}
                except StoreUnavailable:
                    self._recent = {}
                self._read_at = time.monotonic()
            return self._recent

    async def cancel(self, job_id: str) -> bool:
        """Its worker stops at the next answer, or within two seconds. False: there was nothing left to cancel."""
        return await self._ledger.cancel(job_id)

    async def cancel_for(self, model: str, why: str) -> None:
        """Stop measuring this model, if it is being measured."""
        job = await self._ledger.for_model(model)
        if job is not None and job.unfinished:
            await self._ledger.cancel(job.id, why)

    async def outcomes(self, job_id: str) -> list[dict[str, Any]]:
        """The graded answers of a job as lines of an outcomes file; prompts without a label are left out."""
        job = await self._ledger.get(job_id)
        if job is None:
            return []
        placed = await self._prompts.placed(self._state.current.cluster_map)
        return outcome_lines(placed, job.model, await self._ledger.answers(job_id))

    async def start_worker(self) -> None:
        """Work on jobs in this process's event loop, and submit those that a new map makes. Redis may be away."""
        await self.worker.start()
        self._carrying_task = asyncio.create_task(self._carrying.run(), name="uniroute-carrying-over")

    async def stop_worker(self) -> None:
        """Give the jobs back: another worker goes on with them at once."""
        await cancel_and_wait(self._carrying_task)
        await self.worker.stop()

    async def close(self) -> None:
        await cancel_and_wait(self._carrying_task)
        await self.worker.close()
        await self._grading.close()


def outcome_lines(placed: AssignedPrompts, model: str, answers: Mapping[str, PromptAnswer]) -> list[dict[str, Any]]:
    """`{"id", "source", "prompt", "scores": {model: score}, "output_tokens": {model: n}}` for each labelled prompt."""
    lines = []
    for prompt in placed.prompts:
        answer = answers.get(prompt.id)
        if answer is None or answer.score is None:
            continue
        line = {"id": prompt.id, "source": prompt.family, "prompt": prompt.text, "scores": {model: answer.score}}
        tokens = {} if answer.output_tokens is None else {"output_tokens": {model: answer.output_tokens}}
        lines.append({**line, **tokens})
    return lines
