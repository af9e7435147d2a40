"""The deferral curve of deployed profiles: what each λ costs and achieves, on prompts weighted as the traffic is.

A curve that is judged by the same labels by which its models are chosen flatters: of models that are alike, the one
that was lucky with its labels is chosen, and credited with its luck. Here models are chosen by one half of the labels
and judged by the other. Profiles keep sums, not answers, so the halves are drawn from the sums: if X of n labels of a
cluster are errors, the errors among n ÷ 2 of them, drawn without replacement, are hypergeometric, and given the true
rate both halves are independent (data thinning: Neufeld, Dharamshi, Gao and Witten, JMLR 25, 2024, example of the
binomial). Half of the labels choose worse than all of them: the figures err on the low side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.calibration import DEFAULT_PARAMS, LambdaSweep, candidate_lambdas, sweep_lambdas
from router_core.clustering import ClusterMap
from router_core.decision import Z_90, argmin_rows_with_ties, mix_deviations
from router_core.estimators import POOLED, Estimator
from router_core.pool import Pool
from router_core.profiles import Profile
from router_core.scoring import ScoringParams
from router_core.types import Assignment, Doubles, Indices

# Each is used both ways, so that the rates are estimated twice as often.
SPLITS = 5

# Points of a curve that is drawn.
MAX_POINTS = 48

# Labels of a cell beyond which a half of them is not told from the whole; the generator takes no more than 10⁹.
MAX_LABELS = 1e8


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """All prompts routed at one λ. The bounds hold the quality with 90 % confidence."""

    lambda_: float
    quality: float
    low: float
    high: float
    usd: float
    """Per request."""
    shares: Mapping[str, float]
    """Model → share of the prompts, the largest first; every model is in it."""


@dataclass(frozen=True, slots=True)
class SingleModel:
    """All prompts sent to one model, judged by the labels that judge the curve."""

    model: str
    quality: float
    low: float
    high: float
    usd: float
    """Per request."""


@dataclass(frozen=True, eq=False)
class DeferralCurve:
    """Route n prompts among M models at any λ."""

    sweep: LambdaSweep
    weights: Doubles
    """(n,) of the prompts; they sum to one."""
    clusters: Doubles
    """(n, K) Φ."""
    halves: tuple[tuple[Doubles, Doubles], ...]
    """(n, M) expected errors by one half of the labels, by which models are chosen, and by the other, which judges."""
    errors: Doubles
    """(M, K) rates that all labels give."""
    labels: Doubles
    """(M, K) behind these, the shrinkage included."""

    def at(self, lambda_: float) -> CurvePoint:
        served = self.sweep.choices(lambda_)
        rows = np.arange(served.size)
        quality = float(np.mean([self._judged_quality(*half, lambda_) for half in self.halves]))
        deviation = self._deviation(served)
        shares = np.bincount(served, weights=self.weights, minlength=len(self.sweep.models))
        return CurvePoint(
            lambda_,
            quality,
            *_bounds(quality, deviation),
            usd=float(self.weights @ self.sweep.usd[rows, served]),
            shares=MappingProxyType(
                {self.sweep.models[m]: float(shares[m]) for m in np.argsort(-shares, kind="stable")}
            ),
        )

    def points(self) -> list[CurvePoint]:
        """Return the curve, λ ascending, of at most MAX_POINTS points."""
        tried = candidate_lambdas(self.sweep)
        places = np.unique(np.linspace(0, len(tried) - 1, min(MAX_POINTS, len(tried))).round().astype(int))
        return [self.at(tried[place]) for place in places]

    def singles(self) -> list[SingleModel]:
        """Return each model alone, by name."""
        found = []
        for m, model in enumerate(self.sweep.models):
            quality = float(np.mean([1.0 - self.weights @ judging[:, m] for _, judging in self.halves]))
            everywhere = np.full(self.weights.size, m)
            bounds = _bounds(quality, self._deviation(everywhere))
            found.append(SingleModel(model, quality, *bounds, usd=float(self.weights @ self.sweep.usd[:, m])))
        return found

    def _judged_quality(self, choosing: Doubles, judging: Doubles, lambda_: float) -> float:
        chosen = argmin_rows_with_ties(choosing + lambda_ * self.sweep.costs, self.sweep.costs, self.sweep.tie)
        return float(1.0 - self.weights @ judging[np.arange(chosen.size), chosen])

    def _deviation(self, chosen: Indices) -> float:
        """Return the standard deviation of the quality of (n,) choices, at most."""
        routed = np.zeros_like(self.errors)
        np.add.at(routed, chosen, self.weights[:, None] * self.clusters)
        return float(mix_deviations(routed, self.errors, self.labels).sum())


def _bounds(quality: float, deviation: float) -> tuple[float, float]:
    return max(quality - Z_90 * deviation, 0.0), min(quality + Z_90 * deviation, 1.0)


def deferral_curve(
    pool: Pool,
    profiles: Mapping[str, Profile],
    cluster_map: ClusterMap,
    assignment: Assignment,
    prompt_tokens: Doubles,
    *,
    mix: Doubles | None = None,
    estimator: Estimator = POOLED,
    params: ScoringParams = DEFAULT_PARAMS,
    seed: int = 0,
) -> DeferralCurve:
    """Prepare the curve of the profiled and priced models of a pool.

    Args:
        profiles: as measured, of all models of the pool that have one.
        assignment: Φ of n prompts.
        prompt_tokens: (n,) of each prompt.
        mix: (K,) how much of the traffic is in each cluster; None: the prompts count alike.

    Raises:
        InvalidInput: there is no prompt.
        NoEligibleModel: no model has both a profile and a price.
    """
    sweep = sweep_lambdas(pool, assignment, prompt_tokens, params)
    clusters = assignment.dense(cluster_map.size)
    rows = [pool.index[name] for name in sweep.models]
    measured = sorted(profiles)
    places = [measured.index(name) for name in sweep.models]
    sums = np.array([profiles[name].error_sums for name in measured])
    labels = np.array([profiles[name].labels for name in measured])

    def expected(half: tuple[Doubles, Doubles]) -> Doubles:
        return assignment.expected(estimator.rates(*half, cluster_map)[places])

    halves: list[tuple[Doubles, Doubles]] = []
    for one, other in split_labels(sums, labels, SPLITS, seed=seed):
        by_one, by_other = expected(one), expected(other)
        halves += [(by_one, by_other), (by_other, by_one)]
    return DeferralCurve(
        sweep=sweep,
        weights=prompt_weights(clusters, mix),
        clusters=clusters,
        halves=tuple(halves),
        errors=pool.errors[rows],
        labels=pool.label_weights[rows],
    )


def split_labels(
    error_sums: Doubles, labels: Doubles, splits: int, *, seed: int
) -> Iterator[tuple[tuple[Doubles, Doubles], tuple[Doubles, Doubles]]]:
    """Yield two halves of the labels, each as error sums and labels, of the same shape as given.

    Sums of parts of labels are first rounded, up or down by chance, so that they keep their means.
    """
    rng = np.random.default_rng(seed)
    rates = np.divide(error_sums, labels, out=np.zeros_like(labels), where=labels > 0)
    for _ in range(splits):
        whole = np.floor(np.minimum(labels, MAX_LABELS) + rng.random(labels.shape))
        wrong = np.minimum(np.floor(whole * np.clip(rates, 0.0, 1.0) + rng.random(labels.shape)), whole)
        # of an odd number either half gets the one that is left
        taken = np.floor((whole + rng.integers(2, size=labels.shape)) / 2)
        counts = (each.astype(np.int64) for each in (wrong, whole - wrong, taken))
        wrong_taken = rng.hypergeometric(*counts).astype(np.float64)
        yield (wrong_taken, taken), (wrong - wrong_taken, whole - taken)


def prompt_weights(clusters: Doubles, mix: Doubles | None) -> Doubles:
    """Return (n,) weights with which prompts of (n, K) clusters stand for traffic of this mix; they sum to one.

    A prompt counts by how much more often the traffic visits its clusters than these prompts do.
    """
    here = clusters.mean(axis=0)
    if mix is None or not mix.sum() > 0:
        return np.full(len(clusters), 1.0 / len(clusters))
    ratio = np.divide(mix / mix.sum(), here, out=np.zeros_like(here), where=here > 0)
    weights = clusters @ ratio
    total = weights.sum()
    return np.asarray(weights / total) if total > 0 else prompt_weights(clusters, None)
