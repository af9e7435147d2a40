from __future__ import annotations

import logging
from functools import partial

from proxy.profiling.jobs import Jobs
from proxy.settings.schema import Settings
from proxy.storage.redis import StoreUnreadable, retry_until_available
from proxy.storage.snapshot import SnapshotWatcher

log = logging.getLogger("uniroute.onboarding")


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
            log.error("model %s is not measured: %s", model.model_name, error)


async def _submit(name: str, settings: Settings, state: SnapshotWatcher, jobs: Jobs) -> None:
    await state.refresh()
    snapshot = state.current
    if name in snapshot.profiles or await jobs.migrate_profile(name):
        return
    if name not in snapshot.prices:
        log.warning("model %s has no price, so it is not measured: state one in model_info, or free: true", name)
        return
    prompts, max_usd = settings.profile.prompts, settings.profile.max_usd
    job = await jobs.submit(name, prompts, max_usd)
    log.info(
        "model %s has no profile: asking it %d prompts for at most $%g (job %s)",
        *(name, prompts, max_usd, job.id),
    )
