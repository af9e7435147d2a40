from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from proxy.concurrency import DeadlineWheel
from proxy.profiling.jobs import Jobs
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest
from proxy.server.api.client_apis import CHAT
from proxy.server.api.translation import Translation
from proxy.server.auth import KEY_IN_SCOPE, PRINCIPAL
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import RateLimiter
from proxy.server.reports import Reports
from proxy.server.requests import APP_STATE, REQUEST_IDS, RequestIds, instance_id
from proxy.settings.schema import Settings, Timeouts, timeouts_for
from proxy.storage.audit_log import Actor, AuditTrail
from proxy.storage.client_keys import ClientKey
from proxy.storage.decisions import AttemptRecord, DecisionStore
from proxy.storage.feedback import FeedbackStore
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.response_store import ResponseStore
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import RoutingSnapshot, SnapshotWatcher, TrafficStats
from proxy.storage.traffic_mix import TrafficMix
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_writer import UsageWriter
from proxy.upstream.client import UpstreamClient
from proxy.upstream.concurrency_limit import ConcurrencyLimiter, ConcurrencyLimits
from proxy.upstream.health import HealthRegistry
from proxy.upstream.payload import JSONPayload
from proxy.upstream.provider_resolution import Resolver
from router_core.types import frozen


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What an attempt needs to know of a model, worked out once per record."""

    record: ModelRecord
    timeouts: Timeouts
    limits: ConcurrencyLimits


class RequestTrace(Protocol):
    """What traces are told of a request, by its record and its attempts. It is there only if requests are traced."""

    @property
    def ids(self) -> tuple[str, str] | None:
        """The ids of the trace and of the request's span, in hexadecimal."""

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are sent."""

    def start_attempt(self, ctx: RequestContext, model: str) -> None: ...

    def headers(self) -> dict[str, str]:
        """Return the headers with which an upstream continues the trace."""

    def event(self, name: str) -> None: ...

    def observe(self, payload: JSONPayload) -> None:
        """Read what a completion, or a chunk, says of itself."""

    def end_attempt(
        self, entry: UsageRecord, attempt: AttemptRecord, first_content_at: float | None, fault: str | None
    ) -> None: ...

    def finish(
        self, ctx: RequestContext, model: str, entry: UsageRecord, facts: Callable[[], Mapping[str, Any]]
    ) -> None: ...


@dataclass(frozen=True)
class AppState:
    """Everything that endpoints need, opened at the start of the process and closed at its end."""

    settings: Settings
    store: Store
    snapshots: SnapshotWatcher
    registry: Registry
    jobs: Jobs
    assigner: ClusterAssigner
    upstream: UpstreamClient
    usage: UsageWriter
    rate_limiter: RateLimiter
    metrics: Metrics
    traffic_stats: TrafficStats
    traffic_mix: TrafficMix
    health: HealthRegistry
    concurrency_limiter: ConcurrencyLimiter
    sessions: SessionStore
    responses: ResponseStore
    decisions: DecisionStore
    feedback: FeedbackStore
    resolver: Resolver
    environ: Mapping[str, str] = field(repr=False)
    tracing: Any = None
    """What begins the traces of requests; None: they are not traced."""
    deadlines: DeadlineWheel = field(default_factory=DeadlineWheel, repr=False)
    plans: dict[str, ModelPlan] = field(default_factory=dict, repr=False)
    """By model; one is out of date once the model has another record."""
    reports: Reports = field(default_factory=Reports, repr=False)

    @cached_property
    def instance(self) -> str:
        """The name by which requests that come back to this server are recognised."""
        return instance_id(str(self.settings.data_dir))

    def plan_of(self, record: ModelRecord) -> ModelPlan:
        """Return a model's plan, worked out once for all attempts of this record."""
        plan = self.plans.get(record.name)
        if plan is not None and plan.record is record:
            return plan
        if len(self.plans) > 2 * len(self.snapshots.current.models):  # most of them are of models that were removed
            self.plans.clear()
        plan = ModelPlan(record, timeouts_for(self.settings, record.info), ConcurrencyLimits.of(record.info))
        self.plans[record.name] = plan
        return plan


@frozen
class RequestContext:
    """One chat request, and what it is served with. The endpoint builds it, once."""

    app: AppState
    snapshot: RoutingSnapshot
    request: ChatRequest
    key: ClientKey | None
    ids: RequestIds
    received_at: float
    """Monotonic seconds."""
    translation: Translation | None = None
    """None: the client speaks the chat API."""
    native_headers: tuple[tuple[str, str], ...] = ()
    """Headers of the client that go to an upstream of the client's own API alone."""
    api: str = CHAT.name
    """The API that the client speaks."""
    trace: RequestTrace | None = None
    """None: the request is not traced."""


async def app_state_of(request: Request) -> AppState:
    app_state: AppState = request.scope[APP_STATE]
    return app_state


async def key_of(request: Request) -> ClientKey | None:
    key: ClientKey | None = request.scope[KEY_IN_SCOPE]
    return key


AppStateDep = Annotated[AppState, Depends(app_state_of)]

CurrentKey = Annotated[ClientKey | None, Depends(key_of)]


async def actor_of(request: Request) -> Actor:
    return Actor(request.scope[PRINCIPAL], request.scope[REQUEST_IDS].request_id)


CurrentActor = Annotated[Actor, Depends(actor_of)]


async def admin_state_of(app: AppStateDep, actor: CurrentActor) -> AppState:
    """Return the app's state with a registry whose writes are logged as this actor's."""
    return replace(app, registry=app.registry.as_actor(actor))


async def audit_of(app: AppStateDep, actor: CurrentActor) -> AuditTrail:
    return AuditTrail(app.store, actor)


AdminState = Annotated[AppState, Depends(admin_state_of)]

Audit = Annotated[AuditTrail, Depends(audit_of)]
