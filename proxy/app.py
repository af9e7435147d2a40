from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from proxy.concurrency import GRACE_PERIOD_S, background, cancel_and_wait, in_stoppable_thread, run_uncancelled
from proxy.dashboard.actions import router as dashboard_actions
from proxy.dashboard.curve_views import router as dashboard_curve
from proxy.dashboard.page import Dashboard, with_page_headers
from proxy.dashboard.quality import router as dashboard_quality
from proxy.dashboard.views import router as dashboard_views
from proxy.observability.otlp import is_enabled, open_telemetry
from proxy.observability.tracing import TracedEndpoints
from proxy.profiling.jobs import Jobs, profile_new_models
from proxy.profiling.model_client import UpstreamModelClient
from proxy.routing.assigner import ClusterAssigner, deadline_of
from proxy.server.admin import (
    audit_router,
    decisions_router,
    jobs_router,
    keys_router,
    models_router,
    reports_router,
    settings_router,
)
from proxy.server.api.client_apis import EMBEDDINGS
from proxy.server.auth import AuthMiddleware, KeyAuthenticator, RequestAuthorizer, is_dashboard
from proxy.server.completions import ENDPOINTS
from proxy.server.completions import router as completions_router
from proxy.server.dependencies import AppState
from proxy.server.embeddings import embed
from proxy.server.embeddings import router as embeddings_router
from proxy.server.exchange import Exchange
from proxy.server.log_handler import NonBlockingHandler, formatter_class
from proxy.server.metrics import HealthCollector, Metrics, ModelCollector, open_values
from proxy.server.middleware import (
    FIXED_PATHS,
    AuditLogMiddleware,
    HeadMiddleware,
    MessagesMiddleware,
    RequestIdsMiddleware,
    ServedPaths,
    corrected_path,
)
from proxy.server.model_endpoints import ModelEndpoints
from proxy.server.model_list import router as model_list_router
from proxy.server.openapi import complete, operation_id
from proxy.server.public import feedback_router, keyed_router, open_router
from proxy.server.quality_watch import QualityWatch
from proxy.server.ratelimit import RateLimiter
from proxy.server.requests import path_of
from proxy.server.reservations import SETTLE_FUNCTION
from proxy.server.responses import HANDLED_EXCEPTIONS, handle_error
from proxy.server.startup import (
    START_FAILED,
    Startup,
    Step,
    check_data_dir,
    check_named_models,
    load_cluster_map,
    return_freed_memory,
)
from proxy.server.stored_responses import router as responses_router
from proxy.server.strict_bodies import handle_validation_error
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings, check_exposure, load_settings
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.decisions import DecisionBounds, DecisionStore
from proxy.storage.feedback import FeedbackLimits, FeedbackStore, ObservedProfiles
from proxy.storage.price_feed import PriceFeed
from proxy.storage.price_map import bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry
from proxy.storage.response_store import ResponseStore
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import RoutingSnapshot, SnapshotInputs, SnapshotWatcher, TrafficStats
from proxy.storage.traffic_mix import TrafficMix
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import UsageWriter
from proxy.upstream.client import UpstreamClient
from proxy.upstream.concurrency_limit import ConcurrencyLimiter
from proxy.upstream.health import CooldownReplicator, HealthRegistry, prune_removed_models
from proxy.upstream.provider_resolution import Resolver
from router_core import kernels
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.errors import RouterCoreError
from router_core.estimators import ESTIMATORS

log = logging.getLogger("uniroute")

# Opens the state of an app on entry, and closes it on exit.
Opening = AbstractAsyncContextManager[AppState]

ROUTERS = (
    *(open_router, keyed_router, model_list_router, completions_router, responses_router, embeddings_router),
    feedback_router,
    *(models_router, jobs_router, keys_router, audit_router, decisions_router, reports_router, settings_router),
)

# What asks a model is served before the framework, whose routing and dependencies cost more than model selection.
MODEL_ENDPOINTS = {**ENDPOINTS, EMBEDDINGS: embed}

# Pages for people, which the OpenAPI document leaves out.
PAGE_ROUTERS = (dashboard_views, dashboard_curve, dashboard_quality, dashboard_actions)

# Headers that scripts of allowed web pages may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "x-uniroute-model",
    "x-uniroute-decision",
    "x-uniroute-reason",
    "x-uniroute-overhead-ms",
    "x-uniroute-max-tokens",
    "x-uniroute-left-out",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "retry-after",
)


