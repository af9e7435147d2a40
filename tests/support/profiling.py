from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from proxy.errors import UpstreamError
from proxy.profiling.job_store import Job
from proxy.profiling.jobs import Jobs
from proxy.profiling.model_client import RetryPolicy, UpstreamModelClient
from proxy.settings.effort import params_of
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.snapshot import SnapshotWatcher
from proxy.upstream.payload import JSONPayload
from router_core.clustering import ClusterMap
from router_core.types import Floats
from tests.support.makers import CORNERS, a_record, a_registry, started_watcher

FAMILIES = ("north", "east", "south", "west")
FAST_RETRIES = RetryPolicy(attempts=3, first_wait_s=0.01, max_wait_s=0.05, timeout_s=2.0)


class CornersEmbedder:
    """Embed a text in the corner that its first word names."""

    id = "corners"
    dimension = 4

    def embed(self, texts: Sequence[str]) -> Floats:
        vectors = np.full((len(texts), 4), 0.1, dtype=np.float32)
        for row, text in enumerate(texts):
            word = text.split(" ", 1)[0]
            vectors[row, FAMILIES.index(word) if word in FAMILIES else 0] = 1.0
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


class HttpUpstream:
    """Call a model with one POST, and raise errors as the real provider layer does."""

    async def complete(self, record: ModelRecord, body: Mapping[str, Any]) -> JSONPayload:
        sent = {**body, **({} if record.effort is None else params_of(record.effort))}
        async with httpx.AsyncClient(timeout=60, trust_env=False, verify=False) as client:
            try:
                response = await client.post(f"{record.litellm_params['api_base']}/chat/completions", json=sent)
            except httpx.HTTPError as error:
                raise UpstreamError(f"{record.name} cannot be reached") from error
        if response.is_error:
            raise UpstreamError(
                f"{record.name} answered with status {response.status_code}",
                status=response.status_code,
                headers=response.headers,
            )
        return JSONPayload(response.json())


def write_validation_set(path: Path, count: int = 40, **more: Any) -> Path:
    """Write prompts that ask for their number, in one of four families."""
    lines = [
        {
            "id": f"p{n}",
            "family": FAMILIES[n % 4],
            "prompt": f"{FAMILIES[n % 4]} say the number {n}",
            "grader": {"type": "numeric", "answer": n},
            "max_tokens": 50,
            **more,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def knows(*families: str) -> Any:
    """Return a skill that answers the prompts of these families and is wrong elsewhere."""

    def answer(prompt: str) -> str:
        family, number = prompt.split(" ", 1)[0], prompt.rsplit(" ", 1)[-1]
        return f"The number is {number if family in families else -1}"

    return answer


def settings_for(folder: Path, **more: Any) -> Settings:
    if not (folder / "prompts.jsonl").exists():
        write_validation_set(folder / "prompts.jsonl")
    return Settings.model_validate({"data_dir": folder, "validation_set": str(folder / "prompts.jsonl"), **more})


@dataclass(frozen=True)
class Bench:
    """Hold what jobs need in one process."""

    state: SnapshotWatcher
    registry: Registry
    jobs: Jobs
    record: ModelRecord


def model_at(url: str, **params: Any) -> ModelRecord:
    return a_record("small", api_base=url, **params)


@asynccontextmanager
async def a_bench(
    store: Store,
    folder: Path,
    record: ModelRecord,
    *,
    worker: bool = True,
    retries: RetryPolicy = FAST_RETRIES,
    cluster_map: ClusterMap = CORNERS,
    **more: Any,
) -> AsyncIterator[Bench]:
    """Open jobs over the store, with the model registered unless it is configured."""
    configured = (record,) if record.source == "config" else ()
    async with AsyncExitStack() as closing:
        state = await closing.enter_async_context(started_watcher(store, folder, *configured, cluster_map=cluster_map))
        answerer = UpstreamModelClient(HttpUpstream())
        jobs = Jobs(store, state, answerer, CornersEmbedder(), settings_for(folder, **more), retries)
        closing.push_async_callback(jobs.close)
        registry = a_registry(store, folder, *(r.name for r in configured))
        if not configured:
            await registry.add_model(record)
        if worker:
            jobs.start_worker()
        yield Bench(state, registry, jobs, record)


async def ended(jobs: Jobs, job: Job, timeout_s: float = 60.0) -> Job:
    """Wait for the end of a job and return it."""
    deadline = time.monotonic() + timeout_s
    while True:
        latest = await jobs.get(job.id)
        assert latest is not None
        if not latest.unfinished:
            return latest
        assert time.monotonic() < deadline, f"still {latest.state} with {latest.done} of {latest.total}"
        await asyncio.sleep(0.02)
