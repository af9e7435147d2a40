"""A bucket of so many a minute, refilled continuously; a minute's may be taken at once. No clock, no store.

What is kept is what is used, which leaks away: nothing used is a full bucket. Debt is more than a minute's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MOST_KEYS = 10_000
UNKNOWN_WAIT_S = 60.0
"""Where nothing is ever refilled."""


@dataclass(frozen=True, slots=True)
class Level:
    """What was used at some time, in seconds of whichever clock the caller goes by."""

    used: float = 0.0
    at: float = 0.0


def leaked(level: Level, per_minute: float, now: float) -> Level:
    """The level now. A clock that went back refills nothing."""
    return Level(max(0.0, level.used - max(0.0, now - level.at) * per_minute / 60), now)


def taken(level: Level, per_minute: float, amount: float, now: float) -> Level | None:
    """The level after taking `amount`; None: there is not so much."""
    current = leaked(level, per_minute, now)
    return None if current.used + amount > per_minute else Level(current.used + amount, now)


def corrected(level: Level, per_minute: float, more: float, now: float) -> Level:
    """The level after `more`, or less where that is negative, was used than had been taken. May be a debt."""
    return Level(max(0.0, leaked(level, per_minute, now).used + more), now)


def wait_s(used: float, amount: float, per_minute: float) -> float:
    """Seconds until `amount` can be taken."""
    return max(0.0, used + amount - per_minute) * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


def fill_s(used: float, per_minute: float) -> float:
    """Seconds until it is full."""
    return used * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


class Buckets:
    """Levels by name, of the names used last."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._levels: OrderedDict[str, Level] = OrderedDict()

    def __getitem__(self, name: str) -> Level:
        return self._levels.get(name, Level())

    def __setitem__(self, name: str, level: Level) -> None:
        self._levels[name] = level
        self._levels.move_to_end(name)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)

    def __len__(self) -> int:
        return len(self._levels)