def create_app(state: AppState) -> FastAPI:
    """Return the app for a state that the caller has opened and will close."""
    return Application(state.settings, Startup(state), traces=state.tracing is not None)


def from_environment(environ: Mapping[str, str] | None = None) -> FastAPI:
    """Return the app with the settings of the environment, for `uvicorn proxy.app:from_environment --factory`."""
    environ = os.environ if environ is None else environ
    handler = configure_logs()
    config = environ.get("UNIROUTE_CONFIG")
    settings = load_settings(Path(config) if config else None, environ)
    if handler is not None:
        handler.setFormatter(formatter_class(settings.log_format)())
    return from_settings(settings, environ)


def from_settings(settings: Settings, environ: Mapping[str, str] | None = None, counts: Path | None = None) -> FastAPI:
    """Return an app whose lifespan opens the state, in the background, and closes it.

    Args:
        environ: where os.environ/NAME is looked up.
        counts: the folder in which several workers share their metrics; None: there is one worker.
    """
    startup, environ = Startup(), os.environ if environ is None else environ
    opening = app_state(settings, environ, startup, counts)
    return Application(settings, startup, opening, traces=is_enabled(environ))


class Application(FastAPI):
    """A FastAPI app inside the middleware of this server, and beside it the endpoints at which models are asked.

    FastAPI's own middleware and routing would cost a chat request, and each event of a stream, more than selecting a
    model does.

    Args:
        opening: opens the state in the lifespan; None if `startup` has one already.
        traces: whether requests are traced.
    """

    def __init__(
        self, settings: Settings, startup: Startup, opening: Opening | None = None, *, traces: bool = False
    ) -> None:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            if opening is None:
                yield
                return
            async with open_in_background(startup, settings, opening, self.dashboard):
                yield

        def current_snapshot() -> RoutingSnapshot:
            assert startup.app_state is not None  # until then RequestIdsMiddleware rejects all requests
            return startup.app_state.snapshots.current

        authenticator = KeyAuthenticator(settings, current_snapshot)
        authorizer = RequestAuthorizer(settings, current_snapshot, authenticator=authenticator)
        self.dashboard = Dashboard(settings, authenticator)
        paths = ServedPaths((*ROUTERS, *PAGE_ROUTERS))
        super().__init__(
            title="UniRoute",
            version=version("uniroute"),
            lifespan=lifespan,
            openapi_url=None,
            generate_unique_id_function=operation_id,
            redirect_slashes=False,
            exception_handlers={
                **dict.fromkeys(HANDLED_EXCEPTIONS, handle_error),
                RequestValidationError: handle_validation_error,
                HTTPException: paths.handle_http_exception,
            },
        )
        self.state.startup = startup
        self.state.dashboard = self.dashboard
        for router in (*ROUTERS, *PAGE_ROUTERS):
            self.include_router(router)

        middleware = [
            Middleware(MessagesMiddleware),
            Middleware(RequestIdsMiddleware, startup=startup),
            *([_cors(settings)] if settings.allowed_origins else []),
            Middleware(AuditLogMiddleware),
            Middleware(AuthMiddleware, authorizer=authorizer),
            Middleware(HeadMiddleware, paths=paths),
        ]
        self.outermost: ASGIApp = super().__call__
        for cls, args, kwargs in reversed(middleware):
            self.outermost = cls(self.outermost, *args, **kwargs)
        endpoints = (TracedEndpoints if traces else ModelEndpoints)(MODEL_ENDPOINTS, startup, authorizer)
        self._models: ASGIApp = endpoints
        # Serves what is asked of models without ASGI; None: pages of other origins need headers that only ASGI adds.
        self.serve_exchange: Callable[[Exchange], Awaitable[None]] | None = endpoints.serve
        if settings.allowed_origins:
            cors = _cors(settings)
            self._models, self.serve_exchange = cors.cls(endpoints, *cors.args, **cors.kwargs), None

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document; the first call generates it."""
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi())
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        if scope["type"] == "http" and (path := path_of(scope)) not in FIXED_PATHS:
            if is_dashboard(path):
                send = with_page_headers(send)
            elif served := corrected_path(path):
                scope["path"] = scope.get("root_path", "") + served  # AuthMiddleware decides on the path that is served
        asks_model = scope["type"] == "http" and scope["method"] == "POST" and path_of(scope) in MODEL_ENDPOINTS
        await (self._models if asks_model else self.outermost)(scope, receive, send)


def _cors(settings: Settings) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED_HEADERS),
    )


def configure_logs() -> NonBlockingHandler | None:
    """Write the server's log lines to stderr, unless logging is configured already. Return the handler."""
    if log.handlers or logging.getLogger().handlers:
        return None
    handler = NonBlockingHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return handler


