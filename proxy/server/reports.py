"""Reports of what was spent and saved, made from the decisions in the background, a few at a time."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from proxy.errors import ServiceUnavailable
from proxy.profiling.job_store import KEPT_S, Job
from proxy.profiling.jobs import Jobs
from proxy.settings.schema import Settings
from proxy.storage.decisions import DecisionFilter, DecisionStore
from proxy.storage.redis import Store
from proxy.storage.savings import Evidence, MeasuredLabels, SavingsReport
from proxy.storage.snapshot import RoutingSnapshot, SnapshotWatcher
from proxy.storage.usage_writer import DAY_S, MAX_DAYS, read_day_totals
from router_core.errors import InvalidInput
from router_core.estimators import ESTIMATORS
from router_core.pricing import PICO, picousd
from router_core.selection_bias import GradedPrompts, SelectionBias

# While they are summed, no request is served.
DECISIONS_AT_ONCE = 25

# How old a report may be: those who look again, or at another table, need not wait.
MAX_AGE_S = 10.0

# That are being made at once, and that are kept.
MAX_RUNNING, MAX_KEPT = 4, 16

Report = Mapping[str, Any]


class ReportSources(Protocol):
    """What reports are made from: parts of the app's state."""

    @property
    def settings(self) -> Settings: ...

    @property
    def store(self) -> Store: ...

    @property
    def snapshots(self) -> SnapshotWatcher: ...

    @property
    def jobs(self) -> Jobs: ...

    @property
    def decisions(self) -> DecisionStore: ...


@dataclass
class ReportWork:
    task: asyncio.Task[Report] | None = None
    decisions: int = 0
    """Read so far."""
    ended_at: float | None = None
    """Monotonic seconds."""


Make = Callable[[ReportSources, DecisionFilter, ReportWork], Coroutine[Any, Any, Report]]


class Reports:
    """Make reports when somebody asks for them, each once for all who ask while it is made and shortly after."""

    def __init__(self, make: Make | None = None) -> None:
        """`make`: makes a report, and counts the decisions that it has read."""
        self._make = make or make_report
        self._work: dict[Hashable, ReportWork] = {}

    async def get(
        self, state: ReportSources, wanted: DecisionFilter, wait_s: float, name: Hashable = None
    ) -> tuple[Report | None, int]:
        """Return the report of these decisions; None if it is not made within `wait_s`. And the decisions read so far.

        Args:
            name: stands for `wanted` if that is another each time, as "the last hour" is.

        Raises:
            StoreUnavailable
            ServiceUnavailable: too many others are being made.
        """
        self._drop_old()
        key = wanted if name is None else name
        work = self._work.get(key)
        if work is None:
            if sum(each.ended_at is None for each in self._work.values()) >= MAX_RUNNING:
                raise ServiceUnavailable("too many reports are being made: try again in some seconds")
            work = self._work[key] = ReportWork()
            work.task = asyncio.create_task(self._run(state, wanted, work), name="uniroute-report")
        task = work.task
        assert task is not None
        await asyncio.wait({task}, timeout=wait_s)
        if not task.done():
            return None, work.decisions
        if task.cancelled() or task.exception() is not None:
            self._work.pop(key, None)
        return task.result(), work.decisions

    async def _run(self, state: ReportSources, wanted: DecisionFilter, work: ReportWork) -> Report:
        try:
            return await self._make(state, wanted, work)
        finally:
            work.ended_at = time.monotonic()

    def _drop_old(self) -> None:
        now = time.monotonic()
        ended = [(work.ended_at, key) for key, work in self._work.items() if work.ended_at is not None]
        ended.sort(key=lambda each: -each[0])
        for place, (ended_at, key) in enumerate(ended):
            if place >= MAX_KEPT or now - ended_at >= MAX_AGE_S:
                task = self._work.pop(key).task
                if task is not None and not task.cancelled():
                    task.exception()  # mark it as retrieved: nobody waits for it any more


