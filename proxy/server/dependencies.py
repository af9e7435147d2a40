from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from proxy.profiling.jobs import Jobs
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import parse_object
from proxy.server.auth import KEY_IN_SCOPE, PRINCIPAL
from proxy.server.metrics import Metrics
from proxy.server.middleware import RECEIVED_AT, REQUEST_IDS
from proxy.server.ratelimit import RateLimiter
from proxy.server.requests import RequestIds, read_body
from proxy.server.startup import Startup
from proxy.settings.schema import Settings
from proxy.storage.audit_log import Actor, AuditTrail
from proxy.storage.client_keys import ClientKey
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import SnapshotWatcher
from proxy.storage.traffic_stats import TrafficStats
from proxy.storage.usage_writer import UsageWriter
from proxy.upstream.client import UpstreamClient
from proxy.upstream.concurrency_limit import ConcurrencyLimiter
from proxy.upstream.health import HealthRegistry
from proxy.upstream.provider_resolution import Resolver

log = logging.getLogger("uniroute")


@dataclass(frozen=True)
class AppState:
    settings: Settings
    store: Store
    state: SnapshotWatcher
    registry: Registry
    jobs: Jobs
    assigner: ClusterAssigner
    upstream: UpstreamClient
    usage: UsageWriter
    limiter: RateLimiter
    metrics: Metrics
    live: TrafficStats
    health: HealthRegistry
    capacities: ConcurrencyLimiter
    conversations: SessionStore
    resolver: Resolver
    environ: Mapping[str, str] = field(repr=False)


class ServicesHolder:
    """Where an app finds its services once they are open."""

    def __init__(self, services: AppState | None = None, counts: Path | None = None) -> None:
        """`counts`: the folder in which several workers count."""
        self._services = services
        self.counts = counts
        self.startup = Startup()

    @property
    def is_open(self) -> bool:
        return self._services is not None

    @property
    def services(self) -> AppState:
        if self._services is None:
            raise RuntimeError("the services are not open yet")
        return self._services

    def open(self, services: AppState) -> None:
        self._services = services


async def services_of(request: Request) -> AppState:
    services: AppState = request.app.state.holder.services
    return services


async def key_of(request: Request) -> ClientKey | None:
    key: ClientKey | None = request.scope[KEY_IN_SCOPE]
    return key


AppStateDep = Annotated[AppState, Depends(services_of)]

CurrentKey = Annotated[ClientKey | None, Depends(key_of)]


async def actor_of(request: Request) -> Actor:
    return Actor(request.scope[PRINCIPAL], trace_of(request).request_id)


CurrentActor = Annotated[Actor, Depends(actor_of)]


async def admin_services_of(services: AppStateDep, author: CurrentActor) -> AppState:
    """Whatever is written to this registry has an audit line."""
    return replace(services, registry=services.registry.as_actor(author))


async def audit_of(services: AppStateDep, author: CurrentActor) -> AuditTrail:
    return AuditTrail(services.store, author)


AdminState = Annotated[AppState, Depends(admin_services_of)]

Audit = Annotated[AuditTrail, Depends(audit_of)]


def trace_of(request: Request) -> RequestIds:
    trace: RequestIds = request.scope[REQUEST_IDS]
    return trace


def received_at(request: Request) -> float:
    return float(request.scope[RECEIVED_AT])


async def json_object(request: Request, services: AppState) -> dict[str, Any]:
    """Raises BadRequest, NotJson, BodyTooLarge."""
    return parse_object(await read_body(request, services.settings.max_body_bytes))


async def json_object_or_nothing(request: Request, services: AppState) -> dict[str, Any]:
    """No body at all is an empty object."""
    raw = await read_body(request, services.settings.max_body_bytes)
    return parse_object(raw) if raw else {}
