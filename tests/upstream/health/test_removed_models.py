from __future__ import annotations

import asyncio
from pathlib import Path

from proxy.concurrency import cancel_and_wait
from proxy.settings.schema import CircuitBreakerSettings
from proxy.storage.redis import Store
from proxy.upstream.health import HealthRegistry, prune_removed_models
from router_core.types import Price
from tests.support.makers import a_record, a_registry, started_watcher
from tests.support.waiting import until
from tests.upstream.health.makers import fail


async def test_removed_and_changed_models_are_forgotten_and_others_are_not(store: Store, tmp_path: Path) -> None:
    registry, health = a_registry(store, tmp_path), HealthRegistry(CircuitBreakerSettings())
    for name in ("removed", "changed", "repriced", "untouched"):
        await registry.add_model(a_record(name))
    async with started_watcher(store, tmp_path) as holder:
        pruning = asyncio.create_task(prune_removed_models(health, lambda: holder.current.models))
        await asyncio.sleep(0)
        for name in holder.current.models:
            fail(health, name)
        await registry.remove_model("removed")
        await registry.put_price("repriced", Price(1e-6, 1e-6), "admin")
        version = await registry.update_model(
            a_record("changed", api_key="os.environ/OTHER_API_KEY"), as_of=await now(store)
        )
        await until(lambda: holder.current.version >= version)
        await until(lambda: set(health.cooling_down()) == {"repriced", "untouched"})
        await cancel_and_wait(pruning)


async def now(store: Store) -> int:
    return int(await store.client.get("uniroute:version") or 0)
