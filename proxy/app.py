from __future__ import annotations

import asyncio
import contextlib
import difflib
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from proxy.concurrency import GRACE_PERIOD_S, background, cancel_and_wait, in_stoppable_thread, run_uncancelled
from proxy.errors import error_object
from proxy.outbound import OutboundError, ssl_context, trust_of
from proxy.profiling.jobs import Jobs
from proxy.profiling.model_client import UpstreamModelClient
from proxy.routing.assigner import ClusterAssigner, deadline_of
from proxy.safety.private_files import NotPrivate, private_folder
from proxy.safety.redaction import is_reference
from proxy.server.admin import audit_router, jobs_router, keys_router, models_router
from proxy.server.auth import AuthMiddleware, path_of
from proxy.server.completions import ChatCompletionsEndpoint
from proxy.server.completions import router as completions_router
from proxy.server.dependencies import AppState, ServicesHolder
from proxy.server.log_handler import NonBlockingHandler
from proxy.server.metrics import HealthCollector, Metrics, open_values
from proxy.server.middleware import REQUEST_IDS, AuditLogMiddleware, RequestContextMiddleware
from proxy.server.paths import PLAIN_PATHS, meant_path, unknown_path
from proxy.server.public import router as public_router
from proxy.server.ratelimit import RateLimiter
from proxy.server.reservations import SETTLE_FUNCTION
from proxy.server.responses import HANDLED_EXCEPTIONS, error_response, http_error_body
from proxy.server.startup import Startup, Step
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings, check_exposure, load_settings
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.models import ModelRecord
from proxy.storage.price_feed import PriceFeed
from proxy.storage.price_map import bundled_catalog
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable, retry_until_available
from proxy.storage.registry import Registry
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import SnapshotInputs, SnapshotWatcher
from proxy.storage.traffic_stats import TrafficStats
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import UsageWriter
from proxy.upstream.client import UpstreamClient
from proxy.upstream.concurrency_limit import ConcurrencyLimiter
from proxy.upstream.health import CooldownReplicator, HealthRegistry, Roster
from proxy.upstream.provider_resolution import Resolver
from router_core.artifact import builtin_map, load_map
from router_core.clustering import ClusterMap
from router_core.embedding import check_embedder, open_embedder
from router_core.errors import InvalidInput, RouterCoreError
from router_core.estimators import RECIPES
from router_core.validation.loading import load_validation_set

if TYPE_CHECKING:
    from proxy.server.dependencies import AppState


def load_cluster_map(settings: Settings) -> ClusterMap:
    """The map of `settings.map`, assigned as `settings.recipe` counts: a hard recipe puts a prompt in one cluster.

    Raises:
        RouterCoreError, OSError: the map cannot be read.
    """
    chosen = builtin_map() if settings.map == "builtin" else load_map(Path(settings.map))
    return chosen.hardened() if RECIPES[settings.recipe].hard else chosen


settings_log = logging.getLogger("uniroute.settings")


def validate_files(settings: Settings) -> None:
    """Raises SettingsError naming the setting whose file is missing or broken, with the line of a validation set."""
    check_data_dir(settings)
    try:
        load_cluster_map(settings)
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"map: {error}") from error
    try:
        check_embedder(settings.embedder)
    except InvalidInput as error:
        raise SettingsError(f"embedder: {error}") from error
    try:
        if settings.validation_set != "builtin":
            load_validation_set(Path(settings.validation_set))
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"validation_set: {error}") from error
    for number, entry in enumerate(settings.model_list):
        stated = entry.litellm_params.get("ssl_verify")
        try:
            if stated is not None and not is_reference(stated):
                ssl_context(trust_of(stated, os.environ), os.environ)
        except OutboundError as error:
            raise SettingsError(f"model_list[{number}].litellm_params.ssl_verify: {error}") from None


def check_data_dir(settings: Settings) -> None:
    """Close the data folder to other users. Raises SettingsError where that cannot be done."""
    try:
        private_folder(settings.data_dir)
    except NotPrivate as error:
        raise SettingsError(f"data_dir: {error}") from error


