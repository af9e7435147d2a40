"""The view of quality: what was measured beside what is observed, over time, and whether the map is of this traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse

from proxy.dashboard.page import DashboardRoute, SessionDep, render
from proxy.dashboard.pictures import Mark, RateInterval, Scale, Tick
from proxy.dashboard.traffic import DAYS, FIT_COMMANDS, share_chart, traffic_view
from proxy.dashboard.views import StateDep, savings_of
from proxy.server.auth import DASHBOARD
from proxy.storage.feedback import (
    DAYS_KEPT,
    HOURS_KEPT,
    MAX_P,
    MIN_LABELS,
    HourlyLabels,
    Observed,
    comparison,
    finding,
    in_words,
)
from proxy.storage.savings import quality_in_words
from proxy.storage.snapshot import RoutingSnapshot
from router_core.change_point import MIN_CHANGE, THRESHOLD, GradedHours
from router_core.decision import wilson_interval

router = APIRouter(
    prefix=DASHBOARD, include_in_schema=False, route_class=DashboardRoute, default_response_class=HTMLResponse
)

# Days that the decisions are summed over, to say whether quality held.
REPORT_DAYS = 7

# Hours of one mark of a course, and how many marks it has at most.
STEPS: Mapping[str, tuple[int, int]] = {"hour": (1, 48), "day": (24, HOURS_KEPT // 24)}


# Times below the marks of a course, and about how wide one is.
MAX_TICKS, LABEL_WIDTH = 4, 60


@router.get("/quality")
async def quality(request: Request, session: SessionDep, state: StateDep) -> Response:
    """Show it. Raises StoreUnavailable, StillWorking."""
    snapshot = state.snapshots.current
    cluster_map = snapshot.cluster_map
    records = [snapshot.models[name] for name in sorted(snapshot.profiles)]
    observed = await state.feedback.observed_of_all(records, cluster_map.id, cluster_map.size)
    by = request.query_params.get("by", "")
    by = by if by in STEPS else _default_step(observed)
    report = await savings_of(state, REPORT_DAYS)
    traffic = await traffic_view(state)
    return render(
        request,
        "quality.html",
        session,
        models=[model_quality(snapshot, name, observed.get(name), by) for name in sorted(snapshot.profiles)],
        by=by,
        steps=STEPS,
        report=report,
        report_days=REPORT_DAYS,
        words=quality_in_words(report["total"]),
        sources=await state.feedback.sources(),
        days_kept=DAYS_KEPT,
        feedback=state.settings.feedback,
        traffic=traffic,
        traffic_days=DAYS,
        shares=None if traffic is None else share_chart(traffic.clusters),
        fit_commands=FIT_COMMANDS,
        limits={"p": MAX_P, "labels": MIN_LABELS, "threshold": THRESHOLD, "change": MIN_CHANGE},
    )


def _default_step(observed: Mapping[str, Observed]) -> str:
    """Return `hour` while no label is older than the hours that are drawn."""
    hours = [hour for each in observed.values() for hour in each.hourly.hours]
    return "hour" if not hours or max(hours) - min(hours) < STEPS["hour"][1] else "day"


@dataclass(frozen=True)
class ModelQuality:
    """One model as it was measured and as it is observed. None: nothing is known."""

    name: str
    measured: RateInterval | None
    """What was expected of the answers that the feedback is of."""
    observed: RateInterval | None
    figures: Mapping[str, Any]
    clusters: Sequence[ClusterQuality]
    course: CourseChart | None

    @property
    def finding(self) -> str | None:
        return finding(self.figures) if self.figures else None

    @property
    def state(self) -> tuple[str, str]:
        """Return how it is, as a class of the style sheet and in words."""
        if (found := self.finding) is not None:
            return "bad" if "worse" in found else "warn", found
        if self.figures.get("differs") is None:
            return "", "too few labels"
        return "good", "as measured"

    @property
    def words(self) -> str:
        return in_words(self.figures)


@dataclass(frozen=True, slots=True)
class ClusterQuality:
    cluster: int
    name: str
    measured: RateInterval
    observed: RateInterval
    differs: bool | None


def model_quality(snapshot: RoutingSnapshot, name: str, observed: Observed | None, by: str) -> ModelQuality:
    if observed is None:
        return ModelQuality(name, None, None, {}, (), None)
    figures = comparison(snapshot.profiles[name], observed)
    names = snapshot.cluster_map.names
    clusters = [
        ClusterQuality(
            row["id"],
            names[row["id"]],
            measured=_interval(row, "measured_error", "measured_labels"),
            observed=_interval(row, "error", "labels"),
            differs=row["differs"],
        )
        for row in sorted(figures["clusters"], key=lambda row: -row["labels"])
    ]
    known = figures["mean_error"] is not None
    return ModelQuality(
        name,
        _interval(figures, "measured_mean_error", "measured_labels") if known else None,
        _interval(figures, "mean_error", "labels") if known else None,
        figures,
        clusters,
        course_chart(name, observed.hourly, by),
    )


def _interval(figures: Mapping[str, Any], name: str, labels: str) -> RateInterval:
    return RateInterval(figures[name], figures[f"{name}_low"], figures[f"{name}_high"], figures[labels])


@dataclass(frozen=True, slots=True)
class CoursePoint:
    """The labels of one hour or day."""

    when: str
    rate: RateInterval
    expected: float


@dataclass(frozen=True)
class CourseChart:
    """Observed error rates over time as dots with whiskers, and what was expected as a line."""

    points: Sequence[CoursePoint]
    """The newest last."""
    dots: Sequence[Mark]
    """`label_y` and `height`: where the whisker begins, and how long it is."""
    expected: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = 560
    height: int = 190
    left: int = 40
    right: int = 548
    top: int = 10
    floor: int = 158


def course_chart(name: str, hourly: HourlyLabels, by: str) -> CourseChart | None:
    """Draw the hours or days that have labels, the last ones that fit; None: there is none."""
    hours, most = STEPS[by]
    groups = hourly.grouped(hours)
    if not groups:
        return None
    first = groups[-1][0] - hours * (most - 1)
    groups = [(hour, labels) for hour, labels in groups if hour >= first]
    points = [_point(hour, labels, by) for hour, labels in groups]
    empty = CourseChart(points, (), "", (), ())
    slots = max((groups[-1][0] - groups[0][0]) // hours + 1, 7)
    step = (empty.right - empty.left) / slots
    highest = min(1.0, math.ceil(10 * max(max(each.rate.high, each.expected) for each in points)) / 10)

    scale = Scale(0.0, highest, empty.floor, empty.top)

    def x(hour: int) -> float:
        return round(empty.left + step * ((hour - groups[0][0]) / hours + 0.5), 1)

    def y(rate: float) -> float:
        return scale(min(rate, highest))

    dots = [
        Mark(
            x(hour),
            y(point.rate.error),
            f"{name}, {point.when}: observed {point.rate.text}; expected {point.expected:.2f}",
            height=round(y(point.rate.low) - y(point.rate.high), 1),
            label_y=y(point.rate.high),
        )
        for (hour, _), point in zip(groups, points, strict=True)
    ]
    every = max(1, len(points) // MAX_TICKS)
    return CourseChart(
        points,
        dots,
        " ".join(f"{x(hour)},{y(point.expected)}" for (hour, _), point in zip(groups, points, strict=True)),
        [
            Tick(dot.x, point.when[5:])
            for dot, point in list(zip(dots, points, strict=True))[::every]
            if dot.x <= empty.right - LABEL_WIDTH / 2
        ],
        [Tick(y(highest * share), f"{highest * share:.2g}") for share in (0.0, 0.5, 1.0)],
    )


def _point(hour: int, labels: GradedHours, by: str) -> CoursePoint:
    low, high = wilson_interval(np.array([labels.rate]), np.array([labels.labels]))
    at = datetime.fromtimestamp(hour * 3600, UTC)
    when = f"{at:%Y-%m-%d}" if by == "day" else f"{at:%Y-%m-%d %H:00}"
    return CoursePoint(
        when, RateInterval(labels.rate, float(low[0]), float(high[0]), labels.labels), labels.expected_rate
    )
