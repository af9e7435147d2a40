"""What every λ is expected to cost and to achieve on given prompts, by the rule that is served. Expects, bills nothing.

Expected figures come of profiles alone: with few labels the model that looks best is partly a lucky one (the winner's
curse), so they are too good by as much; see calibration_doubt.py. A model's context window is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.decision import argmin_rows_with_ties
from router_core.errors import InvalidInput, NoEligibleModel
from router_core.pool import Pool
from router_core.pricing import CENT_USD, reference_usd
from router_core.scoring import ScoringParams
from router_core.types import Assignment, Doubles, Indices

NINETY_PERCENT = 1.645
"""Standard deviations to either side."""


def quality_interval(
    expected: LambdaSweep, point: SweepPoint, pool: Pool, assignment: Assignment
) -> tuple[float, float] | None:
    """Bounds, with 90 % confidence, of a point's quality relative to the best single model's; None where that has none.

    Each rate is off by itself, by e(1 − e) ÷ (labels + 1), as a beta distribution would have it. The λ and the best
    model were chosen by the same rates, so the truth is in the lower half rather than in the upper one.

    Args:
        pool, assignment: what `expected` was made of.
    """
    best = expected.best_single()
    if best.quality <= 0:
        return None
    rows = [pool.index[name] for name in expected.models]
    errors, labels = pool.errors[rows], pool.label_weights[rows]
    routed, everywhere = _weights(expected, point, assignment.dense(errors.shape[1]))
    slopes = -routed / best.quality
    slopes[expected.models.index(best.model)] += point.quality / best.quality**2 * everywhere
    deviation = float(np.sqrt((slopes**2 * errors * (1.0 - errors) / (labels + 1.0)).sum()))
    relative = point.quality / best.quality
    return max(relative - NINETY_PERCENT * deviation, 0.0), relative + NINETY_PERCENT * deviation


def _weights(expected: LambdaSweep, point: SweepPoint, clusters: Doubles) -> tuple[Doubles, Doubles]:
    """(M, K) how much each rate counts in the quality of the routed prompts, and (K,) in that of a model for all."""
    chosen = expected.chosen(point.lambda_)
    routed = np.zeros((len(expected.models), clusters.shape[1]))
    np.add.at(routed, chosen, clusters)
    return routed / len(clusters), np.asarray(clusters.mean(axis=0))


PER_DECADE = 40
"""λs tried within each power of ten, before the one in question is narrowed down."""

BELOW = 1e-3
"""Where they begin: this share of the least λ at which the cheapest model of some prompt takes over."""

DIGITS = 3
"""Significant ones of a λ: as it is written, so it was tried."""

NARROWINGS = 20

SLACK = 1e-12
"""Relative: sums of the same numbers in another order are the same quality, or cost."""

SAME_COST = 1e-9
"""Relative difference below which two costs are one."""

DEFAULT_PARAMS = ScoringParams()


@dataclass(frozen=True, slots=True)
class BestSingleModel:
    """Always the same model."""

    model: str
    quality: float
    usd: float
    """Per request."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """All prompts routed at one λ."""

    lambda_: float
    quality: float
    """The mean of 1 − expected error."""
    usd: float
    """Per request."""
    shares: Mapping[str, float]
    """model → share of the prompts, the largest first; every model is in it."""


@dataclass(frozen=True, eq=False)
class LambdaSweep:
    """n prompts and the M models that can be chosen; all matrices are (n, M)."""

    models: tuple[str, ...]
    errors: Doubles
    usd: Doubles
    costs: Doubles
    """In units of λ."""
    tie: float

    def chosen(self, lambda_: float) -> Indices:
        """(n,) the model of each prompt."""
        return argmin_rows_with_ties(self.errors + lambda_ * self.costs, self.costs, self.tie)

    def at(self, lambda_: float) -> SweepPoint:
        chosen = self.chosen(lambda_)
        rows = np.arange(chosen.size)
        shares = np.bincount(chosen, minlength=len(self.models)) / chosen.size
        return SweepPoint(
            lambda_=lambda_,
            quality=float((1.0 - self.errors[rows, chosen]).mean()),
            usd=float(self.usd[rows, chosen].mean()),
            shares=MappingProxyType({self.models[m]: float(shares[m]) for m in np.argsort(-shares, kind="stable")}),
        )

    def best_single(self) -> BestSingleModel:
        """The model of the best expected quality; the cheapest of equals."""
        qualities, usd = (1.0 - self.errors).mean(axis=0), self.usd.mean(axis=0)
        best = int(np.lexsort((usd, -qualities))[0])
        return BestSingleModel(self.models[best], float(qualities[best]), float(usd[best]))


def sweep_lambdas(
    pool: Pool, assignment: Assignment, prompt_tokens: Doubles, terms: ScoringParams = DEFAULT_PARAMS
) -> LambdaSweep:
    """What the measured and priced models of a pool are expected to make of n prompts.

    Args:
        assignment: Φ of the prompts, on the map of the pool.
        prompt_tokens: (n,) of each.
        terms: of every request; its λ is what is sought, and not looked at.

    Raises:
        InvalidInput: there is no prompt.
        NoEligibleModel: no model has both a profile and a price.
    """
    if not len(assignment):
        raise InvalidInput("there is no prompt to expect anything of")
    profiled = ~np.isnan(pool.mean_errors)
    routable = np.flatnonzero(profiled & ~np.isnan(pool.prices.input))
    if not routable.size:
        raise NoEligibleModel("no model has both a profile and a price", {})
    output_tokens = np.minimum(assignment.expected(pool.output_tokens), pool.max_output_tokens)
    usd = pool.prices.expected_usd(prompt_tokens[:, None], output_tokens)
    waiting = terms.latency_weight * assignment.expected(pool.seconds)
    unit = _unit_usd(prompt_tokens, output_tokens[:, profiled].mean(axis=1), terms)
    return LambdaSweep(
        models=tuple(pool.names[row] for row in routable),
        errors=assignment.expected(pool.errors[routable]),
        usd=usd[:, routable],
        costs=((usd + waiting) / unit[:, None])[:, routable],
        tie=terms.tie,
    )


def cheapest_for_quality(expected: LambdaSweep, share: float) -> SweepPoint:
    """The largest λ whose quality is at least `share` of the best single model's.

    Raises:
        InvalidInput: no λ does; the message says what can be reached.
    """
    best = expected.best_single().quality
    points = [expected.at(weight) for weight in cost_weights(expected)]

    def reaches(point: SweepPoint) -> bool:
        return point.quality >= share * best - SLACK

    reaching = [row for row, point in enumerate(points) if reaches(point)]
    if not reaching:
        most = np.floor(1e4 * max(point.quality for point in points) / best) / 1e4
        raise InvalidInput(
            f"no λ is expected to reach {share:g} of the best single model's quality; the most within reach is {most:g}"
        )
    last = reaching[-1]
    return points[last] if last == len(points) - 1 else _narrowed(expected, points[last], points[last + 1], reaches)


def best_within_budget(expected: LambdaSweep, usd: float) -> SweepPoint:
    """The smallest λ whose expected cost is at most `usd` per request.

    Raises:
        InvalidInput: not even the cheapest models cost so little; the message says how much it takes.
    """
    points = [expected.at(weight) for weight in cost_weights(expected)]

    def affords(point: SweepPoint) -> bool:
        return point.usd <= usd * (1 + SLACK)

    first = next((row for row, point in enumerate(points) if affords(point)), None)
    if first is None:
        least = _written(1e3 * min(point.usd for point in points), up=True, digits=4)
        raise InvalidInput(
            f"no λ is expected to cost as little as ${1e3 * usd:g} per 1,000 requests; the least possible is ${least:g}"
        )
    return points[0] if first == 0 else _narrowed(expected, points[first], points[first - 1], affords)


def cost_weights(expected: LambdaSweep) -> list[float]:
    """λs, ascending, from 0 to where every prompt goes to its cheapest model; each of DIGITS significant digits."""
    rows = np.arange(len(expected.costs))
    cheapest = argmin_rows_with_ties(expected.costs, expected.costs, 0.0)
    least = expected.costs[rows, cheapest][:, None]
    dearer_by = expected.costs - least
    worth = expected.errors[rows, cheapest][:, None] - expected.errors - expected.tie
    held_back = (worth > 0) & (dearer_by > SAME_COST * least)
    takes_over = worth[held_back] / dearer_by[held_back]
    if not takes_over.size:
        return [0.0]
    low, high = BELOW * takes_over.min(), takes_over.max()
    tried = np.geomspace(low, high, 1 + round(PER_DECADE * np.log10(high / low)))
    return sorted({0.0, *(_written(float(weight), up=True) for weight in tried)})


def _narrowed(
    expected: LambdaSweep, good: SweepPoint, bad: SweepPoint, holds: Callable[[SweepPoint], bool]
) -> SweepPoint:
    """Towards the bad one as far as it holds, by halves; each λ on the way is one that can be written down."""
    for _ in range(NARROWINGS):
        between = _written((good.lambda_ + bad.lambda_) / 2)
        if between in (good.lambda_, bad.lambda_):
            break
        tried = expected.at(between)
        good, bad = (tried, bad) if holds(tried) else (good, tried)
    return good


def _written(value: float, *, up: bool = False, digits: int = DIGITS) -> float:
    """The nearest number of so many significant digits, or the next one that is not below."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (np.floor(np.log10(value)) - digits + 1)
    return float(f"{(np.ceil(value / step) if up else np.rint(value / step)) * step:.{digits}g}")


def _unit_usd(prompt_tokens: Doubles, output_tokens: Doubles, terms: ScoringParams) -> Doubles:
    """(n,) what a cost of one is to each prompt: the tokens at the reference price, or a cent."""
    if terms.cost_unit == "cents":
        return np.full(prompt_tokens.size, CENT_USD)
    asked = zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
    return np.array([reference_usd(int(tokens), mean, terms.reference) for tokens, mean in asked])
