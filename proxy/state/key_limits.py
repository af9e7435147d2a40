"""What a client key may use, as stated. Holding it to that is limits' business."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer together."""
    usd_per_day: float | None = None
    """A day and a month begin at midnight UTC."""
    usd_per_month: float | None = None

    @property
    def any(self) -> bool:
        return self != NO_LIMITS

    @property
    def money(self) -> bool:
        return self.usd_per_day is not None or self.usd_per_month is not None


NO_LIMITS = KeyLimits()
