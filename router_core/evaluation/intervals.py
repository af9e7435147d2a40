"""How sure a mean over trials is: bootstrap intervals, also of paired differences. Runs no trial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.types import Doubles

NAN = float("nan")
LEVEL = 0.95
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Difference:
    """Ours minus theirs, the mean over trials. NaN where no trial has both."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Doubles, *, seed: int, level: float = LEVEL, draws: int = DRAWS) -> tuple[float, float]:
    """The percentile interval of the mean of (T,) `values`; NaN trials are left out, and with none left it is NaN.

    One trial alone has an interval of no width: it says nothing of the next.
    """
    known = values[~np.isnan(values)]
    if not known.size:
        return NAN, NAN
    drawn = np.random.default_rng(seed).integers(known.size, size=(draws, known.size))
    return percentile_interval(known[drawn].mean(axis=1), level=level)


def percentile_interval(drawn: Doubles, *, level: float = LEVEL) -> tuple[float, float]:
    """Of what (D,) bootstrap draws gave; NaN ones are left out, and with none left it is NaN."""
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        return NAN, NAN
    low, high = np.quantile(known, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def paired_difference(ours: Doubles, theirs: Doubles, *, seed: int) -> Difference:
    """Both (T,), of the same trials in the same order: what a trial makes harder for both cancels out."""
    if ours.shape != theirs.shape:
        raise ValueError(f"a paired difference needs the same trials of both; got {ours.shape} and {theirs.shape}")
    differences = ours - theirs
    known = differences[~np.isnan(differences)]
    low, high = bootstrap_interval(known, seed=seed)
    return Difference(float(known.mean()) if known.size else NAN, low, high)
