"""What was spent in a time: on requests, by day, and on measuring models. And what is known of the models' profiles."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from proxy.profiling.job_store import KEPT_S, Job
from proxy.server.dependencies import AppState
from proxy.storage.savings import Evidence, MeasuredLabels
from proxy.storage.snapshot import RoutingSnapshot
from proxy.storage.usage_writer import DAY_S, MAX_DAYS, read_day_totals
from router_core.pricing import PICO, picousd


async def spending_between(state: AppState, since: float | None, until: float | None) -> dict[str, Any]:
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
