"""Measures configured models that have no profile yet, when a process starts. How a model is measured is jobs'."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING

from proxy.concurrency import end
from proxy.storage.redis import StoreUnreadable, until_it_answers

if TYPE_CHECKING:
    from proxy.services import Services

onboarding_log = logging.getLogger("uniroute.onboarding")


@contextlib.asynccontextmanager
async def onboarding(services: Services) -> AsyncIterator[None]:
    """Runs beside the serving, so that other models answer meanwhile."""
    task = asyncio.create_task(measure_unmeasured(services), name="uniroute-onboarding")
    try:
        yield
    finally:
        await end(task)


async def measure_unmeasured(services: Services) -> None:
    """One job a model, however many processes ask for it. Waits for a store that is away."""
    for model in services.settings.model_list if services.settings.profile.on_start else ():
        try:
            await until_it_answers(partial(_submit, services, model.model_name))
        except StoreUnreadable as error:
            onboarding_log.error("model %s is not measured: %s", model.model_name, error)


async def _submit(services: Services, name: str) -> None:
    await services.state.refresh()
    state = services.state.current
    asking = services.settings.profile
    if name in state.profiles or await services.jobs.carry_over(name):
        return
    if name not in state.prices:
        onboarding_log.warning(
            "model %s has no price, so it is not measured: state one in model_info, or free: true", name
        )
        return
    job = await services.jobs.submit(name, asking.prompts, asking.max_usd)
    onboarding_log.info(
        "model %s has no profile: asking it %d prompts for at most $%g (job %s)",
        name,
        asking.prompts,
        asking.max_usd,
        job.id,
    )
