"""The collaborators of one process, and where an app finds them. How they are opened is opening."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proxy.jobs.jobs import Jobs
from proxy.limits.limiter import Limiter
from proxy.recording.metrics import Metrics
from proxy.routing.assigner import Assigner
from proxy.settings.schema import Settings
from proxy.startup import Startup
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