@asynccontextmanager
async def open_in_background(
    startup: Startup, settings: Settings, opening: Opening, dashboard: Dashboard
) -> AsyncIterator[None]:
    """Open the state in a task of its own, so that the server listens at once; close it at the end.

    If it cannot be opened, log why in one line and end the process with START_FAILED.
    """
    shutdown = asyncio.Event()
    task = asyncio.create_task(_open_until(shutdown, startup, settings, opening, dashboard), name="uniroute-services")
    try:
        yield
    except asyncio.CancelledError:
        pass  # the server was stopped without the shutdown of its lifespan; the state has to be closed all the same
    finally:
        shutdown.set()
        await run_uncancelled(_wait_until_closed(task, startup))


# Logged in one line. Any other failure keeps its traceback.
EXPECTED_FAILURES = (SettingsError, StoreUnavailable, RouterCoreError)


async def _open_until(
    shutdown: asyncio.Event, startup: Startup, settings: Settings, opening: Opening, dashboard: Dashboard
) -> None:
    """Open the state, hand it to `startup`, and close it when `shutdown` is set."""
    try:
        async with (
            opening as state,
            background(
                "uniroute-onboarding", partial(profile_new_models, settings, state.snapshots, state.jobs), restart=False
            ),
            dashboard.activity.running(state.metrics),
        ):
            gc.collect()
            return_freed_memory()
            # The objects that exist now stay: a full collection that visited them all took tenths of a second.
            gc.freeze()
            startup.app_state = state
            try:
                await shutdown.wait()
            finally:
                gc.unfreeze()
    except EXPECTED_FAILURES as failure:
        startup.failure = failure
        log.error("%s", " ".join(str(failure).split()))
    except Exception as error:
        startup.failure = error
        log.exception("the server cannot start" if startup.app_state is None else "the server could not be closed")
    if startup.failure is not None and not shutdown.is_set():
        raise SystemExit(START_FAILED)


async def _wait_until_closed(task: asyncio.Task[None], startup: Startup) -> None:
    """Wait for `task`, and cancel it if it is still opening the state.

    One cancellation may be lost, so it is repeated, but only after a grace period: it also interrupts the closing.
    """
    while not task.done():
        if startup.app_state is None:
            task.cancel()
        await asyncio.wait({task}, timeout=GRACE_PERIOD_S)
    if not task.cancelled():
        task.exception()  # mark it as retrieved: it has been logged


