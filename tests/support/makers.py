from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from proxy.settings.model_config import ModelInfo
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.price_map import bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.snapshot import SnapshotInputs, SnapshotWatcher, TrafficStats
from router_core.clustering import ClusterMap
from router_core.profiles import Profile

CORNERS = ClusterMap(np.eye(4, dtype=np.float32), embedder_id="corners", top=2)
# A profile as the history of a model has it.
PAST_PROFILE: dict[str, Any] = {
    "stored_at": 1.0,
    "source": "job",
    "map_id": "m",
    "fingerprint": "f",
    "recipe": "pooled",
    "job": "j",
    "measured_at": "2026-01-01T00:00:00Z",
    "spent_usd": 0.1,
    "mean_output_tokens": 5.0,
    "mean_seconds": 0.5,
    "error_sums": [1.0, 0.5],
    "labels": [2.0, 1.0],
}
PRICED: dict[str, Any] = {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6}


def a_record(
    name: str = "small", *, source: Any = "admin", info: dict[str, Any] | None = None, **params: Any
) -> ModelRecord:
    litellm_params = {"model": f"openai/{name}", "api_base": "http://127.0.0.1:9/v1", **params}
    model_info = ModelInfo.model_validate(PRICED if info is None else info)
    return ModelRecord(name, litellm_params, model_info, source, 1_700_000_000.0)


def a_profile(errors: Sequence[float] = (0.1, 0.2, 0.3, 0.4), map_id: str = CORNERS.id) -> Profile:
    document = {"map": map_id, "errors": list(errors), "labels": [5.0] * len(errors)}
    return Profile.from_json({**document, "mean_output_tokens": 50.0, "mean_seconds": 1.0})


def snapshot_inputs(
    *configured: ModelRecord, traffic_stats: TrafficStats | None = None, cluster_map: ClusterMap = CORNERS
) -> SnapshotInputs:
    return SnapshotInputs(
        cluster_map, {record.name: record for record in configured}, bundled_price_map(), traffic_stats=traffic_stats
    )


def a_registry(store: Store, folder: Path, *configured: str) -> Registry:
    return Registry(store, configured, AuthRequiredLatch(folder))


@asynccontextmanager
async def started_watcher(
    store: Store,
    folder: Path,
    *configured: ModelRecord,
    traffic_stats: TrafficStats | None = None,
    cluster_map: ClusterMap = CORNERS,
) -> AsyncIterator[SnapshotWatcher]:
    """Start a snapshot watcher: what one more process would see."""
    around = snapshot_inputs(*configured, traffic_stats=traffic_stats, cluster_map=cluster_map)
    holder = SnapshotWatcher(store, around, AuthRequiredLatch(folder))
    await holder.start()
    try:
        yield holder
    finally:
        await holder.stop()
