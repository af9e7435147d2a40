"""How long a model is waited for: stated by a request, else for the model, else by the settings. Holds no clock."""

from __future__ import annotations

from dataclasses import dataclass, fields

from proxy.model_entries import ModelInfo
from proxy.settings import Settings


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    connect_s: float
    first_token_s: float
    """From asking one model to its first content; of an answer that is no stream, to all of it."""
    idle_s: float
    """Between two events of a stream, once content has come."""
    total_s: float
    """From the request's arrival to the first content of whichever model answers."""

    def hastier_than(self, usual: Timeouts) -> bool:
        """Missing one of these may be no fault of the model."""
        return self is not usual and any(getattr(self, name) < getattr(usual, name) for name in _NAMES)


_NAMES = tuple(column.name for column in fields(Timeouts))


@dataclass(frozen=True, slots=True)
class StatedTimeouts:
    """What one request states. None: not stated."""

    connect_s: float | None = None
    first_token_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


NOTHING_STATED = StatedTimeouts()


def total_s(settings: Settings, stated: StatedTimeouts) -> float:
    """No request waits longer in all than `request_timeout_s`, whatever it states."""
    return min(stated.total_s or settings.request_timeout_s, settings.request_timeout_s)


def timeouts_for(settings: Settings, info: ModelInfo, stated: StatedTimeouts = NOTHING_STATED) -> Timeouts:
    return Timeouts(
        connect_s=stated.connect_s or info.connect_timeout_s or settings.connect_timeout_s,
        first_token_s=stated.first_token_s or info.first_token_timeout_s or settings.first_token_timeout_s,
        idle_s=stated.idle_s or info.idle_timeout_s or settings.idle_timeout_s,
        total_s=total_s(settings, stated),
    )
