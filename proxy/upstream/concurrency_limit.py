from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Queue:
    limits: ConcurrencyLimits
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    @property
    def has_place(self) -> bool:
        return self.limits.max_parallel is None or self.running < self.limits.max_parallel

    @property
    def full(self) -> bool:
        """Neither a place nor a place in the queue."""
        return not self.has_place and len(self.waiting) >= self.limits.max_queued

    def under(self, limits: ConcurrencyLimits) -> _Queue:
        """The newest limits are everybody's: whoever may come in under them does."""
        self.limits = limits
        self.admit()
        return self

    def admit(self) -> None:
        """A place belongs to the waiter from the moment it is given, whether or not that one has noticed."""
        while self.waiting and self.has_place:
            waiter = self.waiting.popleft()
            if not waiter.done():
                self.running += 1
                waiter.set_result(None)


class ConcurrencyLimiter:
    """One per process, used on one event loop. Models at which nobody is asked or waits take no memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rooms: dict[str, _Queue] = {}
        self._held_s: dict[str, float] = {}

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
        room = self._rooms.setdefault(model, _Queue(limits)) if room is None else room.under(limits)
        if room.has_place:  # and so nobody waits for one
            room.running += 1
        elif room.full:
            raise self._busy(model, room)
        else:
            await self._wait(model, room)
        taken_at = self._clock()
        return Slot(lambda: self._release(model, room, self._clock() - taken_at))

    async def _wait(self, model: str, room: _Queue) -> None:
        waiter = asyncio.get_running_loop().create_future()
        room.waiting.append(waiter)
        admitted = False
        try:
            async with asyncio.timeout(room.limits.longest_wait_s):
                await waiter
            admitted = True
        except TimeoutError:
            raise self._busy(model, room) from None
        finally:
            if not admitted:
                self._leave(model, room, waiter)

    def _leave(self, model: str, room: _Queue, waiter: asyncio.Future[None]) -> None:
        """A place that was given to somebody who has gone at that moment is the next one's."""
        if waiter.done() and not waiter.cancelled():
            room.running -= 1
        elif waiter in room.waiting:
            room.waiting.remove(waiter)
        self._admit(model, room)

    def _release(self, model: str, room: _Queue, held_s: float) -> None:
        room.running -= 1
        self._remember(model, held_s)
        self._admit(model, room)

    def _admit(self, model: str, room: _Queue) -> None:
        room.admit()
        if not room.running and not room.waiting:
            self._rooms.pop(model, None)

    def _remember(self, model: str, held_s: float) -> None:
        before = self._held_s.pop(model, held_s)
        self._held_s[model] = before + NEWEST_WEIGHS * (held_s - before)
        if len(self._held_s) > MAX_REMEMBERED:
            self._held_s.pop(next(iter(self._held_s)))

    def _busy(self, model: str, room: _Queue) -> ModelAtCapacity:
        """All who wait, and then the caller, take the places as they are given back."""
        places = room.limits.max_parallel or 1
        wait_s = self._held_s.get(model, FIRST_GUESS_S) * (len(room.waiting) + 1) / places
        return ModelAtCapacity(
            f"{model} answers {places} requests at once, and is busy with them", min(max(wait_s, SHORTEST_S), LONGEST_S)
        )
