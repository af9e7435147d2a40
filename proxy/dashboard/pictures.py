"""Geometry of the pictures: where marks stand, and what each says. Templates write them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from proxy.dashboard.curve import DrawnCurve
from router_core.deferral import CurvePoint, SingleModel

# Shades of the heat map: classes h0 to h9 of the style sheet.
SHADES = 10


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark at x, y that can be focused; `title` is what it says."""

    x: float
    y: float
    title: str
    width: float = 0.0
    height: float = 0.0
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


def shade_of(share: float) -> int:
    return min(SHADES - 1, max(0, int(share * SHADES)))


@dataclass(frozen=True)
class BarChart:
    """Amounts over time, as bars."""

    bars: Sequence[Mark]
    ticks: Sequence[Tick]
    width: int = 720
    height: int = 132


def bar_chart(course: Sequence[tuple[float, float]], slots: int, unit: str) -> BarChart:
    """Draw (Unix seconds, amount) of at most `slots` intervals, the newest at the right."""
    chart = BarChart((), ())
    top, floor = 1.0, chart.height - 1.0
    most = max((value for _, value in course), default=0.0) or 1.0
    step = chart.width / slots
    first = slots - len(course)
    bars = [
        Mark(
            x=round(step * (first + place), 2),
            y=round(floor - (floor - top) * value / most, 2),
            width=round(max(step - 1.0, 1.0), 2),
            height=round(max((floor - top) * value / most, 0.0), 2),
            title=f"{datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC: {value:.3g} {unit}",
        )
        for place, (at, value) in enumerate(course)
    ]
    ticks = [Tick(round(floor - (floor - top) * share, 2), f"{most * share:.3g}") for share in (0.0, 0.5, 1.0)]
    return BarChart(bars, ticks)


@dataclass(frozen=True)
class CurveChart:
    """Quality over cost per 1,000 requests."""

    line: str
    band: str
    points: Sequence[Mark]
    singles: Sequence[Mark]
    today: Mark
    chosen: Mark | None
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    logarithmic: bool
    width: int = 760
    height: int = 400
    left: int = 52
    right: int = 744
    top: int = 16
    floor: int = 356


@dataclass(frozen=True)
class Scale:
    """Values on an axis, as coordinates with one digit."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + (self.end - self.start) * share, 1)


def curve_chart(drawn: DrawnCurve, today: CurvePoint, chosen: CurvePoint | None) -> CurveChart:
    """Draw a curve with its band of doubt, every single model, and the points of today's λ and of the chosen one."""
    empty = CurveChart("", "", (), (), Mark(0, 0, ""), None, (), (), logarithmic=False)
    points = [*drawn.points, today, *([chosen] if chosen else [])]
    shown: list[CurvePoint | SingleModel] = [*points, *drawn.singles]
    costs = [1e3 * each.usd for each in shown]
    positive = [cost for cost in costs if cost > 0]
    logarithmic = len(positive) == len(costs) and max(costs) / min(costs) > 30
    pad = 1.15 if logarithmic else 1.04
    low, high = (min(costs) / pad, max(costs) * pad) if logarithmic else (0.0, (max(costs) or 1.0) * pad)
    x = Scale(low, high, empty.left, empty.right, logarithmic)
    ends = [bound for each in shown for bound in (each.low, each.high)]
    bottom = max(0.0, math.floor(10 * min(ends)) / 10)
    y = Scale(bottom, min(1.0, math.ceil(10 * max(ends)) / 10), empty.floor, empty.top)

    def mark(point: CurvePoint, prefix: str = "") -> Mark:
        return Mark(x(1e3 * point.usd), y(point.quality), f"{prefix}{_point_text(point)}")

    upper = [f"{x(1e3 * point.usd)},{y(point.high)}" for point in drawn.points]
    lower = [f"{x(1e3 * point.usd)},{y(point.low)}" for point in reversed(drawn.points)]
    singles = [
        Mark(
            x(1e3 * single.usd),
            y(single.quality),
            f"{single.model} alone: quality {_range(single.quality, single.low, single.high)},"
            f" ${1e3 * single.usd:.3g} per 1,000 requests",
            label=single.model if len(single.model) <= 26 else f"{single.model[:25]}…",
        )
        for single in drawn.singles
    ]
    return CurveChart(
        line=" ".join(f"{x(1e3 * point.usd)},{y(point.quality)}" for point in drawn.points),
        band=" ".join([*upper, *lower]),
        points=[mark(point) for point in drawn.points],
        singles=_place_labels(singles, empty),
        today=mark(today, "Today: "),
        chosen=mark(chosen, "Chosen here: ") if chosen else None,
        x_ticks=[Tick(x(value), usd_tick(value)) for value in _cost_ticks(low, high, logarithmic=logarithmic)],
        y_ticks=[
            Tick(y(share / 20), f"{5 * share} %") for share in range(round(20 * y.low), round(20 * y.high) + 1, 2)
        ],
        logarithmic=logarithmic,
    )


