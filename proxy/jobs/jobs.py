"""Profiling jobs as the rest of the proxy sees them. How they are worked on is worker, what they do profiling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from proxy.concurrency import end
from proxy.jobs.answering import Answerer
from proxy.jobs.asking import Patience
from proxy.jobs.carrying import CarryingOver
from proxy.jobs.grading import GradingProcess
from proxy.jobs.ledger import Ledger
from proxy.jobs.measuring import Measuring
from proxy.jobs.records import Job, PromptAnswer
from proxy.jobs.validation_prompts import PlacedPrompts, ValidationPrompts
from proxy.jobs.worker import JobWorker
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry, UnknownModel
from proxy.storage.snapshot import StateHolder
from router_core.types import Embedder

__all__ = ["Job", "Jobs", "outcome_lines"]

RECENT_S = 1.0


class Jobs:
    """One per process. Submitting needs no worker; a worker may be in this process or in any other."""

    def __init__(
        self,
        store: Store,
        state: StateHolder,
        answerer: Answerer,
        embedder: Embedder,
        settings: Settings,
        patience: Patience | None = None,
    ) -> None:
        self._state = state
        self._ledger = Ledger(store)
        self._prompts = ValidationPrompts(settings.validation_set, embedder)
        patience = patience or Patience(timeout_s=settings.profile.timeout_s)
        self._grading = GradingProcess()
        measuring = Measuring(settings, state, answerer, self._ledger, self._prompts, patience, self._grading)
        self.worker = JobWorker(store, self._ledger, measuring.measure, state.current.cluster_map.id)
        self._carrying = CarryingOver(settings, state, self._ledger, self._prompts, self.worker.kick)
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
        await end(self._carrying_task)
        await self.worker.stop()

    async def close(self) -> None:
        await end(self._carrying_task)
        await self.worker.close()
        await self._grading.close()


def outcome_lines(placed: PlacedPrompts, model: str, answers: Mapping[str, PromptAnswer]) -> list[dict[str, Any]]:
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
