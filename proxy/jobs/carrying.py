"""Models that were measured on another cluster map, measured on this one from their recorded answers. Asks nobody."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from proxy.jobs.ledger import Ledger
from proxy.jobs.profiling import ENOUGH_LABELS
from proxy.jobs.records import Carried
from proxy.jobs.validation_prompts import ValidationPrompts
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, StoredProfile
from proxy.storage.redis import StoreUnreadable, until_it_answers
from proxy.storage.snapshot import StateHolder
from router_core.errors import InvalidInput

log = logging.getLogger("uniroute.jobs")


@dataclass(frozen=True)
class Recorded:
    """What is left of the job behind a profile."""

    asked: int
    """How many prompts that job was for."""
    carried: Carried

    @property
    def suffices(self) -> bool:
        """Whether a profile can be made of it alone."""
        return 0 < min(ENOUGH_LABELS, self.asked) <= self.carried.labels


class CarryingOver:
    """For the map of this process. What can be carried over becomes a job like any other."""

    def __init__(
        self,
        settings: Settings,
        state: StateHolder,
        ledger: Ledger,
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
        await until_it_answers(self._state.refresh)
        for model in sorted(self._state.current.elsewhere):
            try:
                await until_it_answers(partial(self._carry_over_or_tell, model))
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
        return Recorded(job.total, Carried(job.id, cluster_map.id, answers, measured_at)) if answers else None
