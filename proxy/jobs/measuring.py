"""What a job needs before it can ask: its model, price, judge and prompts; and how it ends. The asking is profiling."""

from __future__ import annotations

import contextlib
import logging

from proxy.jobs.answering import Answerer
from proxy.jobs.asking import Asker, Patience
from proxy.jobs.examining import Arm
from proxy.jobs.grading import GradingProcess
from proxy.jobs.judging import Judge, NoJudge
from proxy.jobs.leases import Lease, LeaseLost
from proxy.jobs.ledger import Ledger
from proxy.jobs.profiling import Profiling, Verdict
from proxy.jobs.records import Job
from proxy.jobs.validation_prompts import ValidationPrompts
from proxy.settings.models import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord
from proxy.storage.price_map import bundled_catalog
from proxy.storage.redis import StoreUnavailable
from proxy.storage.snapshot import StateHolder, capabilities_of, price_of
from router_core.errors import InvalidInput
from router_core.types import Price

log = logging.getLogger("uniroute.jobs")

CHANGED_ARM = "litellm_params were changed while the model was being measured; profile it again"


class CannotMeasure(Exception):
    """The job fails before a prompt is asked; the message says what to change."""


class Measuring:
    """Carries out jobs for this process."""

    def __init__(
        self,
        settings: Settings,
        state: StateHolder,
        answerer: Answerer,
        ledger: Ledger,
        prompts: ValidationPrompts,
        patience: Patience,
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
            verdict = Verdict(error=CHANGED_ARM)
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

    async def _carry_out(self, job: Job, lease: Lease, record: ModelRecord) -> Verdict:
        cluster_map = self._state.current.cluster_map
        answered = await self._ledger.answers(job.id)
        try:
            placed = (await self._prompts.placed(cluster_map)).chosen(job.total, answered)
            waiting = tuple(prompt for prompt in placed.prompts if prompt.id not in answered)
            arm = self._arm(job, record, asked=bool(waiting))
            judge = Judge(self._judge_named, self._settings.judge_model, self._grading)
            judge.check(waiting, capped=job.max_usd is not None)
        except (CannotMeasure, NoJudge, InvalidInput) as reason:
            return Verdict(error=str(reason))
        await self._ledger.begin(lease, len(placed.prompts), priced=arm.price is not None)
        begun = await self._ledger.get(job.id) or job
        profiling = Profiling(begun, lease, self._ledger, placed)
        return await profiling.run(arm, judge, concurrency=self._settings.profile.concurrency, map_id=cluster_map.id)

    def _arm(self, job: Job, record: ModelRecord, *, asked: bool) -> Arm:
        """Money that cannot be counted cannot be capped, so a model without a price is asked only without a cap."""
        if job.fingerprint and job.fingerprint != record.fingerprint:
            raise CannotMeasure(CHANGED_ARM)
        price = self._state.current.prices.get(record.name)
        if asked and price is None and job.max_usd is not None:
            raise CannotMeasure(
                f"no price is known for {record.name!r}, so max_usd cannot be kept: put a price, or state it or"
                " free: true in model_info, and profile the model again"
            )
        known = bundled_catalog().find(str(record.litellm_params["model"]))
        capabilities = capabilities_of(record.info, known)
        return Arm(
            asker=Asker(self._answerer, record, self._patience),
            price=None if price is None else price.price,
            thinks=capabilities.reasoning is True,
            max_output_tokens=capabilities.max_output_tokens,
        )

    def _judge_named(self, name: str) -> tuple[Asker, Price | None]:
        """A registered model, or a name of litellm's with its usual key in the environment."""
        state = self._state.current
        record = state.models.get(name) or ModelRecord(name, {"model": name}, ModelInfo(), "config", 0.0)
        known = bundled_catalog().find(str(record.litellm_params["model"]))
        price = state.prices.get(name) or price_of(record.info, None, known)
        return Asker(self._answerer, record, self._patience), price.price if price else None