@asynccontextmanager
async def app_state(
    settings: Settings,
    environ: Mapping[str, str],
    startup: Startup | None = None,
    counts: Path | None = None,
) -> AsyncIterator[AppState]:
    """Open everything that requests need, in order, and close it in reverse order.

    Slow imports and loads run in threads, at the same time.

    Args:
        startup: shows which of the steps that may take seconds is running.
        counts: the folder in which several workers share their metrics; None: there is one worker.

    Raises:
        SettingsError: a setting cannot work here: an unreadable map, a server open to others without keys.
        StoreUnavailable: the embedded store cannot run.
    """
    startup = startup or Startup()
    check_data_dir(settings)
    async with AsyncExitStack() as closing:
        upstream = UpstreamClient(settings, environ)
        closing.push_async_callback(upstream.aclose)
        resolver = Resolver(settings.data_dir, environ)
        closing.push_async_callback(resolver.aclose)
        resolving = asyncio.create_task(_configured_models(settings, resolver, startup))
        closing.push_async_callback(cancel_and_wait, resolving)
        cluster_map, assigner = await in_stoppable_thread(partial(_open_routing, settings, startup))
        closing.callback(assigner.close)
        # One prompt is too little to divide: BLAS threads would wait for each other on cores that requests use.
        closing.enter_context(threadpool_limits(1, user_api="blas"))
        with startup.step("starting the store"):
            store = await Store.open(settings)
        closing.push_async_callback(store.close)
        traffic_stats, latch = TrafficStats(cluster_map.size), AuthRequiredLatch(settings.data_dir)
        configured = await resolving
        price_map = await asyncio.to_thread(bundled_price_map)
        observed = ObservedProfiles(store) if settings.feedback == "adapt" else None
        recipe = ESTIMATORS[settings.recipe]
        inputs = SnapshotInputs(cluster_map, configured, price_map, recipe, traffic_stats, observed)
        state = SnapshotWatcher(store, inputs, latch, lambda now: upstream.set_models(now.models))
        with startup.step("reading models"):
            await state.start()
        closing.push_async_callback(state.stop)
        _log_override(settings, state.current)
        if observed is not None:
            reading = partial(observed.run, lambda: state.current.profiles)
            await closing.enter_async_context(background("uniroute-feedback", reading))
        check_exposure(settings, keys_required=state.current.keys_required)
        check_named_models(settings, state.current.models, _is_priced, complete=state.available)
        metrics = Metrics(open_values(counts))
        concurrency_limiter = _concurrency_limiter(state, metrics)
        health = await closing.enter_async_context(_health_registry(settings, store, state, metrics))
        journals = JournalDirectory(settings.data_dir / "usage", settings.usage_journal_max_bytes)
        usage = UsageWriter(
            store,
            journals,
            metrics.usage_dropped.inc,
            settle_function=SETTLE_FUNCTION,
            decisions=_decision_bounds(settings),
            on_skipped=metrics.decisions_skipped.inc,
        )
        await closing.enter_async_context(_running(usage))
        traffic_mix = TrafficMix(store, cluster_map, metrics.novel_prompts.inc)
        await closing.enter_async_context(_running(traffic_mix))
        metrics.on_refresh(traffic_mix.count)
        sessions = SessionStore(
            store,
            settings.session_ttl_s,
            on_missed=metrics.conversations_missed.inc,
            on_dropped=metrics.conversations_dropped.inc,
        )
        await closing.enter_async_context(_running(sessions))
        responses = ResponseStore(
            store,
            settings.response_ttl_s,
            max_responses_per_key=settings.max_responses_per_key,
            max_response_bytes=settings.max_response_bytes,
            max_stored_bytes_per_key=settings.max_stored_bytes_per_key,
            on_dropped=metrics.responses_dropped.inc,
        )
        limiter = RateLimiter(
            store,
            metrics,
            open_without_store=settings.limits_without_store == "allow",
            timeout_s=settings.limits_timeout_s,
        )
        closing.push_async_callback(limiter.close)
        registry = Registry(store, configured, latch)
        with startup.step("loading the embedder"):
            await assigner.warm(cluster_map)
        with startup.step("importing litellm"):
            await upstream.warm_up()
        feed = PriceFeed(settings, store, registry, state)
        await closing.enter_async_context(background("uniroute-prices", feed.run))
        jobs = Jobs(store, state, UpstreamModelClient(upstream), assigner.embedder, settings)
        closing.push_async_callback(jobs.close)
        jobs.start_worker()
        feedback = FeedbackStore(store, _feedback_limits(settings))
        if settings.feedback != "off":
            watch = QualityWatch(feedback, state, metrics.values)
            metrics.register(watch)
            await closing.enter_async_context(background("uniroute-quality", watch.run))
        metrics.on_refresh(lambda: _update_gauges(settings, metrics, state, usage, jobs))
        tracing = await closing.enter_async_context(open_telemetry(settings, environ, metrics))
        if counts is not None:
            await closing.enter_async_context(background("uniroute-metrics", partial(_update_metrics, metrics)))
        yield AppState(
            settings=settings,
            store=store,
            snapshots=state,
            registry=registry,
            jobs=jobs,
            assigner=assigner,
            upstream=upstream,
            usage=usage,
            rate_limiter=limiter,
            metrics=metrics,
            traffic_stats=traffic_stats,
            traffic_mix=traffic_mix,
            health=health,
            concurrency_limiter=concurrency_limiter,
            sessions=sessions,
            responses=responses,
            decisions=DecisionStore(store, settings.decision_ttl_s),
            feedback=feedback,
            resolver=resolver,
            environ=environ,
            tracing=tracing,
        )


async def _configured_models(settings: Settings, resolver: Resolver, startup: Startup) -> dict[str, ModelRecord]:
    """Return the models of the configuration by name, with their providers resolved."""
    now = time.time()
    records = [ModelRecord.of_entry(entry, "config", now) for entry in settings.model_list]
    with startup.step("resolving providers", "models", len(records)):
        return {record.name: record for record in await resolver.resolve_all(records)}


