"""How many attempts ended, and failed, within the last seconds: a ring of time buckets. No clock, no verdict."""

from __future__ import annotations

BUCKETS = 15
"""What is older than the window is forgotten a bucket at a time: between 14 and 15 fifteenths of it are looked at."""


class Window:
    """Sixty numbers at most, however much traffic there is. `now`: seconds that do not run backwards."""

    __slots__ = ("_attempts", "_bucket_s", "_failures", "_newest")

    def __init__(self, window_s: float) -> None:
        self._bucket_s = window_s / BUCKETS
        self.clear()

    def clear(self) -> None:
        self._attempts = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self._newest: int | None = None

    def add(self, now: float, *, failed: bool) -> None:
        place = self._advance(now)
        self._attempts[place] += 1
        self._failures[place] += failed

    def counts(self, now: float) -> tuple[int, int]:
        """Attempts that ended, and those of them that failed."""
        self._advance(now)
        return sum(self._attempts), sum(self._failures)

    def _advance(self, now: float) -> int:
        current = int(now // self._bucket_s)
        newest = current if self._newest is None else self._newest
        current = max(current, newest)
        for passed in range(newest + 1, min(current, newest + BUCKETS) + 1):
            self._attempts[passed % BUCKETS] = self._failures[passed % BUCKETS] = 0
        self._newest = current
        return current % BUCKETS
