"""Slows down whoever keeps sending keys that are none, so that it takes little from clients that have one. No keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

FREE_PER_S = 20
"""Refusals within a second that are answered at once: people who mistype, a client whose key has just ended."""
DELAY_S = 0.5
MOST_WAITING = 512
"""Beyond these a refusal is answered at once: waiting costs a connection, and they are not endless either."""


class Brake:
    """One per process, for all callers together: addresses are cheap, and behind a proxy all have the same."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._second = 0
        self._refusals = 0
        self._waiting = 0

    async def hold(self) -> None:
        """To be awaited before a caller is told that its key is none."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        if self._refusals <= FREE_PER_S or self._waiting >= MOST_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._waiting -= 1
