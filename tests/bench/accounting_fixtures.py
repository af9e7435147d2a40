from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.routing.affinity import NO_AFFINITY
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.selection import Selection
from proxy.server.dependencies import AppState, RequestContext
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import RateLimiter
from proxy.server.request_log import RequestRecord
from proxy.server.requests import RequestIds
from proxy.server.reservations import SETTLE_FUNCTION
from proxy.settings.schema import CircuitBreakerSettings, Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.redis import Store
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import RoutingSnapshot, TrafficStats
from proxy.storage.traffic_mix import TrafficMix
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import UsageWriter
from proxy.storage.valkey import EmbeddedValkey
from proxy.upstream.concurrency_limit import ConcurrencyLimiter, ConcurrencyLimits
from proxy.upstream.health import Attempt, HealthRegistry
from tests.support.makers import CORNERS, a_record, started_watcher
from tests.support.selections import a_state, chosen

USAGE = {"prompt_tokens": 412, "completion_tokens": 96, "prompt_tokens_details": {"cached_tokens": 256}}
SHORT = [{"role": "user", "content": "What is the capital of the country that I was born in?"}]
REQUEST = ChatRequest({"messages": SHORT}, "auto", True, False, RoutingOptions())
LIMITS = ConcurrencyLimits(64, 64)


@dataclass(frozen=True)
class AccountingParts:
    """Hold the parts of a process that record requests."""

    store: Store
    app: AppState
    routing: RoutingSnapshot
    selection: Selection

    def context(self, key: ClientKey | None = None) -> RequestContext:
        return RequestContext(self.app, self.routing, REQUEST, key, RequestIds("req-1"), time.monotonic())

    def record(self) -> RequestRecord:
        return RequestRecord(self.context(), self.selection, NO_AFFINITY)

    async def attempt(self) -> Attempt:
        """Begin an attempt as `AttemptRunner` does."""
        model, slots = self.selection.model, self.app.concurrency_limiter
        self.app.health.cooling_down()
        acquired_at = await slots.acquire(model, LIMITS, 5.0)
        return self.app.health.start_attempt(model, slots, acquired_at)

    async def valkey_s(self) -> float:
        """Return the CPU seconds that the store has taken."""
        taken: Any = await self.store.client.info("cpu")
        return float(taken["used_cpu_user"]) + float(taken["used_cpu_sys"])


def started(record: RequestRecord) -> RequestRecord:
    record.start_attempt(record.selection.model)
    record.first_content()
    record.set_usage(USAGE)
    return record


def emptied_pipe() -> Any:
    """Open a pipe for log lines, as a container's runtime reads it."""
    reader = subprocess.Popen(
        [sys.executable, "-c", "import os\nwhile os.read(0, 1 << 16): pass"], stdin=subprocess.PIPE
    )
    assert reader.stdin is not None
    return os.fdopen(os.dup(reader.stdin.fileno()), "w", buffering=1)


@asynccontextmanager
async def open_parts(folder: Path) -> AsyncIterator[AccountingParts]:
    server = EmbeddedValkey(folder)
    await asyncio.to_thread(server.ensure)
    store = Store(f"unix://{server.socket_path}")
    try:
        metrics, live = Metrics(), TrafficStats(4)
        async with started_watcher(store, folder, a_record("cheap"), a_record("dear"), traffic_stats=live) as state:
            usage = UsageWriter(store, JournalDirectory(folder / "usage", 10**9), settle_function=SETTLE_FUNCTION)
            routing, limiter = a_state(), RateLimiter(store, metrics, timeout_s=5.0)
            absent: Any = None
            app = AppState(
                settings=Settings(data_dir=folder),
                store=store,
                snapshots=state,
                registry=absent,
                jobs=absent,
                assigner=absent,
                upstream=absent,
                usage=usage,
                rate_limiter=limiter,
                metrics=metrics,
                traffic_stats=live,
                traffic_mix=TrafficMix(store, CORNERS),
                health=HealthRegistry(CircuitBreakerSettings()),
                concurrency_limiter=ConcurrencyLimiter(),
                sessions=SessionStore(store, 3600),
                responses=absent,
                decisions=absent,
                feedback=absent,
                resolver=absent,
                environ={},
            )
            yield AccountingParts(store, app, routing, await chosen(state=routing))
            await limiter.close()
            await usage.stop()
    finally:
        await store.close()
        await asyncio.to_thread(server.stop)
