from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.concurrency import FairQueue
from proxy.errors import ModelAtCapacity
from proxy.settings.model_config import ModelInfo

# How long a slot is taken to be held, while none of this model was ever released.
DEFAULT_HELD_S = 1.0

# Within these bounds a caller is asked to come back.
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0

# Weight of the newest holding time in the moving average.
NEWEST_WEIGHT = 0.2

# Models of which the holding times are remembered while they have no request.
MAX_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class ConcurrencyLimits:
    max_parallel: int | None = None
    """None: no cap."""
    max_queued: int = 0
    """Requests beyond the cap that wait, first come first served."""

    @classmethod
    def of(cls, info: ModelInfo) -> ConcurrencyLimits:
        """Read a model's limits. Unless stated otherwise, as many requests may wait as may run.

        That evens out a burst, and no request waits for longer than about one answer. LiteLLM's own queue has no end,
        and so neither has its wait. With no queue at all, the second of two simultaneous requests would go to a worse
        or more expensive model, or back with 429.
        """
        queued = info.max_queued_requests
        if queued is None:
            queued = info.max_parallel_requests or 0
        return cls(info.max_parallel_requests, queued)


@dataclass(slots=True)
class _Queue:
    limits: ConcurrencyLimits
    slots: FairQueue
    held_s: float | None = None
    """The moving average of how long a slot is held; None: none was released yet."""

    @property
    def is_full(self) -> bool:
        """Whether there is neither a slot nor room to wait for one."""
        return not self.slots.has_free_slot and self.slots.waiting >= self.limits.max_queued

    @property
    def is_unused(self) -> bool:
        return not self.slots.taken and not self.slots.waiting

    def change_limits(self, limits: ConcurrencyLimits) -> None:
        """Apply the newest limits to all requests: those that fit now are admitted."""
        self.limits = limits
        self.slots.limit = limits.max_parallel
        self.slots.admit()


class ConcurrencyLimiter:
    """Cap concurrent requests per model, with a bounded FIFO queue.

    One per process, used on one event loop. Beyond MAX_REMEMBERED, models with no request take no memory.

    Args:
        on_wait: is told of each wait for a slot: model, seconds.
        on_full: is told of each caller that is turned away.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_wait: Callable[[str, float], None] = lambda *_: None,
        on_full: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._on_wait = on_wait
        self._on_full = on_full
        self._queues: dict[str, _Queue] = {}

    def acquire_nowait(self, model: str, limits: ConcurrencyLimits) -> float | None:
        """Take a free slot, as `acquire` does; None: the caller has to wait for one."""
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = _Queue(limits, FairQueue(limits.max_parallel))
        elif queue.limits is not limits:
            queue.change_limits(limits)
        return self._clock() if queue.slots.acquire_nowait() else None

    async def acquire(self, model: str, limits: ConcurrencyLimits, max_wait_s: float = 5.0) -> float:
        """Take a slot, at once or after waiting for one.

        Limits that differ from the last ones apply to all requests.

        Returns:
            When it was taken, by this limiter's clock, for `release`.

        Raises:
            ModelAtCapacity: the queue is full, or the wait was too long.
        """
        acquired_at = self.acquire_nowait(model, limits)
        if acquired_at is not None:
            return acquired_at
        queue = self._queues[model]
        if queue.is_full:
            raise self._at_capacity(model, queue, queue.slots.waiting)
        await self._wait(model, queue, max_wait_s)
        return self._clock()

    def release(self, model: str, acquired_at: float) -> None:
        """Give back a slot, once, when the response has ended in whatever way."""
        queue = self._queues[model]
        held_s, before = self._clock() - acquired_at, queue.held_s
        queue.held_s = held_s if before is None else before + NEWEST_WEIGHT * (held_s - before)
        queue.slots.release()
        if len(self._queues) > MAX_REMEMBERED and queue.is_unused:
            del self._queues[model]

    def loads(self) -> dict[str, tuple[int, int]]:
        """Return how many requests each model that has any is answering, and how many wait for it."""
        return {
            model: (queue.slots.taken, queue.slots.waiting)
            for model, queue in self._queues.items()
            if not queue.is_unused
        }

    async def _wait(self, model: str, queue: _Queue, max_wait_s: float) -> None:
        started_at = self._clock()
        try:
            async with asyncio.timeout(max_wait_s):
                await queue.slots.acquire()
        except TimeoutError:
            raise self._at_capacity(model, queue, queue.slots.waiting + 1) from None
        finally:
            self._on_wait(model, self._clock() - started_at)

    def _at_capacity(self, model: str, queue: _Queue, waiting: int) -> ModelAtCapacity:
        """Say when a slot is free: all who wait, and then the caller, take them as they are released."""
        self._on_full(model)
        slots = queue.limits.max_parallel or 1
        held_s = DEFAULT_HELD_S if queue.held_s is None else queue.held_s
        wait_s = held_s * (waiting + 1) / slots
        return ModelAtCapacity(
            f"{model} answers {slots} requests at once, and is busy with them",
            min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
        )
