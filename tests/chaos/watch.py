from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx

from tests.chaos.outcomes import Span
from tests.chaos.processes import connections_of, workers_of
from tests.chaos.world import WORKERS, World, serving_port

EVERY_S = 0.2
ANSWER_S = 30.0
SLOW_S = 1.0
# Connections at once, so that each worker takes some.
MANY = 64


@dataclass
class Watch:
    """Poll `/healthz` over a connection of its own each time, and the process ids of the workers."""

    world: World
    probes: int = 0
    failed: list[Span] = field(default_factory=list)
    """When it was asked and did not answer 200."""
    slow: list[tuple[float, float]] = field(default_factory=list)
    """When it was asked, and how many seconds its answer took, where those were SLOW_S or more."""
    longest_s: float = 0.0
    """Of its answers."""
    longest_own_s: float = 0.0
    """For which this very process was late: the machine was too busy, or we were."""
    seen: set[int] = field(default_factory=set)
    """Process ids of workers."""

    async def run(self) -> None:
        anew = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_S, limits=anew) as client:
            while True:
                self.seen |= workers_of(self.world.server.pid).keys()
                await self._ask(client)
                await asyncio.sleep(EVERY_S)

    async def watch_ourselves(self) -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(EVERY_S)
            self.longest_own_s = max(self.longest_own_s, time.monotonic() - started - EVERY_S)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        self.probes += 1
        sent_at = time.monotonic()
        healthy = await self._healthy(client)
        lasted = time.monotonic() - sent_at
        self.longest_s = max(self.longest_s, lasted)
        if not healthy:
            self.failed.append((sent_at, sent_at + lasted))
        elif lasted >= SLOW_S:
            self.slow.append((sent_at, lasted))

    async def _healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.world.server.url}/healthz")).status_code == 200
        except httpx.HTTPError:
            return False


async def serving_workers(world: World, within_s: float = 60.0) -> int:
    """Count the workers that answer: each serves some of many connections."""
    deadline = time.monotonic() + within_s
    serving = 0
    while serving < WORKERS and time.monotonic() < deadline:
        await asyncio.sleep(EVERY_S)
        serving = max(serving, await _serving(world))
    return serving


async def _serving(world: World) -> int:
    limits = httpx.Limits(max_connections=MANY, max_keepalive_connections=MANY)
    async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_S, limits=limits) as client:
        responses = (client.get(f"{world.server.url}/healthz") for _ in range(MANY))
        answers = await asyncio.gather(*responses, return_exceptions=True)
        if not all(isinstance(answer, httpx.Response) and answer.is_success for answer in answers):
            return 0
        workers = workers_of(world.server.pid)
        return sum(connections_of(pid, serving_port(world)) > 0 for pid in workers)
