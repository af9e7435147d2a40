"""Opening the collaborators of a process, in order, and closing them in reverse. What they are is services."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_limits

from proxy.cluster_maps import open_map
from proxy.concurrency import PATIENCE_S, end, in_stoppable_thread, to_its_end
from proxy.health.exposition import HealthCollector
from proxy.jobs.answering import UpstreamAnswerer
from proxy.jobs.jobs import Jobs
from proxy.jobs.onboarding import onboarding
from proxy.limits.limiter import Limiter
from proxy.limits.scripts import SETTLE_FUNCTION
from proxy.preflight import check_data_dir, check_named_models
from proxy.recording.metrics import Metrics
from proxy.recording.values import open_values
from proxy.routing.assigner import Assigner, deadline_of
from proxy.services import Services, ServicesHolder
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings, check_exposure
from proxy.startup import Startup, Step
from proxy.storage.client_keys import KeyLatch
from proxy.storage.models import ModelRecord
from proxy.storage.price_feed import PriceFeed
from proxy.storage.price_map import bundled_catalog
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry
from proxy.storage.sessions import Conversations
from proxy.storage.snapshot import StateHolder, Surroundings
from proxy.storage.traffic_stats import LiveExpectations
from proxy.storage.usage_journal import Journals
from proxy.storage.usage_writer import UsageRecorder
from proxy.upstream.client import Upstream
from proxy.upstream.concurrency_limit import Capacities
from proxy.upstream.health import HealthSharing, ModelHealth, Roster
from proxy.upstream.provider_resolution import Resolver
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.errors import RouterCoreError
from router_core.recipes import RECIPES

log = logging.getLogger("uniroute")


@asynccontextmanager
async def open_services(
    settings: Settings,
    environ: Mapping[str, str],
    startup: Startup | None = None,
    counts: Path | None = None,
) -> AsyncIterator[Services]:
    """Everything, in order, and closed in the reverse order. Slow imports and loads run beside each other, in threads.

    Args:
        startup: told of the steps that may take seconds.
        counts: the folder in which several workers count.

    Raises:
        SettingsError: a setting that cannot work here: an unreadable map, an open door to others.
        StoreUnavailable: the embedded store cannot run.
    """
    startup = startup or Startup()
    check_data_dir(settings)
    async with AsyncExitStack() as closing:
        upstream = Upstream(settings, environ)
        closing.push_async_callback(upstream.aclose)
        resolver = Resolver(settings.data_dir, environ)
        closing.push_async_callback(resolver.aclose)
        resolving = asyncio.create_task(_configured(settings, resolver, startup))
        closing.push_async_callback(end, resolving)
        cluster_map, assigner = await in_stoppable_thread(partial(_open_routing, settings, startup))
        closing.callback(assigner.close)
        # one prompt is too little to share out: the threads would wait for one another, on cores that others work on
        closing.enter_context(threadpool_limits(1, user_api="blas"))
        with startup.step("starting the store"):
            store = await Store.open(settings)
        closing.push_async_callback(store.close)
        live, latch = LiveExpectations(cluster_map.size), KeyLatch(settings.data_dir)
        around = await _surroundings(settings, cluster_map, live, await resolving)
        state = StateHolder(store, around, latch, lambda now: upstream.serve(now.models))
        with startup.step("reading models"):
            await state.start()
        closing.push_async_callback(state.stop)
        check_exposure(settings, keys_required=state.current.keys_required)
        check_named_models(settings, state.current.models, _is_priced, complete=state.available)
        metrics = Metrics(open_values(counts))
        health = await closing.enter_async_context(_watched_health(settings, store, state, metrics))
        usage = await closing.enter_async_context(_running(_recorder(store, settings, metrics)))
        conversations = await closing.enter_async_context(_running(_conversations(store, settings, metrics)))
        limiter = _limiter(store, settings, metrics)
        closing.push_async_callback(limiter.close)
        registry = Registry(store, around.configured, latch)
        with startup.step("loading the embedder"):
            await assigner.warm(cluster_map)
        with startup.step("importing litellm"):
            await upstream.open()
        feeding = asyncio.create_task(PriceFeed(settings, store, registry, state).run(), name="uniroute-prices")
        closing.push_async_callback(end, feeding)
        jobs = Jobs(store, state, UpstreamAnswerer(upstream), assigner.embedder, settings)
        closing.push_async_callback(jobs.close)
        await jobs.start_worker()
        metrics.look_at(lambda: _look(metrics, state, usage))
        if counts is not None:
            looking = asyncio.create_task(_look_again(metrics), name="uniroute-metrics")
            closing.push_async_callback(end, looking)
        yield Services(
            *(settings, store, state, registry, jobs, assigner, upstream, usage, limiter, metrics, live, health),
            capacities=Capacities(),
            conversations=conversations,
            resolver=resolver,
            environ=environ,
        )


LOOK_AGAIN_S = 1.0
START_FAILED = 3
"""The exit status of a process that could not start: uvicorn's own, which its supervisor knows too."""
FORESEEN = (SettingsError, StoreUnavailable, RouterCoreError)


@asynccontextmanager
async def opened_beside(holder: ServicesHolder, settings: Settings, environ: Mapping[str, str]) -> AsyncIterator[None]:
    """The services, opened in a task of their own, so that the server listens at once. They are closed at the end.

    Where they cannot be opened the process ends, with what is wrong in one line and START_FAILED.
    """
    ending = asyncio.Event()
    task = asyncio.create_task(_hold_open(holder, settings, environ, ending), name="uniroute-services")
    try:
        yield
    except asyncio.CancelledError:
        pass  # a server that ends without asking: what is to be closed is the same
    finally:
        ending.set()
        await to_its_end(_ended(task, lambda: holder.is_open))


