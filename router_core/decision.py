from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from router_core.eligibility import Eligibility, LazyRanking
from router_core.estimators import SHRINKAGE
from router_core.kernels import Figures, argmin_with_ties
from router_core.types import Assignment, Doubles, Indices

# Relative step into an open interval, well above rounding and well below any λ that people write.
EPSILON = 1e-9

# λ is not searched beyond: costs next to nothing would decide there, or overflow.
MAX_LAMBDA = 1e12

# Quantile of the standard normal distribution for two-sided 90 % bounds.
Z_90 = 1.645


def argmin_rows_with_ties(scores: Doubles, costs: Doubles, tie: float) -> Indices:
    """Do what `argmin_with_ties` does for each row of (n, m) scores and costs; returns (n,) columns."""
    near = scores <= scores.min(axis=1, keepdims=True) + tie
    return np.asarray(np.where(near, costs, np.inf).argmin(axis=1))


def lambda_thresholds(errors: Doubles, costs: Doubles, lambda_: float, tie: float) -> Doubles:
    """Find, per model, the λ nearest to `lambda_` at which `argmin_with_ties` picks it.

    A row is within `tie` of the best on one interval of λ, as the best score is concave in λ. It is chosen wherever in
    that interval no cheaper row is within `tie` too.

    Args:
        errors, costs: (m,) of the models.

    Returns:
        (m,) λ from 0 to MAX_LAMBDA; NaN where none does.
    """
    low, high = _tie_intervals(errors, costs, tie)
    high = np.minimum(high, MAX_LAMBDA)
    thresholds = np.full(len(costs), np.nan)
    cheaper = np.empty((0, 2))
    for row in np.argsort(costs, kind="stable"):
        if low[row] > high[row]:
            continue
        for point in _uncovered_points(low[row], high[row], cheaper, lambda_):
            if argmin_with_ties(errors + point * costs, costs, tie) == row:
                thresholds[row] = point
                break
        cheaper = np.vstack((cheaper, (low[row], high[row])))
    return thresholds


def _tie_intervals(errors: Doubles, costs: Doubles, tie: float) -> tuple[Doubles, Doubles]:
    """Return (m,) bounds of the λ at which each row m is within `tie` of all j: λ(c_m − c_j) ≤ e_j − e_m + tie."""
    slack = errors[None, :] - errors[:, None] + tie
    extra_cost = costs[:, None] - costs[None, :]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        crossing = slack / extra_cost
    high = np.where(extra_cost > 0, crossing, np.inf).min(axis=1)
    low = np.maximum(np.where(extra_cost < 0, crossing, 0.0).max(axis=1), 0.0)
    never = ((extra_cost == 0) & (slack < 0)).any(axis=1)
    return np.where(never, np.inf, low), np.where(never, -np.inf, high)


def _uncovered_points(low: float, high: float, covered: Doubles, target: float) -> Doubles:
    """Return points of [low, high] outside the (n, 2) `covered` intervals, the nearest to `target` first.

    Within a gap the nearest point is the target itself or an end of the gap, so only the ends need be tried: each as it
    is, and one step to either side, since covered intervals include their ends.
    """
    ends = np.concatenate(([low, high, np.clip(target, low, high)], covered.ravel()))
    ends = ends[np.isfinite(ends)]
    points = np.concatenate((ends, ends * (1 - EPSILON), ends * (1 + EPSILON), ends + EPSILON))
    points = points[(points >= low) & (points <= high)]
    inside = ((points[:, None] >= covered[:, 0]) & (points[:, None] <= covered[:, 1])).any(axis=1)
    points = np.unique(points[~inside])
    return np.asarray(points[np.argsort(np.abs(points - target), kind="stable")])


def wilson_interval(rates: Doubles, labels: Doubles) -> tuple[Doubles, Doubles]:
    """Return 90 % bounds of (m,) rates measured on (m,) labels (Wilson 1927); without labels, 0 and 1."""
    n = np.maximum(labels, 1e-9)
    centre = (rates + Z_90**2 / (2 * n)) / (1 + Z_90**2 / n)
    half = Z_90 * np.sqrt(rates * (1 - rates) / n + Z_90**2 / (4 * n**2)) / (1 + Z_90**2 / n)
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)


