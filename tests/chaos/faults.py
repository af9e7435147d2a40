from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from tests.chaos.processes import workers_of
from tests.chaos.world import WORKERS, World

BETWEEN_S = (1.0, 4.0)
# A worker is killed only once all have lived that long: with none there is nothing to learn.
SETTLED_S = 12.0


@dataclass(frozen=True)
class Fault:
    kind: str
    began: float
    ended: float


@dataclass
class Faults:
    world: World
    rng: Random
    happened: list[Fault] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    """Process ids of workers."""
    waiting: list[str] = field(default_factory=list)

    @property
    def kills(self) -> list[float]:
        """Return when workers were killed, in monotonic seconds."""
        return [fault.began for fault in self.happened if fault.kind == "worker killed"]

    async def run(self, until: float) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(*BETWEEN_S))
            if time.monotonic() >= until:
                return
            if not self.waiting:
                self.waiting = self.rng.sample(list(KINDS), len(KINDS))
            kind = self.waiting.pop()
            began = time.monotonic()
            if await KINDS[kind](self):
                self.happened.append(Fault(kind, began, time.monotonic()))

    async def store_frozen(self) -> bool:
        self.world.store.freeze()
        try:
            await asyncio.sleep(self.rng.uniform(1.0, 3.0))
        finally:
            self.world.store.thaw()
        return True

    async def store_killed(self) -> bool:
        await asyncio.to_thread(self.world.store.kill)
        try:
            await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        finally:
            await asyncio.to_thread(self.world.store.start)
        return True

    async def upstream_killed(self) -> bool:
        upstream = self.rng.choice(self.world.upstreams)
        await asyncio.to_thread(upstream.kill)
        try:
            await asyncio.sleep(self.rng.uniform(0.0, 1.5))
        finally:
            await asyncio.to_thread(upstream.start)
        return True

    async def upstream_frozen(self) -> bool:
        upstream = self.rng.choice(self.world.upstreams)
        upstream.freeze()
        try:
            await asyncio.sleep(self.rng.uniform(0.5, 4.0))
        finally:
            upstream.thaw()
        return True

    async def worker_killed(self) -> bool:
        workers = workers_of(self.world.server.pid)
        if len(workers) < WORKERS or min(workers.values()) < SETTLED_S:
            return False
        victim = self.rng.choice(sorted(workers))
        self.killed.append(victim)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return True


KINDS: Mapping[str, Callable[[Faults], Awaitable[bool]]] = {
    "store frozen": Faults.store_frozen,
    "store killed": Faults.store_killed,
    "upstream killed": Faults.upstream_killed,
    "upstream frozen": Faults.upstream_frozen,
    "worker killed": Faults.worker_killed,
}
