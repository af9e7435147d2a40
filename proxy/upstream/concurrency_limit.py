from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.concurrency import LRU, FairQueue
from proxy.errors import ModelAtCapacity
from proxy.settings.models import ModelInfo

FIRST_GUESS_S = 1.0
"""How long a place is held, while none of this model was ever given back."""

SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Within these bounds a caller is asked to come back."""

NEWEST_WEIGHS = 0.2

MAX_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class ConcurrencyLimits:
    """`max_parallel` None: no cap. Beyond it `max_queued` wait, first come first served, each for `longest_wait_s`."""

    max_parallel: int | None = None
    max_queued: int = 0
    longest_wait_s: float = 5.0

    @classmethod
    def of(cls, info: ModelInfo, longest_wait_s: float) -> ConcurrencyLimits:
        """Unless stated otherwise as many may wait as may be asked: a burst is evened out and nobody waits for longer
        than about one answer. LiteLLM's own queue has no end, and so neither has its wait; no queue at all would send
        the second of two simultaneous requests to a model that is worse or dearer, or back with 429."""
        queued = info.max_queued_requests
        if queued is None:
            queued = info.max_parallel_requests or 0
        return cls(info.max_parallel_requests, queued, longest_wait_s)


class Slot:
    """The right to ask. To be released once the answer has ended, however it did; again is harmless."""

    __slots__ = ("_on_release",)

    def __init__(self, on_release: Callable[[], None]) -> None:
        self._on_release: Callable[[], None] | None = on_release

    def release(self) -> None:
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()


class _Queue(FairQueue):
    __slots__ = ("limits",)

    limits: ConcurrencyLimits

    @property
    def full(self) -> bool:
        """Neither a place nor a place in the queue."""
        return not self.has_free_slot and self.waiting >= self.limits.max_queued

    def under(self, limits: ConcurrencyLimits) -> _Queue:
        """The newest limits are everybody's: whoever may come in under them does."""
        self.limits, self.limit = limits, limits.max_parallel
        self.admit()
        return self


@dataclass(slots=True)
class _HeldTime:
    mean_s: float


class ConcurrencyLimiter:
    """One per process, used on one event loop. Models at which nobody is asked or waits take no memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rooms: dict[str, _Queue] = {}
        self._held: LRU[str, _HeldTime] = LRU(MAX_REMEMBERED)

    def busy(self, model: str, limits: ConcurrencyLimits) -> bool:
        """Whether `slot` would refuse at once."""
        room = self._rooms.get(model)
        return room is not None and room.under(limits).full

    async def slot(self, model: str, limits: ConcurrencyLimits) -> Slot:
        """A place, at once or after waiting for one. `limits` may be others than last time: they apply to all.

        Raises:
            ModelBusy: the queue is full, or the wait was too long.
        """
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = _Queue(limits.max_parallel)
            room.limits = limits
        else:
            room.under(limits)
        if not room.acquire_nowait():
            if room.full:
                raise self._busy(model, room, room.waiting)
            await self._wait(model, room)
        taken_at = self._clock()
        return Slot(lambda: self._release(model, room, self._clock() - taken_at))

    async def _wait(self, model: str, room: _Queue) -> None:
        try:
            async with asyncio.timeout(room.limits.longest_wait_s):
                await room.acquire()
        except TimeoutError:
            raise self._busy(model, room, room.waiting + 1) from None
        finally:
            self._forget_unused(model, room)

    def _release(self, model: str, room: _Queue, held_s: float) -> None:
        self._remember(model, held_s)
        room.release()
        self._forget_unused(model, room)

    def _forget_unused(self, model: str, room: _Queue) -> None:
        if not room.taken and not room.waiting:
            self._rooms.pop(model, None)

    def _remember(self, model: str, held_s: float) -> None:
        held = self._held.get(model)
        if held is None:
            self._held[model] = _HeldTime(held_s)
        else:
            held.mean_s += NEWEST_WEIGHS * (held_s - held.mean_s)

    def _busy(self, model: str, room: _Queue, waiting: int) -> ModelAtCapacity:
        """All who wait, and then the caller, take the places as they are given back."""
        places = room.limits.max_parallel or 1
        held = self._held.get(model)
        wait_s = (held.mean_s if held else FIRST_GUESS_S) * (waiting + 1) / places
        return ModelAtCapacity(
            f"{model} answers {places} requests at once, and is busy with them", min(max(wait_s, SHORTEST_S), LONGEST_S)
        )
