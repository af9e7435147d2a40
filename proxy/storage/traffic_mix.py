"""How routed prompts spread over the clusters of the map: counted in memory, and by day in Redis for all processes.

uniroute:traffic:<map>:<day>   `n`, `nn` and `blocks`: prompts, the sum of their squares by block, and the blocks;
                               `s:`, `q:` and `p:<cluster>`: weights, and by block their squares and their products with
                               the prompts; the cluster `novel` is that of prompts far from all others

A block is what one process routes within an hour of UTC. See router_core/divergence.py for what blocks are for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from proxy.concurrency import BackgroundTasks
from proxy.storage.redis import Availability, Store, StoreUnavailable, load_script
from router_core.clustering import ClusterMap
from router_core.divergence import BlockSums
from router_core.types import Assignment, Doubles

log = logging.getLogger("uniroute.traffic")

TRAFFIC: Final = "uniroute:traffic"

# Days that are kept, today included.
MAX_DAYS = 31

KEPT_S = (MAX_DAYS + 1) * 86_400

FLUSH_INTERVAL_S = 5.0

# Prompts that are held before they are added up: many at once take a tenth of the time.
BATCH_SIZE = 512

NOVEL: Final = "novel"

_ADD = load_script(__package__, "add_traffic")


class TrafficMix:
    """Count routed prompts. `observe` is called on the event loop, once a request."""

    def __init__(
        self,
        store: Store,
        cluster_map: ClusterMap,
        on_novel: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            on_novel: is called with the number of novel prompts of a batch.
            clock: Unix seconds.
        """
        self._store = store
        self._map_id = cluster_map.id
        self._clusters = cluster_map.size
        self._novel_below = cluster_map.novel_below
        self._on_novel = on_novel
        self._clock = clock
        self._new: list[Assignment] = []
        self._block = _Block(cluster_map.size, _hour(clock()))
        self._add = store.client.register_script(_ADD)
        self._availability = Availability(log, back="the mix of the traffic reaches the store again")
        self._tasks = BackgroundTasks()

    def observe(self, assignment: Assignment) -> None:
        """Count one prompt. Its arrays are kept for a while, and must not be written to."""
        self._new.append(assignment)
        if len(self._new) >= BATCH_SIZE:
            self.count()

    def count(self) -> None:
        """Add up what was observed since."""
        new, self._new = self._new, []
        if not new:
            return
        ids = np.concatenate([each.ids[0] for each in new])
        weights = np.concatenate([each.weights[0] for each in new])
        novel = 0
        if self._novel_below is not None:
            novel = sum(each.cosines is not None and bool(each.cosines[0] < self._novel_below) for each in new)
        self._block.sums[:-1] += np.bincount(ids, weights=weights, minlength=self._clusters)
        self._block.sums[-1] += novel
        self._block.prompts += len(new)
        if novel:
            self._on_novel(novel)

    def start(self) -> None:
        self._tasks.start("uniroute-traffic", self._flush_loop)

    async def stop(self) -> None:
        """Send what is left, if the store takes it."""
        await self._tasks.close()
        try:
            await self.flush()
        except StoreUnavailable as error:
            log.warning("the last prompts are not counted in the mix of the traffic: %s", error)

    async def flush(self) -> None:
        """Send what was counted since the last time. A prompt counts twice if the reply to that was lost.

        Raises:
            StoreUnavailable: it is sent with what comes next.
        """
        self.count()
        block = self._block
        sums, prompts = block.sums.copy(), block.prompts
        if amounts := block.amounts_until(sums, prompts):
            arguments = [part for name, amount in amounts.items() for part in (name, f"{amount:.12g}")]
            async with self._store.operation("count the mix of the traffic"):
                await self._add(keys=[_key(self._map_id, _day(block.hour * 3600))], args=[KEPT_S, *arguments])
            block.sent_sums, block.sent_prompts = sums, prompts
        if (hour := _hour(self._clock())) != block.hour and block.prompts == prompts:
            self._block = _Block(self._clusters, hour)

    async def read(self, days: int) -> BlockSums | None:
        """Return what was counted on the last so many days (UTC), today included; None: nothing. Of all processes.

        Raises:
            StoreUnavailable
        """
        today = datetime.fromtimestamp(self._clock(), UTC)
        names = [f"{today - timedelta(days=day):%Y-%m-%d}" for day in range(min(days, MAX_DAYS))]
        async with self._store.operation("read the mix of the traffic") as client:
            reading = client.pipeline(transaction=False)
            for name in names:
                reading.hgetall(_key(self._map_id, name))
            found: Any = await reading.execute(raise_on_error=False)
        return parse_traffic((each for each in found if isinstance(each, Mapping)), self._clusters)

    async def _flush_loop(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            try:
                await self.flush()
                self._availability.mark_available()
            except StoreUnavailable as error:
                self._availability.mark_unavailable(f"the mix of the traffic waits in memory: {error}")


class _Block:
    """What one process has routed in one hour, and how much of that was sent."""

    def __init__(self, clusters: int, hour: int) -> None:
        self.hour = hour
        self.sums, self.prompts = np.zeros(clusters + 1), 0
        self.sent_sums, self.sent_prompts = np.zeros(clusters + 1), 0

    def amounts_until(self, sums: Doubles, prompts: int) -> dict[str, float]:
        """Return what to add to each field of the day, so that it has the sums and squares of this block up to now."""
        before = self.sent_prompts
        if prompts == before:
            return {}
        amounts = {"n": prompts - before, "nn": prompts**2 - before**2, "blocks": 0 if before else 1}
        grown, squares = sums - self.sent_sums, sums**2 - self.sent_sums**2
        products = sums * prompts - self.sent_sums * before
        for row in np.flatnonzero(sums).tolist():
            name = NOVEL if row == len(sums) - 1 else str(row)
            amounts |= {f"s:{name}": grown[row], f"q:{name}": squares[row], f"p:{name}": products[row]}
        return {name: amount for name, amount in amounts.items() if amount}


def parse_traffic(days: Iterable[Mapping[str, str]], clusters: int) -> BlockSums | None:
    """Add up the hashes of several days, without fields that are none of ours; None: there is nothing in them."""
    columns = {kind: np.zeros(clusters + 1) for kind in "sqp"}
    totals = dict.fromkeys(("n", "nn", "blocks"), 0.0)
    for stored in days:
        for name, text in stored.items():
            try:
                amount = float(text)
                kind, _, cluster = name.partition(":")
                if kind in totals:
                    totals[kind] += amount
                else:
                    columns[kind][clusters if cluster == NOVEL else int(cluster)] += amount
            except (ValueError, KeyError, IndexError):
                continue
    sums = BlockSums(totals["blocks"], totals["n"], totals["nn"], columns["s"], columns["q"], columns["p"])
    finite = np.isfinite(np.concatenate((*columns.values(), np.array(list(totals.values()))))).all()
    return sums if finite and sums.prompts > 0 else None


def _key(map_id: str, day: str) -> str:
    return f"{TRAFFIC}:{map_id}:{day}"


def _hour(at: float) -> int:
    return int(at // 3600)


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"
