from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b

import numpy as np

from proxy.concurrency import LRU, in_own_thread
from router_core.clustering import ClusterMap, assign_texts
from router_core.embedding import STATIC_KINDS, StaticEmbedder
from router_core.types import Assignment, Embedder

STATIC_DEADLINE_S = 0.05

TRANSFORMER_DEADLINE_S = 0.5

# Each wait is as long as the deadline: a second in all for the static embedder. A process that was stopped spends one.
MAX_WAITS = 20

WORKERS = 2

MAX_QUEUED = 64

# Prompts, about 350 bytes each.
MAX_REMEMBERED = 4_096

_ID_BYTES, _WEIGHT_BYTES = 8, 4


class AssignmentTimeout(Exception):
    """The clusters were not known in time, or too many prompts are waiting."""


class ClusterAssigner:
    """Find the clusters Φ(x) of one prompt at a time, within a deadline.

    Of prompts that come again, a digest and their clusters are kept.

    Args:
        cpu_s: seconds that this process has computed.
    """

    def __init__(self, embedder: Embedder, deadline_s: float, cpu_s: Callable[[], float] = time.process_time) -> None:
        self.embedder = embedder
        self.deadline_s = deadline_s
        self._cpu_s = cpu_s
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="embedding")
        self._queued = 0
        self._known: LRU[bytes, bytes] = LRU(MAX_REMEMBERED)

    async def warm(self, cluster_map: ClusterMap) -> None:
        """Load whatever the first prompt would have to wait for."""
        await in_own_thread(partial(self._assign, "warm up", cluster_map))

    async def assign(self, text: str, cluster_map: ClusterMap) -> Assignment:
        """Return one row, read-only. Raises AssignmentTimeout."""
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() + cluster_map.id.encode()
        packed = self._known.get(key)
        if packed is not None:
            return _unpacked(packed)
        found = self._assign_inline(text, cluster_map) or await self._assign_in_thread(text, cluster_map)
        self._known[key] = _packed(found)
        return found

    def _assign_inline(self, text: str, cluster_map: ClusterMap) -> Assignment | None:
        """Embed a short prompt on the event loop, in a millisecond at most; return None for a longer one."""
        if not isinstance(self.embedder, StaticEmbedder):
            return None
        vector = self.embedder.embed_if_short(text, cluster_map.query)
        if vector is None:
            return None
        return _read_only(cluster_map.assign(vector, cluster_map.surface_of([text])))

    async def _assign_in_thread(self, text: str, cluster_map: ClusterMap) -> Assignment:
        if self._queued >= MAX_QUEUED:
            raise AssignmentTimeout("too many prompts wait to be embedded")
        self._queued += 1
        embedding = asyncio.wrap_future(self._executor.submit(self._assign, text, cluster_map))
        try:
            return await self._before_deadline(embedding)
        finally:
            embedding.cancel()
            self._queued -= 1

    async def _before_deadline(self, embedding: asyncio.Future[Assignment]) -> Assignment:
        """Wait until the deadline, which counts what this process has computed.

        On a machine that others keep busy it gets little done, and would be as late with any other answer. An embedder
        that hangs computes nothing: MAX_WAITS end that.
        """
        began, waits = self._cpu_s(), 0
        while not embedding.done():
            left_s = self.deadline_s - (self._cpu_s() - began)
            if left_s <= 0 or waits == MAX_WAITS:
                raise AssignmentTimeout(f"the prompt was not embedded within {self.deadline_s * 1000:g} ms")
            await asyncio.wait({embedding}, timeout=max(left_s, self.deadline_s / MAX_WAITS))
            waits += 1
        return embedding.result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _assign(self, text: str, cluster_map: ClusterMap) -> Assignment:
        return _read_only(assign_texts([text], self.embedder, cluster_map))


def _read_only(assignment: Assignment) -> Assignment:
    """Protect the arrays, which many requests may share."""
    if assignment.ids.flags.writeable:
        for array in (assignment.ids, assignment.weights, assignment.cosines):
            if array is not None:
                array.setflags(write=False)
    return assignment


def _packed(assignment: Assignment) -> bytes:
    """Write one row as bytes: three arrays take five times as much."""
    cosines = b"" if assignment.cosines is None else assignment.cosines.tobytes()
    return assignment.ids.tobytes() + assignment.weights.tobytes() + cosines


def _unpacked(packed: bytes) -> Assignment:
    """Read one row, with arrays over the bytes."""
    clusters, rest = divmod(len(packed), _ID_BYTES + _WEIGHT_BYTES)
    shape, weights_at = (1, clusters), _ID_BYTES * clusters
    return Assignment(
        np.ndarray(shape, np.int64, packed),
        np.ndarray(shape, np.float32, packed, weights_at),
        np.ndarray(1, np.float32, packed, weights_at + _WEIGHT_BYTES * clusters) if rest else None,
    )


def deadline_of(embedder_kind: str) -> float:
    return STATIC_DEADLINE_S if embedder_kind in STATIC_KINDS else TRANSFORMER_DEADLINE_S
