from __future__ import annotations

from pathlib import Path

import numpy as np

from proxy.profiling.job_store import Job
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from router_core.clustering import ClusterMap
from router_core.profiles import Profile
from tests.support.profiling import Bench, a_bench, ended
from tests.support.waiting import until

_HALF = 0.5**0.5
# North and east are one cluster, south and west the other.
HALVES = ClusterMap(
    np.array([[_HALF, _HALF, 0, 0], [0, 0, _HALF, _HALF]], dtype=np.float32), embedder_id="corners", top=1
)


async def measured_on_corners(store: Store, folder: Path, record: ModelRecord, prompts: int = 24) -> Profile:
    """Register the model and store its profile on the first map; then end that process."""
    async with a_bench(store, folder, record) as bench:
        job = await ended(bench.jobs, await bench.jobs.submit(record.name, prompts, 1.0))
        assert job.state == "ready", job.error
        return await profile_in_use(bench)


async def profile_in_use(bench: Bench) -> Profile:
    """Return the profile once there is one on the map of this process."""
    await until(lambda: bench.record.name in bench.state.current.profiles)
    return bench.state.current.profiles[bench.record.name]


async def latest_job(bench: Bench) -> Job:
    job = await bench.jobs.for_model(bench.record.name)
    assert job is not None
    return job
