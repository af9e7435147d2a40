"""How the mean error of a model went from profile to profile: a picture, and the rows below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.dashboard.pictures import Mark, Scale, Tick
from proxy.server.admin import past_profiles
from proxy.server.dependencies import AppState
from proxy.storage.redis import StoreUnavailable

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HistoryChart:
    """Mean errors with their bounds, the oldest at the left."""

    marks: Sequence[Mark]
    """`y` is the mean error, `label_y` the lower and `height` the upper bound."""
    line: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = 720
    height: int = 190
    left: int = 44
    right: int = 700
    top: int = 10
    floor: int = 158


async def history_of(state: AppState, name: str) -> list[dict[str, Any]] | None:
    """Return the last profiles of a model, the newest first; None: the store is away."""
    if not state.snapshots.available:
        return None
    try:
        return await past_profiles(state, name)
    except StoreUnavailable:
        return None


def history_chart(rows: Sequence[Row]) -> HistoryChart | None:
    """Draw profiles, given the newest first. None: one alone is no course."""
    if len(rows) < 2:
        return None
    empty = HistoryChart((), "", (), ())
    rows = rows[::-1]
    most = max(0.1, math.ceil(10 * max(float(row["error_high"]) for row in rows)) / 10)
    x = Scale(0, len(rows) - 1, empty.left + 20, empty.right - 20)
    y = Scale(0.0, most, empty.floor, empty.top)
    marks = [
        Mark(x(place), y(row["mean_error"]), _title(row), height=y(row["error_high"]), label_y=y(row["error_low"]))
        for place, row in enumerate(rows)
    ]
    # as many dates as there is room for, the last one always
    every = math.ceil(len(rows) / 7)
    dated = [place for place in range(len(rows)) if (len(rows) - 1 - place) % every == 0]
    ticks = range(round(10 * most) + 1)
    return HistoryChart(
        marks=marks,
        line=" ".join(f"{mark.x},{mark.y}" for mark in marks),
        x_ticks=[Tick(x(place), rows[place]["stored_at"][:10]) for place in dated],
        y_ticks=[Tick(y(tick / 10), f"{tick / 10:.1f}") for tick in ticks if most <= 0.5 or tick % 2 == 0],
    )


def _title(row: Row) -> str:
    said = (
        f"{row['stored_at'][:16].replace('T', ' ')} UTC: mean error {row['mean_error']:.3f}"
        f" ({row['error_low']:.3f} to {row['error_high']:.3f}), {row['total_labels']:.0f} labels"
    )
    change = row["change"]
    return f"{said}; differs from the one before" if change is not None and change["differs"] else said