def mix_deviations(weights: Doubles, errors: Doubles, labels: Doubles) -> Doubles:
    """Return the (M,) standard deviations of Σ_k w_mk·e_mk: what M models get wrong of a mix of prompts.

    A rate of a mix is worth 1 / Σ (r_k² / n_k) labels, with r the mix and n the labels, but never more than the model
    has: what each cluster takes from the others is no label of its own. It varies as a beta distribution does, by
    e(1 − e) ÷ (labels + 1). It is the same rate for all prompts of a cluster, however many they are.

    Deviations of several models add up at most to their sum, as they were measured on the same prompts, and the
    deviation of a difference between models is at most the root of the sum of squares. On public outcome data such
    bounds held the truth in 92 to 98 of 100 draws of 60 to 800 labels; see docs/evaluation.md.

    Args:
        weights, errors, labels: (M, K); labels with the shrinkage, as `Pool.label_weights` has them.
    """
    size = np.abs(weights)
    shares = size.sum(axis=1)
    mix = np.divide(size, shares[:, None], out=np.zeros_like(size), where=shares[:, None] > 0)
    rates = (mix * errors).sum(axis=1)
    spread = (mix**2 / np.maximum(labels, 1e-9)).sum(axis=1)
    worth = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    worth = np.minimum(worth, np.maximum(labels - SHRINKAGE, 0.0).sum(axis=1))
    return np.asarray(shares * np.sqrt(np.clip(rates * (1.0 - rates), 0.0, 0.25) / (worth + 1.0)))


@dataclass(frozen=True, eq=False)
class ScoreDetails:
    """What the m scores were computed from and what choosing does not need; each array is (m,) float64."""

    labels: Doubles
    """The number of labels that an expected error is worth."""
    output_tokens: Doubles
    seconds: Doubles
    measured: Doubles
    """Errors as they were measured, without what was added for doubts."""
    by_tools: Doubles
    """What of these is due to tools."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The m models that one prompt may go to, in order of name; each array is (m,) float64."""

    names: Sequence[str]
    errors: Doubles
    costs: Doubles
    scores: Doubles
    costs_usd: Doubles
    compute_details: Callable[[], ScoreDetails] = field(repr=False)

    @cached_property
    def details(self) -> ScoreDetails:
        return self.compute_details()


class Scores:
    """What scoring m models gave. The table is laid out when it is first read: choosing needs none."""

    def __init__(self, names: Sequence[str], figures: Figures, compute_details: Callable[[], ScoreDetails]) -> None:
        """
        Args:
            names: (m,)
            figures: errors, costs, scores and USD.
        """
        self.names = names
        self._figures = figures
        self._compute_details = compute_details

    @cached_property
    def table(self) -> ScoreTable:
        errors, costs, scores, costs_usd = unpack(self._figures)
        return ScoreTable(self.names, errors, costs, scores, costs_usd, self._compute_details)

    def ranked(self, choice: int) -> tuple[str, ...]:
        """Return all names: the choice first, then by score, cost and name."""
        order = np.lexsort((self.table.costs, self.table.scores)).tolist()
        return (self.names[choice], *(self.names[row] for row in order if row != choice))


def unpack(figures: Figures) -> Sequence[Doubles]:
    """Return (m,) errors, costs, scores and USD."""
    return list(np.frombuffer(figures).reshape(4, -1)) if isinstance(figures, bytes) else figures


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """One row of a decision. `error_low` and `error_high` bound the expected error with 90 % confidence."""

    model: str
    expected_error: float
    error_low: float
    error_high: float
    added: float
    """What of the expected error was not measured, but added for doubts."""
    by_tools: float
    """What of it is due to the tools of the request."""
    expected_cost_usd: float
    cost: float
    score: float
    output_tokens: float
    seconds: float
    flips_at_lambda: float | None
    """The λ nearest to the one in use at which this model is chosen; None where there is none."""