def _open_routing(
    settings: Settings, startup: Startup | None = None, stop: threading.Event | None = None
) -> tuple[ClusterMap, ClusterAssigner]:
    """Load the cluster map and the embedder that it was fitted with, for the kernels that the settings allow.

    Raises:
        SettingsError: one of them cannot be loaded, or they do not belong together.
    """
    kernels.use(None if settings.compiled else kernels.NUMPY)
    log.info("routing kernels: %s", kernels.current().name)
    try:
        cluster_map = load_cluster_map(settings)
        with (startup or Startup()).step("opening the embedding table", "tokens") as step:
            embedder = open_embedder(
                settings.embedder, settings.data_dir, log.info, partial(_show_distilling, step), stop
            )
    except (RouterCoreError, OSError) as error:
        raise settings.refusal(f"map, embedder: {error}") from error
    if embedder.id != cluster_map.embedder_id:
        raise settings.refusal(
            f"embedder: {settings.embedder!r} ({embedder.id}) is not what the map was fitted with"
            f" ({cluster_map.embedder_id}); choose that one, or fit a map with this one"
        )
    return cluster_map, ClusterAssigner(embedder, deadline_of(settings.embedder))


def _show_distilling(step: Step, done: int, total: int) -> None:
    """Show the progress of distilling, be it in this process or in another that this one waits for."""
    step.what = "distilling the embedding table"
    step.update(done, total)


def _is_priced(name: str) -> bool:
    return bundled_price_map().find(name) is not None


class _Service(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


Service = TypeVar("Service", bound=_Service)


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[Service]:
    service.start()
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def _health_registry(
    settings: Settings, store: Store, state: SnapshotWatcher, metrics: Metrics
) -> AsyncIterator[HealthRegistry]:
    """Open the health of all models: show it in the metrics, share it with other processes, and prune it."""
    health = HealthRegistry(settings.breaker)
    collector = HealthCollector(health, lambda: state.current.registered, metrics.values)
    metrics.register(collector)
    replicator = CooldownReplicator(store, health, lambda: state.current.models)
    pruning = partial(prune_removed_models, health, lambda: state.current.models)
    async with background("uniroute-pruning", pruning), _running(replicator):
        yield health


def _concurrency_limiter(state: SnapshotWatcher, metrics: Metrics) -> ConcurrencyLimiter:
    """Make the limiter of all models, and show in the metrics how busy they are."""
    limiter = ConcurrencyLimiter(
        on_wait=lambda model, seconds: metrics.queue_seconds.observe(seconds, (model,)),
        on_full=lambda model: metrics.at_capacity.add((model,)),
    )
    collector = ModelCollector(lambda: state.current, limiter, metrics.values)
    metrics.register(collector)
    return limiter


METRICS_INTERVAL_S = 1.0


async def _update_metrics(metrics: Metrics) -> None:
    """Update this worker's gauges now and then, for scrapes that another worker answers."""
    while True:
        metrics.refresh()
        await asyncio.sleep(METRICS_INTERVAL_S)


def _log_override(settings: Settings, snapshot: RoutingSnapshot) -> None:
    """Say at the start why the λ of the configuration is not in force."""
    if (override := snapshot.lambda_override) is not None:
        log.info(
            "λ is %g, set by %s at %s; the %g of the configuration holds again after DELETE /admin/settings",
            *(override.value, override.who, override.since, settings.lambda_),
        )


def _decision_bounds(settings: Settings) -> DecisionBounds | None:
    if not settings.decision_ttl_s or not settings.max_decisions:
        return None
    return DecisionBounds(
        settings.decision_ttl_s, settings.max_decisions, settings.max_decision_bytes, settings.max_decisions_per_s
    )


def _feedback_limits(settings: Settings) -> FeedbackLimits:
    return FeedbackLimits(
        half_life_s=settings.feedback_half_life_s,
        labels_per_key=settings.feedback_labels_per_key,
        calls_per_minute=settings.feedback_per_minute,
        ttl_s=max(settings.decision_ttl_s, 1),
    )


def _update_gauges(
    settings: Settings, metrics: Metrics, state: SnapshotWatcher, usage: UsageWriter, jobs: Jobs
) -> None:
    metrics.tasks.set(len(asyncio.all_tasks()))
    metrics.state_version.set(state.current.version)
    metrics.store_available.set(state.available)
    metrics.usage_journal.set(usage.journal_bytes)
    metrics.jobs_running.set(jobs.worker.running)
    metrics.default_lambda.set(state.current.default_lambda(settings))
