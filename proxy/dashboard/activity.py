"""What this server has done lately, from the counters of its metrics: those of all its workers together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxy.concurrency import background
from proxy.server.metrics import FastCounter, FastHistogram, Metrics

SAMPLE_INTERVAL_S = 5.0

# Ten minutes.
MAX_SAMPLES = 121

# What "now" means: rates are those of so many seconds.
WINDOW_S = 60.0

# Two samples closer together than this tell nothing of a rate.
MIN_WINDOW_S = 1.0

# Endings that a caller counts as a failure of ours or of the models.
FAILED = frozenset({"failed", "busy", "broken", "empty", "shutdown"})

INFINITE = float("inf")


@dataclass(frozen=True)
class Sample:
    """The counters at one time, each ever since the server started."""

    at: float
    """Unix seconds."""
    requests: Mapping[str, float]
    """By model."""
    failed: float
    cost_usd: float
    prompt_tokens: float
    attempts_failed: Mapping[str, float]
    """By model."""
    refused: Mapping[str, float]
    """Responses that were errors, by status."""
    overhead: Sequence[tuple[float, float]]
    """(upper bound in seconds, requests up to it)."""

    @property
    def total(self) -> float:
        return sum(self.requests.values())


@dataclass(frozen=True, slots=True)
class ModelShare:
    model: str
    requests: float
    share: float
    attempts_failed: float


@dataclass(frozen=True)
class Figures:
    """Rates of the last minute, and the course of the last ten. None: not known yet."""

    window_s: float
    requests_per_s: float | None
    overhead_p50_ms: float | None
    overhead_p99_ms: float | None
    usd_per_hour: float | None
    failed_share: float | None
    shares: Sequence[ModelShare]
    """Of the requests of the window, the most first."""
    refused: Sequence[tuple[str, float]]
    """Responses of the window that were errors: status, how many."""
    course: Sequence[tuple[float, float]]
    """(Unix seconds, requests a second until then)."""
    total_requests: float
    total_usd: float


class Activity:
    """Take samples of the counters, and tell what happened between them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    async def run(self, metrics: Metrics) -> None:
        while True:
            self._samples.append(self.sample(metrics))
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def running(self, metrics: Metrics) -> Any:
        """Take samples as long as the context that this returns is open."""
        return background("uniroute-dashboard", partial(self.run, metrics))

    def sample(self, metrics: Metrics) -> Sample:
        metrics.values.refresh()
        requests: dict[str, float] = {}
        failed = 0.0
        for (model, _, ending), count in _series(metrics.requests):
            requests[model] = requests.get(model, 0.0) + count
            failed += count if ending in FAILED else 0.0
        attempts: dict[str, float] = {}
        for (model, _), count in _series(metrics.attempts_failed):
            attempts[model] = attempts.get(model, 0.0) + count
        return Sample(
            at=self._clock(),
            requests=requests,
            failed=failed,
            cost_usd=sum(count for _, count in _series(metrics.cost)),
            prompt_tokens=sum(count for (_, kind), count in _series(metrics.tokens) if kind == "prompt"),
            attempts_failed=attempts,
            refused={status: count for (status,), count in _series(metrics.errors)},
            overhead=_buckets(metrics.overhead),
        )

    def figures(self, metrics: Metrics) -> Figures:
        """Compare now with a minute ago, or with the oldest sample since."""
        now = self.sample(metrics)
        recent = [sample for sample in self._samples if now.at - sample.at <= WINDOW_S + SAMPLE_INTERVAL_S]
        before = recent[0] if recent else now
        seconds = now.at - before.at
        known = seconds >= MIN_WINDOW_S
        requests = now.total - before.total
        buckets = [
            (bound, count - earlier) for (bound, count), (_, earlier) in zip(now.overhead, before.overhead, strict=True)
        ]
        p50, p99 = (quantile(buckets, share) for share in (0.5, 0.99))
        return Figures(
            window_s=seconds,
            requests_per_s=requests / seconds if known else None,
            overhead_p50_ms=None if p50 is None else 1e3 * p50,
            overhead_p99_ms=None if p99 is None else 1e3 * p99,
            usd_per_hour=3600 * (now.cost_usd - before.cost_usd) / seconds if known else None,
            failed_share=(now.failed - before.failed) / requests if requests > 0 else None,
            shares=_shares(before, now),
            refused=[
                (status, count - before.refused.get(status, 0.0))
                for status, count in sorted(now.refused.items())
                if count > before.refused.get(status, 0.0)
            ],
            course=[
                (later.at, max(0.0, later.total - earlier.total) / (later.at - earlier.at))
                for earlier, later in zip(self._samples, list(self._samples)[1:], strict=False)
                if later.at > earlier.at
            ],
            total_requests=now.total,
            total_usd=now.cost_usd,
        )


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Return a quantile of a histogram, linear within its bucket; None if it is empty.

    Args:
        buckets: (upper bound, how many are up to it), ascending. Of the last bucket, which has no bound, the lower one
            is returned.
    """
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return None
    wanted, low, below = share * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low if bound == INFINITE else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def _shares(before: Sample, now: Sample) -> list[ModelShare]:
    counts = {model: count - before.requests.get(model, 0.0) for model, count in now.requests.items()}
    failures = {model: count - before.attempts_failed.get(model, 0.0) for model, count in now.attempts_failed.items()}
    total = sum(counts.values())
    models = {model for model, count in {**failures, **counts}.items() if count > 0}
    shares = [
        ModelShare(model, counts.get(model, 0.0), counts.get(model, 0.0) / total if total else 0.0, failed)
        for model in models
        if (failed := failures.get(model, 0.0)) or counts.get(model, 0.0)
    ]
    return sorted(shares, key=lambda each: (-each.requests, each.model))


def _series(counter: FastCounter) -> list[tuple[tuple[str, ...], float]]:
    return [
        (tuple(sample.labels.values()), sample.value)
        for sample in counter.family().samples
        if sample.name.endswith("_total")
    ]


def _buckets(histogram: FastHistogram) -> list[tuple[float, float]]:
    return [
        (float(sample.labels["le"]), sample.value)
        for family in histogram.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
