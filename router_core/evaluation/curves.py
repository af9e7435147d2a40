from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.types import Doubles

NAN = float("nan")

DEFAULT_LEVEL = 0.95

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference over trials, ours minus theirs, with its interval. NaN if no trial has both."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Doubles, *, seed: int, level: float = DEFAULT_LEVEL, draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """Return the bootstrap percentile interval (Efron 1979) of the mean of (T,) values, NaN ones left out.

    It is NaN if no value is left. A single trial has an interval of no width, which says nothing about the next trial.
    """
    known = values[~np.isnan(values)]
    if not known.size:
        return NAN, NAN
    drawn = np.random.default_rng(seed).integers(known.size, size=(draws, known.size))
    return percentile_interval(known[drawn].mean(axis=1), level=level)


def percentile_interval(drawn: Doubles, *, level: float = DEFAULT_LEVEL) -> tuple[float, float]:
    """Return the percentile interval of (D,) bootstrap draws, NaN ones left out; NaN if none is left."""
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        return NAN, NAN
    low, high = np.quantile(known, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def paired_difference(ours: Doubles, theirs: Doubles, *, seed: int) -> Difference:
    """Return the mean of `ours` − `theirs`, both (T,) of the same trials in the same order.

    What makes a trial harder for both cancels out.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"a paired difference needs the same trials of both; got {ours.shape} and {theirs.shape}")
    differences = ours - theirs
    known = differences[~np.isnan(differences)]
    low, high = bootstrap_interval(known, seed=seed)
    return Difference(float(known.mean()) if known.size else NAN, low, high)


# Budgets that an area is averaged over.
BUDGETS = 200

# Relative tolerance: sums of the same numbers in another order are the same cost, or quality.
SLACK = 1e-12


@dataclass(frozen=True, eq=False)
class Curve:
    """A deferral curve: what a router costs and achieves at L cost weights λ, ascending from 0 to infinity.

    Points stay in the order of λ, dominated ones included. Between two consecutive points lie their mixtures, where
    each prompt is routed by the one or the other λ at random.
    """

    costs: Doubles
    """(L,) mean over the test prompts. Not monotone if the curve is noisy."""
    qualities: Doubles
    """(L,) mean score."""

    def __post_init__(self) -> None:
        if self.costs.ndim != 1 or not self.costs.size or self.costs.shape != self.qualities.shape:
            raise ValueError(
                f"a curve needs as many costs as qualities; got {self.costs.shape}, {self.qualities.shape}"
            )


@dataclass(frozen=True, slots=True)
class Baselines:
    """What a curve is compared with: single models on the same test prompts, in mean cost and mean score."""

    cheapest: float
    best: float
    """Cost of the model with the best mean score."""
    most_expensive: float
    best_quality: float

    @classmethod
    def from_models(cls, costs: Doubles, qualities: Doubles) -> Baselines:
        """Compare (M,) single models; of equally good ones, the cheapest is the best."""
        best = int(np.lexsort((costs, -qualities))[0])
        return cls(float(costs.min()), float(costs[best]), float(costs.max()), float(qualities[best]))


@dataclass(frozen=True, slots=True)
class CurveMetrics:
    """What is read off a deferral curve. NaN where undefined."""

    area: float
    paper_area: float
    paper_area_half: float
    qnc: float
    """Least cost that reaches the best single model's quality, relative to that model's cost."""
    peak: float
    """The best quality on the curve."""
    perf_gain: float
    """How far the peak is above the best single model, as a share of its quality."""
    cost_save: float
    """1 − QNC."""


def quality_within(curve: Curve, budgets: Doubles) -> Doubles:
    """Return the quality that each budget buys: that of the first point, in order of λ, that costs no more.

    Unless that is the first of all, the rest of the budget is spent by mixing it with the point before, which is above
    the budget. A budget below the whole curve gets the last point.
    """
    costs, qualities = curve.costs, curve.qualities
    limits = budgets + SLACK * np.abs(budgets)
    first = np.searchsorted(-np.minimum.accumulate(costs), -limits)
    here = np.minimum(first, costs.size - 1)
    before = np.maximum(here - 1, 0)
    mixed = (first > 0) & (first < costs.size)
    span = np.where(mixed, costs[before] - costs[here], 1.0)
    share = np.where(mixed, np.clip((costs[before] - budgets) / span, 0.0, 1.0), 1.0)
    return np.asarray(qualities[before] + share * (qualities[here] - qualities[before]))


def area(curve: Curve, cheapest: float, best: float) -> float:
    """Return the mean quality over BUDGETS equally spaced budgets, ends included; NaN if the best is the cheapest."""
    if not best > cheapest:
        return NAN
    return float(quality_within(curve, np.linspace(cheapest, best, BUDGETS)).mean())


def paper_area(curve: Curve, cheapest: float, most_expensive: float, share: float = 1.0) -> float:
    """Return UniRoute's area (arXiv 2502.08773): ∫ quality over the relative cost, from the cheapest up to `share`.

    Costs are relative to the most expensive model's. The integral is exact, as quality is linear in the budget between
    two costs of the curve. NaN if it is empty.
    """
    low, high = cheapest, share * most_expensive
    if not high > low:
        return NAN
    edges = np.unique(np.concatenate(([low, high], np.clip(curve.costs, low, high))))
    middles = (edges[1:] + edges[:-1]) / 2
    return float(np.diff(edges) @ quality_within(curve, middles)) / most_expensive


def least_cost(curve: Curve, quality: float) -> float:
    """Return the least cost at which `quality` is reached, on or between two consecutive points; NaN if nowhere."""
    costs, qualities = curve.costs, curve.qualities
    reached = qualities >= quality - SLACK * abs(quality)
    crossing = np.flatnonzero(reached[1:] != reached[:-1])
    start, rise = qualities[crossing], qualities[crossing + 1] - qualities[crossing]
    share = np.clip((quality - start) / rise, 0.0, 1.0)
    between = costs[crossing] + share * (costs[crossing + 1] - costs[crossing])
    return float(np.concatenate((costs[reached], between)).min(initial=np.inf)) if reached.any() else NAN


def curve_metrics(curve: Curve, baselines: Baselines) -> CurveMetrics:
    qnc = _ratio(least_cost(curve, baselines.best_quality), baselines.best)
    peak = float(curve.qualities.max())
    return CurveMetrics(
        area=area(curve, baselines.cheapest, baselines.best),
        paper_area=paper_area(curve, baselines.cheapest, baselines.most_expensive),
        paper_area_half=paper_area(curve, baselines.cheapest, baselines.most_expensive, 0.5),
        qnc=qnc,
        peak=peak,
        perf_gain=_ratio(peak, baselines.best_quality) - 1.0,
        cost_save=1.0 - qnc,
    )


def _ratio(value: float, of: float) -> float:
    return value / of if of > 0 else NAN