def check_named_models(
    settings: Settings, served: Collection[str], is_priced: Callable[[str], bool], *, complete: bool
) -> None:
    """Check that the models which settings name are there, or can come.

    Args:
        served: names of the configured and the stored models.
        is_priced: whether LiteLLM's price map knows a name.
        complete: whether the store could be read; else a model may be there that nobody has seen yet.

    Raises:
        SettingsError: a name is a slip of another, or nobody could ever add a model of this name.
    """
    judge, default = settings.judge_model, settings.default_model
    if judge is not None and "/" not in judge and judge not in served and not is_priced(judge) and complete:
        near = _near(judge, served)
        raise SettingsError(f"judge_model: {judge!r} is no registered model and no name of LiteLLM's{near}")
    if default is None or default in served:
        return
    near = _near(default, served)
    if complete and (near or settings.admin_key is None):
        raise SettingsError(f"default_model: no model is named {default!r}{near or _known(served)}")
    settings_log.warning("default_model: no model is named %r yet; until one is added nothing stands in", default)


def _near(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f"; did you mean {found[0]!r}?" if found else ""


def _known(names: Collection[str]) -> str:
    return f"; known models: {', '.join(sorted(names)[:20])}" if names else "; no model is configured"


log = logging.getLogger("uniroute")


@asynccontextmanager
async def app_state(
    settings: Settings,
    environ: Mapping[str, str],
    startup: Startup | None = None,
    counts: Path | None = None,
) -> AsyncIterator[AppState]:
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
        upstream = UpstreamClient(settings, environ)
        closing.push_async_callback(upstream.aclose)
        resolver = Resolver(settings.data_dir, environ)
        closing.push_async_callback(resolver.aclose)
        resolving = asyncio.create_task(_configured(settings, resolver, startup))
        closing.push_async_callback(cancel_and_wait, resolving)
        cluster_map, assigner = await in_stoppable_thread(partial(_open_routing, settings, startup))
        closing.callback(assigner.close)
        # one prompt is too little to share out: the threads would wait for one another, on cores that others work on
        closing.enter_context(threadpool_limits(1, user_api="blas"))
        with startup.step("starting the store"):
            store = await Store.open(settings)
        closing.push_async_callback(store.close)
        live, latch = TrafficStats(cluster_map.size), AuthRequiredLatch(settings.data_dir)
        around = await _surroundings(settings, cluster_map, live, await resolving)
        state = SnapshotWatcher(store, around, latch, lambda now: upstream.serve(now.models))
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
        feed = PriceFeed(settings, store, registry, state)
        await closing.enter_async_context(background("uniroute-prices", feed.run))
        jobs = Jobs(store, state, UpstreamModelClient(upstream), assigner.embedder, settings)
        closing.push_async_callback(jobs.close)
        await jobs.start_worker()
        metrics.look_at(lambda: _look(metrics, state, usage))
        if counts is not None:
            await closing.enter_async_context(background("uniroute-metrics", partial(_look_again, metrics)))
        yield AppState(
            *(settings, store, state, registry, jobs, assigner, upstream, usage, limiter, metrics, live, health),
            capacities=ConcurrencyLimiter(),
            conversations=conversations,
            resolver=resolver,
            environ=environ,
        )


POLL_INTERVAL_S = 1.0

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
        await run_uncancelled(_ended(task, lambda: holder.is_open))


async def _ended(task: asyncio.Task[None], is_open: Callable[[], bool]) -> None:
    """A start is cancelled, and seldom: what it has opened so far is closed then, and each time interrupts that."""
    while not task.done():
        if not is_open():
            task.cancel()
        await asyncio.wait({task}, timeout=GRACE_PERIOD_S)
    if not task.cancelled():
        task.exception()  # said already


async def _hold_open(
    holder: ServicesHolder, settings: Settings, environ: Mapping[str, str], ending: asyncio.Event
) -> None:
    try:
        async with app_state(settings, environ, holder.startup, holder.counts) as services, onboarding(services):
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


def _look(metrics: Metrics, state: SnapshotWatcher, usage: UsageWriter) -> None:
    metrics.tasks.set(len(asyncio.all_tasks()))
    metrics.state_version.set(state.current.version)
    metrics.store_available.set(state.available)
    metrics.usage_journal.set(usage.journal_bytes)


async def _look_again(metrics: Metrics) -> None:
    """For the worker that is scraped next, which may be another."""
    while True:
        metrics.look()
        await asyncio.sleep(POLL_INTERVAL_S)


def _recorder(store: Store, settings: Settings, metrics: Metrics) -> UsageWriter:
    journals = JournalDirectory(settings.data_dir / "usage", settings.usage_journal_max_bytes)
    return UsageWriter(store, journals, metrics.usage_dropped.inc, settle_function=SETTLE_FUNCTION)


def _limiter(store: Store, settings: Settings, metrics: Metrics) -> RateLimiter:
    return RateLimiter(
        store,
        metrics,
        open_without_store=settings.limits_without_store == "allow",
        timeout_s=settings.limits_timeout_s,
    )


@asynccontextmanager
async def _watched_health(
    settings: Settings, store: Store, state: SnapshotWatcher, metrics: Metrics
) -> AsyncIterator[HealthRegistry]:
    """The health of the models, shown, shared with other processes, and forgotten with the models."""
    health = HealthRegistry(settings.breaker)
    collector = HealthCollector(health, lambda: state.current.models, metrics.values)
    metrics.look_at(collector.look)
    metrics.registry.register(collector)
    roster = Roster(health, lambda: state.current.models)
    replicator = CooldownReplicator(store, health, lambda: state.current.models)
    async with background("uniroute-roster", roster.run), _running(replicator):
        yield health


def _open_routing(
    settings: Settings, startup: Startup | None = None, stop: threading.Event | None = None
) -> tuple[ClusterMap, ClusterAssigner]:
    try:
        cluster_map = load_cluster_map(settings)
        with (startup or Startup()).step("opening the embedding table", "tokens") as step:
            embedder = open_embedder(settings.embedder, settings.data_dir, log.info, partial(_distilled, step), stop)
    except (RouterCoreError, OSError) as error:
        raise SettingsError(f"map, embedder: {error}") from error
    if embedder.id != cluster_map.embedder_id:
        raise SettingsError(
            f"embedder: {settings.embedder!r} ({embedder.id}) is not what the map was fitted with"
            f" ({cluster_map.embedder_id}); choose that one, or fit a map with this one"
        )
    return cluster_map, ClusterAssigner(embedder, deadline_of(settings.embedder))


def _distilled(step: Step, done: int, total: int) -> None:
    """By this process or another, which this one waits for."""
    step.what = "distilling the embedding table"
    step.update(done, total)


def _conversations(store: Store, settings: Settings, metrics: Metrics) -> SessionStore:
    return SessionStore(
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
    settings: Settings, cluster_map: ClusterMap, live: TrafficStats, configured: Mapping[str, ModelRecord]
) -> SnapshotInputs:
    catalog = await asyncio.to_thread(bundled_catalog)
    return SnapshotInputs(cluster_map, configured, catalog, RECIPES[settings.recipe], live)


onboarding_log = logging.getLogger("uniroute.onboarding")


@contextlib.asynccontextmanager
async def onboarding(services: AppState) -> AsyncIterator[None]:
    """Runs beside the serving, so that other models answer meanwhile."""
    async with background("uniroute-onboarding", partial(profile_new_models, services), restart=False):
        yield


async def profile_new_models(services: AppState) -> None:
    """One job a model, however many processes ask for it. Waits for a store that is away."""
    for model in services.settings.model_list if services.settings.profile.on_start else ():
        try:
            await retry_until_available(partial(_submit, services, model.model_name))
        except StoreUnreadable as error:
            onboarding_log.error("model %s is not measured: %s", model.model_name, error)


async def _submit(services: AppState, name: str) -> None:
    await services.state.refresh()
    state = services.state.current
    asking = services.settings.profile
    if name in state.profiles or await services.jobs.migrate_profile(name):
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


edge_log = logging.getLogger("uniroute.edge")

ROUTERS = (
    *(public_router, completions_router),
    *(models_router, jobs_router, keys_router, audit_router),
)

EXPOSED = (
    *("x-request-id", "x-uniroute-model", "x-uniroute-decision", "x-uniroute-reason", "x-uniroute-overhead-ms"),
    "x-uniroute-max-tokens",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    "retry-after",
)


def create_app(services: AppState) -> FastAPI:
    """Over services that somebody else opened and will close."""
    return _build(services.settings, ServicesHolder(services))


def from_environment(environ: Mapping[str, str] | None = None) -> FastAPI:
    """For `uvicorn proxy.app:from_environment --factory`: settings now, services with the app's lifespan."""
    environ = os.environ if environ is None else environ
    configure_logs()
    config = environ.get("UNIROUTE_CONFIG")
    return from_settings(load_settings(Path(config) if config else None, environ), environ)


def from_settings(settings: Settings, environ: Mapping[str, str] | None = None, counts: Path | None = None) -> FastAPI:
    """Services are opened beside the serving, once the server has started it. What was never measured is measured.

    Args:
        environ: where os.environ/NAME is looked up.
        counts: the folder in which several workers count.
    """
    return _build(settings, ServicesHolder(counts=counts), os.environ if environ is None else environ)


def _build(settings: Settings, holder: ServicesHolder, environ: Mapping[str, str] | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if holder.is_open:
            yield
            return
        async with opened_beside(holder, settings, environ or {}):
            yield

    app = Layered(
        title="UniRoute",
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            **dict.fromkeys(HANDLED_EXCEPTIONS, _told),
            HTTPException: _plain,
        },
    )
    app.state.holder = holder
    app.outermost = _layers(app.framework, settings, holder)
    for router in ROUTERS:
        app.include_router(router)
    return app


class Layered(FastAPI):
    """The framework within our own layers, not around them: its outermost ones cost a chat request, and every event of
    a stream, more than routing does."""

    outermost: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := path_of(scope)) not in PLAIN_PATHS and (meant := meant_path(path)):
            scope["path"] = scope.get("root_path", "") + meant  # before the guard: it decides on what is served
        await (self.framework if scope["type"] == "lifespan" else self.outermost)(scope, receive, send)

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in _methods(path_of(scope)):
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        await super().__call__(scope, receive, send)


