"""Print how soon a change of a model is told, and how often one is told that was none.

`python -m tests.bench.quality_alarms` draws labels of single models by the hour, as feedback makes them, and looks for
a change after every hour of quiet weeks, or after every label once the model has changed. For comparison it prints the
delay of a test of all labels against the measured rate, two-sided at p < 0.001, of 60 measured labels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from proxy.storage.feedback import HOURS_KEPT, MAX_P, two_proportion_p
from router_core.change_point import change_point

QUIET_WEEKS, RUNS, MAX_LABELS, MEASURED_LABELS = 200, 60, 1500, 60.0


def false_alarms(rng: np.random.Generator, per_day: float, rate: float, weeks: int) -> tuple[int, float]:
    """Return how often an alarm begins in so many quiet weeks, looked at after every hour, and the days looked at."""
    began, days = 0, 0.0
    for _ in range(weeks // 4):
        labels = rng.poisson(per_day / 24, 28 * 24)
        errors = rng.binomial(labels, rate)
        on = False
        for now in range(24, len(labels)):
            first = max(0, now - HOURS_KEPT)
            was, on = on, is_told(labels[first:now], errors[first:now], rate)
            began += on and not was
        days += 27
    return began, days


def is_told(labels: ArrayLike, errors: ArrayLike, expected: float) -> bool:
    counts, wrong = np.asarray(labels, dtype=float), np.asarray(errors, dtype=float)
    found = change_point(range(len(counts)), counts, wrong, expected * counts)
    return found is not None and found.is_certain


def delay(rng: np.random.Generator, per_day: float, days: int, rates: tuple[float, float]) -> tuple[int, int]:
    """Return after how many labels a change is told, and a test of all labels is; MAX_LABELS if later."""
    labels = rng.poisson(per_day / 24, days * 24).tolist()
    errors = rng.binomial(labels, rates[0]).tolist()
    told = tested = MAX_LABELS
    after = 0
    while after < MAX_LABELS and max(told, tested) == MAX_LABELS:
        labels.append(0)
        errors.append(0)
        for wrong in rng.random(rng.poisson(per_day / 24)) < rates[1]:
            after += 1
            labels[-1] += 1
            errors[-1] += int(wrong)
            if told == MAX_LABELS and is_told(labels, errors, rates[0]):
                told = after
            if tested == MAX_LABELS:
                count = float(sum(labels))
                p = two_proportion_p(sum(errors) / count, count, rates[0], MEASURED_LABELS)
                tested = after if p < MAX_P else MAX_LABELS
    return told, tested


def lines(scale: float) -> Iterator[str]:
    rng = np.random.default_rng(0)
    yield "labels a day, error rate: alarms in quiet days of one model"
    for per_day in (24, 100, 600):
        for rate in (0.05, 0.15, 0.4):
            began, days = false_alarms(rng, per_day, rate, round(scale * QUIET_WEEKS))
            yield f"{per_day:5} {rate:5.2f}: {began} in {days:,.0f} days"
    yield "labels a day, days before, error rate before and after: labels until it is told, median (90 %); z-test"
    for per_day, days in ((100, 1), (100, 7), (600, 1), (600, 7)):
        for rates in ((0.15, 0.3), (0.15, 0.45), (0.15, 0.6)):
            found = np.array([delay(rng, per_day, days, rates) for _ in range(max(1, round(scale * RUNS)))])
            middle, late = np.median(found, axis=0), np.quantile(found, 0.9, axis=0)
            shown = "; ".join(f"{_shown(m)} ({_shown(n)})" for m, n in zip(middle, late, strict=True))
            yield f"{per_day:5} {days:2} {rates[0]:.2f} {rates[1]:.2f}: {shown}"


def _shown(labels: float) -> str:
    return f"{labels:.0f}" if labels < MAX_LABELS else f"over {MAX_LABELS}"


if __name__ == "__main__":
    for line in lines(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0):
        print(line, flush=True)  # noqa: T201
