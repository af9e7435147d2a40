from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from router_core.eligibility import Eligibility, LazyRanking
from router_core.types import Assignment, Doubles, Indices

EPSILON = 1e-9
"""Relative step into an open interval, well above rounding and well below any λ that people write."""

MAX_LAMBDA = 1e12
"""Nobody asks for more, and beyond costs that are next to nothing would decide, or overflow."""


def argmin_with_ties(scores: Doubles, costs: Doubles, tie: float) -> int:
    """Row of the cheapest among those within `tie` of the best score; the first of equally cheap ones."""
    return int(np.where(scores <= scores.min() + tie, costs, np.inf).argmin())


def argmin_rows_with_ties(scores: Doubles, costs: Doubles, tie: float) -> Indices:
    """(n,) the same for each row of (n, m) scores and costs."""
    near = scores <= scores.min(axis=1, keepdims=True) + tie
    return np.asarray(np.where(near, costs, np.inf).argmin(axis=1))


def lambda_thresholds(errors: Doubles, costs: Doubles, lambda_: float, tie: float) -> Doubles:
    """(m,) per row the λ from 0 to MAX_LAMBDA nearest to `lambda_` at which `argmin_with_ties` picks it; NaN: never.

    A row is near enough to the best on one interval of λ (the best score is concave in λ), and is chosen there wherever
    no cheaper row is near enough too.
    """
    low, high = _near_intervals(errors, costs, tie)
    high = np.minimum(high, MAX_LAMBDA)
    flips = np.full(len(costs), np.nan)
    cheaper = np.empty((0, 2))
    for row in np.argsort(costs, kind="stable"):
        if low[row] > high[row]:
            continue
        for point in _open_points(low[row], high[row], cheaper, lambda_):
            if argmin_with_ties(errors + point * costs, costs, tie) == row:
                flips[row] = point
                break
        cheaper = np.vstack((cheaper, (low[row], high[row])))
    return flips


def _near_intervals(errors: Doubles, costs: Doubles, tie: float) -> tuple[Doubles, Doubles]:
    """(m,) bounds of the λ at which each row lies within `tie` of every other: λ(c_m − c_j) ≤ e_j − e_m + tie."""
    slack = errors[None, :] - errors[:, None] + tie
    dearer_by = costs[:, None] - costs[None, :]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        crossing = slack / dearer_by
    high = np.where(dearer_by > 0, crossing, np.inf).min(axis=1)
    low = np.maximum(np.where(dearer_by < 0, crossing, 0.0).max(axis=1), 0.0)
    never = ((dearer_by == 0) & (slack < 0)).any(axis=1)
    return np.where(never, np.inf, low), np.where(never, -np.inf, high)


def _open_points(low: float, high: float, covered: Doubles, target: float) -> Doubles:
    """Points of [low, high] outside the (n, 2) `covered` intervals, the one nearest to `target` first.

    Within a gap the nearest point is the target itself or an end of the gap, so the ends are all that need be tried:
    each as it is, and one step to either side, since ends of covered intervals are closed.
    """
    ends = np.concatenate(([low, high, np.clip(target, low, high)], covered.ravel()))
    ends = ends[np.isfinite(ends)]
    points = np.concatenate((ends, ends * (1 - EPSILON), ends * (1 + EPSILON), ends + EPSILON))
    points = points[(points >= low) & (points <= high)]
    inside = ((points[:, None] >= covered[:, 0]) & (points[:, None] <= covered[:, 1])).any(axis=1)
    points = np.unique(points[~inside])
    return np.asarray(points[np.argsort(np.abs(points - target), kind="stable")])


Z = 1.645
"""Standard normal quantile of the 90 % interval around an expected error."""


