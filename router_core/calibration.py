"""What each λ is expected to cost and to achieve on given prompts, by the rule that is served.

Expected figures come from profiles alone. With few labels the model that looks best owes that partly to luck (the
winner's curse), and the figures are too good by that much; `quality_interval` says by how much they may be off.
Context windows are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.decision import Z_90, argmin_rows_with_ties, mix_deviations
from router_core.errors import InvalidInput, NoEligibleModel
from router_core.pool import Pool
from router_core.pricing import CENT_USD, reference_usd
from router_core.scoring import ScoringParams
from router_core.types import Assignment, Doubles, Indices

# λs tried within each power of ten, before the one that is sought is narrowed down.
POINTS_PER_DECADE = 40

# The λs tried begin at this share of the least λ at which the cheapest model of some prompt takes over.
FIRST_LAMBDA_SHARE = 1e-3

# A λ is tried as it is written, with so many significant digits.
LAMBDA_DIGITS = 3

MAX_BISECTIONS = 20

# Relative tolerance: sums of the same numbers in another order are the same quality, or cost.
SLACK = 1e-12

# Relative difference below which two costs count as equal.
SAME_COST = 1e-9

DEFAULT_PARAMS = ScoringParams()


@dataclass(frozen=True, slots=True)
class BestSingleModel:
    """The model that is best if all prompts go to the same one."""

    model: str
    quality: float
    usd: float
    """Per request."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """All prompts routed at one λ."""

    lambda_: float
    quality: float
    """Mean of 1 − expected error."""
    usd: float
    """Per request."""
    shares: Mapping[str, float]
    """Model → share of the prompts, the largest first; every model is in it."""


@dataclass(frozen=True, eq=False)
class LambdaSweep:
    """n prompts and the M models that can be chosen, ready to be routed at any λ. All matrices are (n, M)."""

    models: tuple[str, ...]
    errors: Doubles
    usd: Doubles
    costs: Doubles
    """In units of λ."""
    tie: float

    def choices(self, lambda_: float) -> Indices:
        """Return the (n,) columns of the models chosen at `lambda_`."""
        return argmin_rows_with_ties(self.errors + lambda_ * self.costs, self.costs, self.tie)

    def at(self, lambda_: float) -> SweepPoint:
        choices = self.choices(lambda_)
        rows = np.arange(choices.size)
        shares = np.bincount(choices, minlength=len(self.models)) / choices.size
        return SweepPoint(
            lambda_=lambda_,
            quality=float((1.0 - self.errors[rows, choices]).mean()),
            usd=float(self.usd[rows, choices].mean()),
            shares=MappingProxyType({self.models[m]: float(shares[m]) for m in np.argsort(-shares, kind="stable")}),
        )

    def best_single(self) -> BestSingleModel:
        """Return the model of the best expected quality; of equals, the cheapest."""
        qualities, usd = (1.0 - self.errors).mean(axis=0), self.usd.mean(axis=0)
        best = int(np.lexsort((usd, -qualities))[0])
        return BestSingleModel(self.models[best], float(qualities[best]), float(usd[best]))


def sweep_lambdas(
    pool: Pool, assignment: Assignment, prompt_tokens: Doubles, params: ScoringParams = DEFAULT_PARAMS
) -> LambdaSweep:
    """Compute what the profiled and priced models of a pool are expected to make of n prompts.

    Args:
        assignment: Φ of the prompts, on the map of the pool.
        prompt_tokens: (n,) of each prompt.
        params: of every request; its λ is ignored, as it is what is sought.

    Raises:
        InvalidInput: there is no prompt.
        NoEligibleModel: no model has both a profile and a price.
    """
    if not len(assignment):
        raise InvalidInput("there is no prompt to expect anything of")
    profiled, routable = pool.profiled, pool.routable_rows
    if not routable.size:
        raise NoEligibleModel("no model has both a profile and a price", {})
    output_tokens = np.minimum(assignment.expected(pool.output_tokens), pool.max_output_tokens)
    usd = pool.prices.expected_usd(prompt_tokens[:, None], output_tokens)
    waiting_usd = params.latency_weight * assignment.expected(pool.seconds)
    unit = _cost_unit_usd(prompt_tokens, output_tokens[:, profiled].mean(axis=1), params)
    return LambdaSweep(
        models=tuple(pool.names[row] for row in routable),
        errors=assignment.expected(pool.errors[routable]),
        usd=usd[:, routable],
        costs=((usd + waiting_usd) / unit[:, None])[:, routable],
        tie=params.tie,
    )


def cheapest_for_quality(sweep: LambdaSweep, share: float) -> SweepPoint:
    """Return the largest λ whose quality is at least `share` of the best single model's.

    Raises:
        InvalidInput: no λ reaches it; the message says what can be reached.
    """
    best = sweep.best_single().quality
    points = [sweep.at(lambda_) for lambda_ in candidate_lambdas(sweep)]

    def is_reached(point: SweepPoint) -> bool:
        return point.quality >= share * best - SLACK

    reaching = [row for row, point in enumerate(points) if is_reached(point)]
    if not reaching:
        most = np.floor(1e4 * max(point.quality for point in points) / best) / 1e4
        raise InvalidInput(
            f"no λ is expected to reach {share:g} of the best single model's quality; the most within reach is {most:g}"
        )
    last = reaching[-1]
    return points[last] if last == len(points) - 1 else _bisect(sweep, points[last], points[last + 1], is_reached)


def best_within_budget(sweep: LambdaSweep, usd: float) -> SweepPoint:
    """Return the smallest λ whose expected cost is at most `usd` per request.

    Raises:
        InvalidInput: not even the cheapest models cost so little; the message says how much it takes.
    """
    points = [sweep.at(lambda_) for lambda_ in candidate_lambdas(sweep)]

    def is_affordable(point: SweepPoint) -> bool:
        return point.usd <= usd * (1 + SLACK)

    first = next((row for row, point in enumerate(points) if is_affordable(point)), None)
    if first is None:
        least = _round_significant(1e3 * min(point.usd for point in points), up=True, digits=4)
        raise InvalidInput(
            f"no λ is expected to cost as little as ${1e3 * usd:g} per 1,000 requests; the least possible is ${least:g}"
        )
    return points[0] if first == 0 else _bisect(sweep, points[first], points[first - 1], is_affordable)


def candidate_lambdas(sweep: LambdaSweep) -> list[float]:
    """List the λs to try, ascending, from 0 to where every prompt goes to its cheapest model.

    Each has LAMBDA_DIGITS significant digits.
    """
    rows = np.arange(len(sweep.costs))
    cheapest = argmin_rows_with_ties(sweep.costs, sweep.costs, 0.0)
    least = sweep.costs[rows, cheapest][:, None]
    extra_cost = sweep.costs - least
    fewer_errors = sweep.errors[rows, cheapest][:, None] - sweep.errors - sweep.tie
    preferred = (fewer_errors > 0) & (extra_cost > SAME_COST * least)
    takes_over = fewer_errors[preferred] / extra_cost[preferred]
    if not takes_over.size:
        return [0.0]
    low, high = FIRST_LAMBDA_SHARE * takes_over.min(), takes_over.max()
    tried = np.geomspace(low, high, 1 + round(POINTS_PER_DECADE * np.log10(high / low)))
    return sorted({0.0, *(_round_significant(float(lambda_), up=True) for lambda_ in tried)})


def quality_interval(
    sweep: LambdaSweep, point: SweepPoint, pool: Pool, assignment: Assignment
) -> tuple[float, float] | None:
    """Bound a point's quality relative to the best single model's, with 90 % confidence; None if that has none.

    By the delta method (textbook error propagation), with the deviations of `mix_deviations`. The λ and the best model
    were chosen by the same rates, so the truth is more likely in the lower half of the interval than in the upper one.

    Args:
        pool, assignment: what `sweep` was made of.
    """
    best = sweep.best_single()
    if best.quality <= 0:
        return None
    rows = [pool.index[name] for name in sweep.models]
    errors, labels = pool.errors[rows], pool.label_weights[rows]
    routed, overall = _rate_weights(sweep, point, assignment.dense(errors.shape[1]))
    gradient = -routed / best.quality
    gradient[sweep.models.index(best.model)] += point.quality / best.quality**2 * overall
    deviation = float(np.linalg.norm(mix_deviations(gradient, errors, labels)))
    relative = point.quality / best.quality
    return max(relative - Z_90 * deviation, 0.0), relative + Z_90 * deviation


def _rate_weights(sweep: LambdaSweep, point: SweepPoint, clusters: Doubles) -> tuple[Doubles, Doubles]:
    """Return each rate's weight in the quality of the routed prompts, (M, K), and of a model for all, (K,).

    `clusters`: (n, K) weights of the prompts.
    """
    routed = np.zeros((len(sweep.models), clusters.shape[1]))
    np.add.at(routed, sweep.choices(point.lambda_), clusters)
    return routed / len(clusters), np.asarray(clusters.mean(axis=0))


def _bisect(sweep: LambdaSweep, good: SweepPoint, bad: SweepPoint, holds: Callable[[SweepPoint], bool]) -> SweepPoint:
    """Move from `good` towards `bad` by halves as far as `holds` is true, over λs of LAMBDA_DIGITS digits."""
    for _ in range(MAX_BISECTIONS):
        between = _round_significant((good.lambda_ + bad.lambda_) / 2)
        if between in (good.lambda_, bad.lambda_):
            break
        tried = sweep.at(between)
        good, bad = (tried, bad) if holds(tried) else (good, tried)
    return good


def _round_significant(value: float, *, up: bool = False, digits: int = LAMBDA_DIGITS) -> float:
    """Round to the nearest number of so many significant digits, or to the next that is not below."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (np.floor(np.log10(value)) - digits + 1)
    return float(f"{(np.ceil(value / step) if up else np.rint(value / step)) * step:.{digits}g}")


def _cost_unit_usd(prompt_tokens: Doubles, output_tokens: Doubles, params: ScoringParams) -> Doubles:
    """Return the (n,) USD that a cost of one stands for: the prompt's tokens at the reference price, or a cent."""
    if params.cost_unit == "cents":
        return np.full(prompt_tokens.size, CENT_USD)
    tokens = zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
    return np.array([reference_usd(int(prompt), output, params.reference) for prompt, output in tokens])