def _layers(framework: ASGIApp, settings: Settings, holder: ServicesHolder) -> ASGIApp:
    direct = ChatCompletionsEndpoint(framework, holder=holder)
    guarded = AuditLogMiddleware(AuthMiddleware(direct, settings=settings, state=lambda: holder.services.state.current))
    pages = settings.allowed_origins
    if not pages:
        return RequestContextMiddleware(guarded, holder=holder)
    cors = CORSMiddleware(
        guarded,
        allow_origins=list(pages),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED),
    )
    return RequestContextMiddleware(cors, holder=holder)


async def _told(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _plain(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    method, path = request.scope["method"], path_of(request.scope)
    if error.status_code == 404:
        told = unknown_path(method, path)
        edge_log.info("request=%s status=404: %s", request.scope[REQUEST_IDS].request_id, told)
        return JSONResponse(error_object(told, "invalid_request_error", "unknown_path"), 404)
    if error.status_code == 405:
        allowed = ", ".join(sorted(_methods(path)))
        told = f"{method[:20]} is not served at {path[:200]}; {allowed} is"
        return JSONResponse(http_error_body(405, told), 405, {"allow": allowed})
    return JSONResponse(http_error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


def _methods(path: str) -> set[str]:
    """Of all routes of this path, the longest where some hold others; the framework names one route's."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    found = [route for route in routes if route.path_regex.match(path)]
    best = max((route.path for route in found), key=len, default="")
    methods = {method for route in found if route.path == best for method in route.methods or ()}
    return methods | {"HEAD"} if "GET" in methods else methods


def configure_logs() -> None:
    """Lines of ours to stderr, once, unless somebody has arranged for them."""
    ours = logging.getLogger("uniroute")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.addHandler(NonBlockingHandler())
        ours.setLevel(logging.INFO)
