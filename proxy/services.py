"""The collaborators of one process, opened together and closed together. No routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from proxy.cluster_maps import open_map
from proxy.jobs.answering import UpstreamAnswerer
from proxy.jobs.jobs import Jobs
from proxy.recording.metrics import Metrics
from proxy.recording.usage import UsageRecorder
from proxy.routing.assigning import Assigner, deadline_of
from proxy.settings import Settings, SettingsError, check_exposure
from proxy.state.catalog import bundled_catalog
from proxy.state.holder import StateHolder
from proxy.state.keys import KeyLatch
from proxy.state.live import LiveExpectations
from proxy.state.prices import PriceFeed
from proxy.state.records import ModelRecord
from proxy.state.registry import Registry
from proxy.state.snapshot import Surroundings
from proxy.state.store import Store
from proxy.tasks import end
from proxy.upstream.client import LitellmUpstream
from proxy.upstream.provider_layer import import_litellm
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.errors import RouterCoreError
from router_core.recipes import RECIPES

log = logging.getLogger("uniroute")


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: Store
    state: StateHolder
    registry: Registry
    jobs: Jobs
    assigner: Assigner
    upstream: LitellmUpstream
    usage: UsageRecorder
    metrics: Metrics
    live: LiveExpectations
    environ: Mapping[str, str] = field(repr=False)


class ServicesHolder:
    """Where an app finds its services once they are open."""

    def __init__(self, services: Services | None = None) -> None:
        self._services = services

    @property
    def is_open(self) -> bool:
        return self._services is not None

    @property
    def services(self) -> Services:
        if self._services is None:
            raise RuntimeError("the services are not open yet")
        return self._services

    def open(self, services: Services) -> None:
        self._services = services


@asynccontextmanager
async def open_services(settings: Settings, environ: Mapping[str, str]) -> AsyncIterator[Services]:
    """Everything, in order, and closed in the reverse order. Slow imports and loads run beside each other, in threads.

    Raises:
        SettingsError: a setting that cannot work here: an unreadable map, an open door to others.
        StoreUnavailable: the embedded store cannot run.
    """
    async with AsyncExitStack() as closing:
        upstream = LitellmUpstream(settings, environ)
        closing.push_async_callback(upstream.aclose)
        importing = asyncio.create_task(asyncio.to_thread(import_litellm))
        closing.push_async_callback(end, importing)
        cluster_map, assigner = await asyncio.to_thread(_open_routing, settings)
        closing.callback(assigner.close)
        store = await Store.open(settings)
        closing.push_async_callback(store.close)
        live = LiveExpectations(cluster_map.size)
        latch = KeyLatch(settings.data_dir)
        around = await asyncio.to_thread(_surroundings, settings, cluster_map, live)
        state = StateHolder(store, around, latch)
        await state.start()
        closing.push_async_callback(state.stop)
        check_exposure(settings, keys_required=state.current.keys_required)
        metrics = Metrics()
        usage = UsageRecorder(store, metrics.usage_dropped.inc)
        usage.start()
        closing.push_async_callback(usage.stop)
        registry = Registry(store, around.configured, latch)
        await assigner.warm(cluster_map)
        await importing
        await upstream.prepare()
        feeding = asyncio.create_task(PriceFeed(settings, store, registry, state).run(), name="uniroute-prices")
        closing.push_async_callback(end, feeding)
        jobs = Jobs(store, state, UpstreamAnswerer(upstream), assigner.embedder, settings)
        closing.push_async_callback(jobs.close)
        await jobs.start_worker()
        yield Services(settings, store, state, registry, jobs, assigner, upstream, usage, metrics, live, environ)


def _open_routing(settings: Settings) -> tuple[ClusterMap, Assigner]:
    try:
        cluster_map = open_map(settings)
        embedder = open_embedder(settings.embedder, settings.data_dir, log.info)
    except (RouterCoreError, OSError) as error:
        raise SettingsError(f"map, embedder: {error}") from error
    if embedder.id != cluster_map.embedder_id:
        raise SettingsError(
            f"embedder: {settings.embedder!r} ({embedder.id}) is not what the map was fitted with"
            f" ({cluster_map.embedder_id}); choose that one, or fit a map with this one"
        )
    return cluster_map, Assigner(embedder, deadline_of(settings.embedder))


def _surroundings(settings: Settings, cluster_map: ClusterMap, live: LiveExpectations) -> Surroundings:
    now = time.time()
    configured = {entry.model_name: ModelRecord.of_entry(entry, "config", now) for entry in settings.model_list}
    return Surroundings(cluster_map, configured, bundled_catalog(), RECIPES[settings.recipe], live)
