from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from proxy.profiling.jobs import Jobs
from proxy.routing.assigner import Assigner
from proxy.routing.chat_request import parse_object
from proxy.server.auth import KEY_IN_SCOPE, WHO_IN_SCOPE
from proxy.server.metrics import Metrics
from proxy.server.middleware import ARRIVED, TRACE
from proxy.server.ratelimit import Limiter
from proxy.server.requests import Trace, read_body
from proxy.server.startup import Startup
from proxy.settings.schema import Settings
from proxy.storage.audit_log import AuditTrail, Author
from proxy.storage.client_keys import ClientKey
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.sessions import Conversations
from proxy.storage.snapshot import StateHolder
from proxy.storage.traffic_stats import LiveExpectations
from proxy.storage.usage_writer import UsageRecorder
from proxy.upstream.client import Upstream
from proxy.upstream.concurrency_limit import Capacities
from proxy.upstream.health import ModelHealth
from proxy.upstream.provider_resolution import Resolver

log = logging.getLogger("uniroute")


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: Store
    state: StateHolder
    registry: Registry
    jobs: Jobs
    assigner: Assigner
    upstream: Upstream
    usage: UsageRecorder
    limiter: Limiter
    metrics: Metrics
    live: LiveExpectations
    health: ModelHealth
    capacities: Capacities
    conversations: Conversations
    resolver: Resolver
    environ: Mapping[str, str] = field(repr=False)


class ServicesHolder:
    """Where an app finds its services once they are open."""

    def __init__(self, services: Services | None = None, counts: Path | None = None) -> None:
        """`counts`: the folder in which several workers count."""
        self._services = services
        self.counts = counts
        self.startup = Startup()

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


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.holder.services
    return services


async def key_of(request: Request) -> ClientKey | None:
    key: ClientKey | None = request.scope[KEY_IN_SCOPE]
    return key


OurServices = Annotated[Services, Depends(services_of)]

Caller = Annotated[ClientKey | None, Depends(key_of)]


async def author_of(request: Request) -> Author:
    return Author(request.scope[WHO_IN_SCOPE], trace_of(request).request_id)


Writing = Annotated[Author, Depends(author_of)]


async def admin_services_of(services: OurServices, author: Writing) -> Services:
    """Whatever is written to this registry has an audit line."""
    return replace(services, registry=services.registry.by(author))


async def audit_of(services: OurServices, author: Writing) -> AuditTrail:
    return AuditTrail(services.store, author)


AdminServices = Annotated[Services, Depends(admin_services_of)]

Audit = Annotated[AuditTrail, Depends(audit_of)]


def trace_of(request: Request) -> Trace:
    trace: Trace = request.scope[TRACE]
    return trace


def arrived_at(request: Request) -> float:
    return float(request.scope[ARRIVED])


async def json_object(request: Request, services: Services) -> dict[str, Any]:
    """Raises BadRequest, NotJson, BodyTooLarge."""
    return parse_object(await read_body(request, services.settings.max_body_bytes))


async def json_object_or_nothing(request: Request, services: Services) -> dict[str, Any]:
    """No body at all is an empty object."""
    raw = await read_body(request, services.settings.max_body_bytes)
    return parse_object(raw) if raw else {}