@dataclass(frozen=True, eq=False)
class ScoreDetails:
    """What the m scores were made of, beyond what it takes to choose; each array (m,) float64."""

    labels: Doubles
    """How many labels an expected error is worth."""
    costs_usd: Doubles
    output_tokens: Doubles
    seconds: Doubles


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The m models that one prompt may go to, in order of name; each array (m,) float64."""

    names: Sequence[str]
    errors: Doubles
    costs: Doubles
    scores: Doubles
    work_out: Callable[[], ScoreDetails] = field(repr=False)

    @cached_property
    def details(self) -> ScoreDetails:
        return self.work_out()

    @property
    def costs_usd(self) -> Doubles:
        return self.details.costs_usd

    def with_scores(self, scores: Doubles) -> ScoreTable:
        return replace(self, scores=scores)


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """One row of a decision. `error_low` and `error_high` bound the expected error with 90 % confidence."""

    model: str
    expected_error: float
    error_low: float
    error_high: float
    expected_cost_usd: float
    cost: float
    score: float
    output_tokens: float
    seconds: float
    flips_at_lambda: float | None
    """The λ nearest to the one in use that makes this model the choice; None where no λ does."""


@dataclass(frozen=True, eq=False)
class RoutingDecision:
    """Unpacks as `chosen, score, scores`."""

    table: ScoreTable
    choice: int
    """Row of `table`."""
    lambda_: float
    tie: float
    assignment: Assignment | None
    """Φ(x); None where the prompt could not be placed."""
    cluster_names: tuple[str, ...] = ()
    eligibility: Eligibility | None = None
    """Who was ruled out before scoring."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.chosen, self.score, self.scores))

    @cached_property
    def chosen(self) -> str:
        return self.table.names[self.choice]

    @property
    def score(self) -> float:
        return float(self.table.scores[self.choice])

    @cached_property
    def scores(self) -> Mapping[str, float]:
        return dict(zip(self.table.names, self.table.scores.tolist(), strict=True))

    @cached_property
    def ranking(self) -> Sequence[str]:
        """All eligible models: the choice, then by score, cost and name."""
        return LazyRanking(self.chosen, len(self.table.scores), self._ranked)

    def _ranked(self) -> tuple[str, ...]:
        order = np.lexsort((self.table.costs, self.table.scores)).tolist()
        return (self.chosen, *(self.table.names[row] for row in order if row != self.choice))

    @cached_property
    def clusters(self) -> tuple[tuple[int, str, float], ...]:
        """(number, name, weight), heaviest first; empty where the prompt could not be placed."""
        if self.assignment is None:
            return ()
        ids, weights = self.assignment.ids[0].tolist(), self.assignment.weights[0].tolist()
        return tuple(
            (cluster, self.cluster_names[cluster], weight) for cluster, weight in zip(ids, weights, strict=True)
        )

    @property
    def ineligible(self) -> Mapping[str, str]:
        """Ruled-out model → why."""
        return self.eligibility.reasons if self.eligibility else {}

    @cached_property
    def candidates(self) -> tuple[ScoredCandidate, ...]:
        """In order of `ranking`, with intervals and the λ at which each would be chosen."""
        table, details = self.table, self.table.details
        flips = lambda_thresholds(table.errors, table.costs, self.lambda_, self.tie)
        low, high = wilson_interval(table.errors, details.labels)
        columns = (
            table.errors,
            low,
            high,
            details.costs_usd,
            table.costs,
            table.scores,
            details.output_tokens,
            details.seconds,
        )
        flips_or_none = [None if math.isnan(flip) else flip for flip in flips.tolist()]
        values = zip(table.names, *(column.tolist() for column in columns), flips_or_none, strict=True)
        rows = {row.model: row for row in (ScoredCandidate(*value) for value in values)}
        return tuple(rows[name] for name in self.ranking)


def wilson_interval(rates: Doubles, labels: Doubles) -> tuple[Doubles, Doubles]:
    """90 % bounds of rates measured on so many labels (Wilson 1927); with no labels, from 0 to 1."""
    n = np.maximum(labels, 1e-9)
    centre = (rates + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(rates * (1 - rates) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)