async def _ended(task: asyncio.Task[None], is_open: Callable[[], bool]) -> None:
    """A start is cancelled, and seldom: what it has opened so far is closed then, and each time interrupts that."""
    while not task.done():
        if not is_open():
            task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE_S)
    if not task.cancelled():
        task.exception()  # said already


async def _hold_open(
    holder: ServicesHolder, settings: Settings, environ: Mapping[str, str], ending: asyncio.Event
) -> None:
    try:
        async with open_services(settings, environ, holder.startup, holder.counts) as services, onboarding(services):
            gc.collect()
            gc.freeze()  # what is there now stays: to look through all of it took tenths of a second, again and again
            holder.open(services)
            try:
                await ending.wait()
            finally:
                gc.unfreeze()
    except FORESEEN as refusal:
        holder.startup.failure = refusal
        log.error("%s", " ".join(str(refusal).split()))
    except Exception as error:  # only what nobody foresaw keeps its traceback
        holder.startup.failure = error
        log.exception("the server cannot start" if not holder.is_open else "the server could not be closed")
    if holder.startup.failure is not None and not ending.is_set():
        raise SystemExit(START_FAILED)


def _is_priced(name: str) -> bool:
    return bundled_catalog().find(name) is not None


class _Background(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


Running = TypeVar("Running", bound=_Background)


@asynccontextmanager
async def _running(task: Running) -> AsyncIterator[Running]:
    task.start()
    try:
        yield task
    finally:
        await task.stop()


def _look(metrics: Metrics, state: StateHolder, usage: UsageRecorder) -> None:
    metrics.tasks.set(len(asyncio.all_tasks()))
    metrics.state_version.set(state.current.version)
    metrics.store_available.set(state.available)
    metrics.usage_journal.set(usage.journal_bytes)


async def _look_again(metrics: Metrics) -> None:
    """For the worker that is scraped next, which may be another."""
    while True:
        metrics.look()
        await asyncio.sleep(LOOK_AGAIN_S)


def _recorder(store: Store, settings: Settings, metrics: Metrics) -> UsageRecorder:
    journals = Journals(settings.data_dir / "usage", settings.usage_journal_max_bytes)
    return UsageRecorder(store, journals, metrics.usage_dropped.inc, settle_function=SETTLE_FUNCTION)


def _limiter(store: Store, settings: Settings, metrics: Metrics) -> Limiter:
    return Limiter(
        store,
        metrics,
        open_without_store=settings.limits_without_store == "allow",
        timeout_s=settings.limits_timeout_s,
    )


@asynccontextmanager
async def _watched_health(
    settings: Settings, store: Store, state: StateHolder, metrics: Metrics
) -> AsyncIterator[ModelHealth]:
    """The health of the models, shown, shared with other processes, and forgotten with the models."""
    health = ModelHealth(settings.breaker)
    collector = HealthCollector(health, lambda: state.current.models, metrics.values)
    metrics.look_at(collector.look)
    metrics.registry.register(collector)
    looking = asyncio.create_task(Roster(health, lambda: state.current.models).run(), name="uniroute-roster")
    try:
        async with _running(HealthSharing(store, health, lambda: state.current.models)):
            yield health
    finally:
        await end(looking)


def _open_routing(
    settings: Settings, startup: Startup | None = None, stop: threading.Event | None = None
) -> tuple[ClusterMap, Assigner]:
    try:
        cluster_map = open_map(settings)
        with (startup or Startup()).step("opening the embedding table", "tokens") as step:
            embedder = open_embedder(settings.embedder, settings.data_dir, log.info, partial(_distilled, step), stop)
    except (RouterCoreError, OSError) as error:
        raise SettingsError(f"map, embedder: {error}") from error
    if embedder.id != cluster_map.embedder_id:
        raise SettingsError(
            f"embedder: {settings.embedder!r} ({embedder.id}) is not what the map was fitted with"
            f" ({cluster_map.embedder_id}); choose that one, or fit a map with this one"
        )
    return cluster_map, Assigner(embedder, deadline_of(settings.embedder))


def _distilled(step: Step, done: int, total: int) -> None:
    """By this process or another, which this one waits for."""
    step.what = "distilling the embedding table"
    step.update(done, total)


def _conversations(store: Store, settings: Settings, metrics: Metrics) -> Conversations:
    return Conversations(
        store,
        settings.session_ttl_s,
        on_missed=metrics.conversations_missed.inc,
        on_dropped=metrics.conversations_dropped.inc,
    )


async def _configured(settings: Settings, resolver: Resolver, startup: Startup) -> dict[str, ModelRecord]:
    now = time.time()
    records = [ModelRecord.of_entry(entry, "config", now) for entry in settings.model_list]
    with startup.step("resolving providers", "models", len(records)):
        return {record.name: record for record in await resolver.resolve_all(records)}


async def _surroundings(
    settings: Settings, cluster_map: ClusterMap, live: LiveExpectations, configured: Mapping[str, ModelRecord]
) -> Surroundings:
    catalog = await asyncio.to_thread(bundled_catalog)
    return Surroundings(cluster_map, configured, catalog, RECIPES[settings.recipe], live)
