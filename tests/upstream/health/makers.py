"""A clock that the test moves, failures as upstreams cause them, and the health that one process shares."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from proxy.concurrency import log as background_log
from proxy.errors import UpstreamError
from proxy.settings.schema import CircuitBreakerSettings
from proxy.storage.redis import Store
from proxy.upstream.circuit_breaker import CircuitBreaker, Permit
from proxy.upstream.health import CooldownReplicator, HealthRegistry


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def a_failure(status: int | None = 500, body: bytes | None = b"", **more: Any) -> UpstreamError:
    return UpstreamError("the upstream's own words, sk-canary", status=status, body=body, **more)


def fail(health: HealthRegistry, model: str = "small", times: int = 5, status: int | None = 500, **more: Any) -> None:
    for _ in range(times):
        health.start_attempt(model).failed(a_failure(status, **more))


def started(breaker: CircuitBreaker, now: float) -> Permit:
    """Start an attempt."""
    permit = Permit()
    breaker.start(permit, now)
    return permit


@asynccontextmanager
async def a_replicator(
    store: Store, health: HealthRegistry | None = None, known: Collection[str] = ("small", "large")
) -> AsyncIterator[HealthRegistry]:
    """Run one more process's replicator, and yield what it knows."""
    health = health or HealthRegistry(CircuitBreakerSettings())
    replicator = CooldownReplicator(store, health, lambda: known)
    failures: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = failures.append  # type: ignore[method-assign, assignment]
    background_log.addHandler(handler)
    replicator.start()
    try:
        yield health
    finally:
        await replicator.stop()
        background_log.removeHandler(handler)
    assert failures == []  # of its loops, which are restarted after one