async def make_report(state: ReportSources, wanted: DecisionFilter, work: ReportWork) -> Report:
    """Sum up the decisions, some at a time: requests are served in between. Raises StoreUnavailable."""
    snapshot, cursor = state.snapshots.current, None
    report = SavingsReport(await _selection_bias(state, snapshot))
    while True:
        page = await state.decisions.page(DECISIONS_AT_ONCE, wanted, cursor, flips=False)
        for decision in page.decisions:
            report.add(decision)
        work.decisions += len(page.decisions)
        if page.next is None:
            break
        cursor = page.next
        await asyncio.sleep(0)
    # What was spent on measuring cannot be told apart by other filters.
    spending = await spending_between(state, wanted.since, wanted.until) if wanted.only_times else None
    return await asyncio.to_thread(report.to_json, evidence_of(snapshot), spending)


async def _selection_bias(state: ReportSources, snapshot: RoutingSnapshot) -> SelectionBias:
    """Compute it from the graded answers of the last jobs, as far as they are kept."""
    graded, estimator = None, ESTIMATORS[state.settings.recipe]
    with suppress(InvalidInput):  # the validation set is broken, or another one now
        if found := await state.jobs.graded_answers():
            assigned = await state.jobs.validation_prompts()
            scores = {
                name: np.array([answers.get(prompt.id, np.nan) for prompt in assigned.prompts])
                for name, answers in found.items()
            }
            graded = GradedPrompts(assigned.assignment.dense(assigned.clusters), scores)
    return await asyncio.to_thread(SelectionBias, snapshot.profiles, snapshot.cluster_map, estimator, graded)


async def spending_between(state: ReportSources, since: float | None, until: float | None) -> dict[str, Any]:
    """Return what was spent between two times, Unix seconds. None: as far back as it is kept, and now.

    Days are those that lie wholly in this time (UTC), and today so far. A job counts with all that it spent, at the
    time when it was submitted. What judges cost is part of what the job spent.

    Raises:
        StoreUnavailable
    """
    now = time.time()
    end = now if until is None else min(until, now)
    begin = max(0.0 if since is None else since, end - MAX_DAYS * DAY_S)
    jobs = await state.jobs.submitted_between(max(begin, now - KEPT_S), end)
    totals = await read_day_totals(state.store, _days(begin, end, now))
    return {
        "days": {
            day: {
                "requests": found.get("requests", 0),
                "cost_usd": found.get("cost_picousd", 0) / PICO,
                "cost_unknown": found.get("cost_unknown", 0),
            }
            for day, found in totals.items()
        },
        "profiling": profiling_costs(jobs),
    }


def _days(begin: float, end: float, now: float) -> list[str]:
    """Return the whole days between two times, and today if `end` is now."""
    first = math.ceil(begin / DAY_S)
    last = int(end // DAY_S) if end >= now else int(end // DAY_S) - 1
    return [f"{datetime.fromtimestamp(day * DAY_S, UTC):%Y-%m-%d}" for day in range(first, last + 1)]


def profiling_costs(jobs: Iterable[tuple[float, Job]]) -> dict[str, Any]:
    """Sum up what jobs have spent, each with the time of its submission. Of those `unpriced` it is not known."""
    by_model: defaultdict[str, int] = defaultdict(int)
    by_day: defaultdict[str, int] = defaultdict(int)
    count = unpriced = 0
    for at, job in jobs:
        count += 1
        if job.spent_usd is None:
            unpriced += 1
            continue
        spent = picousd(job.spent_usd)
        by_model[job.model] += spent
        by_day[f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"] += spent
    return {
        "usd": sum(by_model.values()) / PICO,
        "jobs": count,
        "unpriced": unpriced,
        "by_model": {model: spent / PICO for model, spent in sorted(by_model.items())},
        "by_day": {day: spent / PICO for day, spent in sorted(by_day.items())},
    }


def evidence_of(snapshot: RoutingSnapshot) -> Evidence:
    """Return the labels behind the profile of each measured model."""
    return {
        name: MeasuredLabels(profile.map_id, tuple(profile.labels.tolist()))
        for name, profile in snapshot.profiles.items()
    }