def _point_text(point: CurvePoint) -> str:
    first = next(iter(point.shares.items()))
    return (
        f"λ = {point.lambda_:.3g}: quality {_range(point.quality, point.low, point.high)},"
        f" ${1e3 * point.usd:.3g} per 1,000 requests, most to {first[0]} ({100 * first[1]:.0f} %)"
    )


def _range(quality: float, low: float, high: float) -> str:
    return f"{100 * quality:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


LABEL_HEIGHT = 14.0


def _place_labels(marks: Sequence[Mark], chart: CurveChart) -> list[Mark]:
    """Put each name beside its mark, on the side with more room, and below names that are in the way."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda each: each.y):
        at_left = mark.x > (chart.left + chart.right) * 0.72
        label_y = mark.y + 4
        near = sorted(each.label_y for each in placed if abs(each.x - mark.x) < 170)
        for taken in near:
            if abs(taken - label_y) < LABEL_HEIGHT:
                label_y = taken + LABEL_HEIGHT
        placed.append(
            Mark(
                mark.x,
                mark.y,
                mark.title,
                label=mark.label,
                label_x=round(mark.x + (-10 if at_left else 10), 1),
                label_y=round(label_y, 1),
                anchor="end" if at_left else "start",
            )
        )
    return placed


def usd_tick(value: float) -> str:
    return f"${value:g}" if value >= 1 or value == 0 or value < 0.01 else f"${value:.2f}"


def _cost_ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        wide = high / low > 1e3
        ticks = [base * 10.0**decade for decade in decades for base in ((1,) if wide else (1, 2, 5))]
        return [float(f"{tick:.3g}") for tick in ticks if low <= tick <= high]
    step = 10.0 ** math.floor(math.log10(high / 4)) if high > 0 else 1.0
    step = next((step * factor for factor in (1, 2, 5, 10) if high / (step * factor) <= 6), step)
    return [float(f"{number * step:.3g}") for number in range(int(high / step) + 1)]


@dataclass(frozen=True)
class HeatMap:
    """Error rates of models, one a row, in clusters, one a column."""

    cells: Sequence[Sequence[Mark]]
    """By row; `label` is the class of the shade."""
    rows: Sequence[Tick]
    columns: Sequence[Tick]
    width: float
    height: float
    left: float
    top: float


CELL, ROW, HEAT_LEFT, HEAT_TOP = 16.0, 26.0, 120.0, 172.0


def heat_map(models: Sequence[str], clusters: Sequence[str], rates: Sequence[Sequence[RateInterval]]) -> HeatMap:
    """Draw the rates of each model, a row, in each cluster, a column."""
    cells = [
        [
            Mark(
                x=HEAT_LEFT + CELL * column,
                y=HEAT_TOP + ROW * row,
                width=CELL - 2,
                height=ROW - 4,
                title=f"{model} in “{cluster}”: expected error {rate.text}",
                label=f"h{shade_of(rate.error)}",
            )
            for column, (cluster, rate) in enumerate(zip(clusters, row_rates, strict=True))
        ]
        for row, (model, row_rates) in enumerate(zip(models, rates, strict=True))
    ]
    return HeatMap(
        cells=cells,
        rows=[Tick(HEAT_TOP + ROW * row + ROW / 2 + 2, model) for row, model in enumerate(models)],
        columns=[Tick(HEAT_LEFT + CELL * column + CELL / 2 + 2, name) for column, name in enumerate(clusters)],
        width=HEAT_LEFT + CELL * len(clusters),
        height=HEAT_TOP + ROW * len(models) + 4,
        left=HEAT_LEFT,
        top=HEAT_TOP,
    )


@dataclass(frozen=True, slots=True)
class RateInterval:
    """An expected error with its 90 % bounds, and the labels behind it."""

    error: float
    low: float
    high: float
    labels: float

    @property
    def text(self) -> str:
        return f"{self.error:.2f} ({self.low:.2f} to {self.high:.2f}), {self.labels:.1f} labels"


@dataclass(frozen=True)
class HistoryChart:
    """The mean errors of a model from profile to profile, with their bounds, the oldest at the left."""

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


def history_chart(rows: Sequence[Mapping[str, Any]]) -> HistoryChart | None:
    """Draw profiles, given the newest first. None: one alone is no course."""
    if len(rows) < 2:
        return None
    empty = HistoryChart((), "", (), ())
    rows = rows[::-1]
    most = max(0.1, math.ceil(10 * max(float(row["error_high"]) for row in rows)) / 10)
    x = Scale(0, len(rows) - 1, empty.left + 20, empty.right - 20)
    y = Scale(0.0, most, empty.floor, empty.top)
    marks = [
        Mark(
            x(place),
            y(row["mean_error"]),
            _past_title(row),
            height=y(row["error_high"]),
            label_y=y(row["error_low"]),
        )
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


def _past_title(row: Mapping[str, Any]) -> str:
    said = (
        f"{row['stored_at'][:16].replace('T', ' ')} UTC: mean error {row['mean_error']:.3f}"
        f" ({row['error_low']:.3f} to {row['error_high']:.3f}), {row['total_labels']:.0f} labels"
    )
    change = row["change"]
    return f"{said}; differs from the one before" if change is not None and change["differs"] else said
