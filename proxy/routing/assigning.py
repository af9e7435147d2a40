"""A prompt's clusters within a deadline. Embedding runs in one bounded executor, never on the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from router_core.clustering import ClusterMap
from router_core.types import Assignment, Embedder

STATIC_DEADLINE_S = 0.05
TRANSFORMER_DEADLINE_S = 0.5
WORKERS = 2
MOST_WAITING = 64


class RoutingLate(Exception):
    """The clusters were not known in time, or too many prompts wait already."""


class Assigner:
    """Φ(x) for one prompt at a time."""

    def __init__(self, embedder: Embedder, deadline_s: float) -> None:
        self.embedder = embedder
        self.deadline_s = deadline_s
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="embedding")
        self._waiting = 0

    async def warm(self, cluster_map: ClusterMap) -> None:
        """The first prompt pays for nothing that could be loaded before."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._assign, "warm up", cluster_map)

    async def assign(self, text: str, cluster_map: ClusterMap) -> Assignment:
        """One row. Raises RoutingLate."""
        if self._waiting >= MOST_WAITING:
            raise RoutingLate("too many prompts wait to be embedded")
        self._waiting += 1
        future = self._executor.submit(self._assign, text, cluster_map)
        try:
            async with asyncio.timeout(self.deadline_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            future.cancel()
            raise RoutingLate(f"the prompt was not embedded within {self.deadline_s * 1000:g} ms") from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _assign(self, text: str, cluster_map: ClusterMap) -> Assignment:
        return cluster_map.assign(self.embedder.embed([text]))


def deadline_of(embedder_kind: str) -> float:
    return STATIC_DEADLINE_S if embedder_kind == "static" else TRANSFORMER_DEADLINE_S