class RoutingDecision:
    """The choice for one prompt, and why. Unpacks as `chosen, score, scores`."""

    def __init__(
        self,
        scored: Scores,
        choice: int,
        *,
        lambda_: float,
        tie: float,
        assignment: Assignment | None,
        cluster_names: tuple[str, ...] = (),
        eligibility: Eligibility | None = None,
        has_doubts: bool = False,
    ) -> None:
        """
        Args:
            choice: row of the scores.
            assignment: Φ(x); None where there was no text to embed.
            eligibility: which models were ruled out before scoring.
            has_doubts: something was added to the errors.
        """
        self.choice = choice
        self.lambda_ = lambda_
        self.tie = tie
        self.assignment = assignment
        self.cluster_names = cluster_names
        self.eligibility = eligibility
        self.has_doubts = has_doubts
        self.chosen = scored.names[choice]
        self._scored = scored

    def __iter__(self) -> Iterator[Any]:
        return iter((self.chosen, self.score, self.scores))

    @property
    def table(self) -> ScoreTable:
        return self._scored.table

    @property
    def score(self) -> float:
        return float(self.table.scores[self.choice])

    @cached_property
    def scores(self) -> Mapping[str, float]:
        return dict(zip(self.table.names, self.table.scores.tolist(), strict=True))

    @cached_property
    def added(self) -> Doubles:
        """(m,) what was added to the errors for doubts."""
        return self.table.errors - self.table.details.measured

    @cached_property
    def ranking(self) -> Sequence[str]:
        """All eligible models: the choice first, then by score, cost and name."""
        return LazyRanking(self.chosen, len(self._scored.names), partial(self._scored.ranked, self.choice))

    @cached_property
    def clusters(self) -> tuple[tuple[int, str, float], ...]:
        """The prompt's clusters as (number, name, weight), heaviest first; empty without an assignment."""
        if self.assignment is None:
            return ()
        ids, weights = self.assignment.ids[0].tolist(), self.assignment.weights[0].tolist()
        return tuple(
            (cluster, self.cluster_names[cluster], weight) for cluster, weight in zip(ids, weights, strict=True)
        )

    @property
    def nearest_cosine(self) -> float | None:
        """How near the prompt is to its nearest centroid; None: it is not known."""
        if self.assignment is None or self.assignment.cosines is None:
            return None
        return float(self.assignment.cosines[0])

    @property
    def is_novel(self) -> bool | None:
        """Whether the prompt is farther from all centroids than nearly all prompts of the map; None: not known."""
        cosine, bound = self.nearest_cosine, self.eligibility.pool.novel_below if self.eligibility else None
        return None if cosine is None or bound is None else cosine < bound

    @property
    def ineligible(self) -> Mapping[str, str]:
        """Ruled-out model → reason."""
        return self.eligibility.reasons if self.eligibility else {}

    @cached_property
    def candidates(self) -> tuple[ScoredCandidate, ...]:
        """The scored models in order of `ranking`, with intervals and the λ at which each would be chosen."""
        table, details = self.table, self.table.details
        thresholds = lambda_thresholds(table.errors, table.costs, self.lambda_, self.tie)
        low, high = wilson_interval(details.measured, details.labels)
        columns = (
            table.errors,
            np.minimum(low + self.added, 1.0),
            np.minimum(high + self.added, 1.0),
            self.added,
            details.by_tools,
            table.costs_usd,
            table.costs,
            table.scores,
            details.output_tokens,
            details.seconds,
        )
        flips = [None if math.isnan(threshold) else threshold for threshold in thresholds.tolist()]
        values = zip(table.names, *(column.tolist() for column in columns), flips, strict=True)
        rows = {row.model: row for row in (ScoredCandidate(*value) for value in values)}
        return tuple(rows[name] for name in self.ranking)
