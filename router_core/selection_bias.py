"""How much better chosen models look than they are, because the labels that chose them also judge them.

Of models that are alike, the one that was lucky with its labels is chosen, and credited with its luck. So the labels
are halved: models are chosen by one half and judged by the other, both ways. Where the graded answers are still known,
the halves are those of the validation prompts: all models were asked the same ones, and what is hard is hard for all.
Else the sums of a profile are halved with noise as large as theirs (data thinning of a Gaussian: Neufeld, Dharamshi,
Gao and Witten, JMLR 25, 2024), which errs on the safe side, for it takes the luck of the models as independent.

Half of the labels choose worse than all of them: the truth lies between what all labels say and what the halves say.
`python -m tests.bench.error_bounds` compares both with the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router_core.clustering import ClusterMap
from router_core.decision import argmin_rows_with_ties
from router_core.estimators import JITTER, POOLED, Estimator
from router_core.kernels import argmin_with_ties
from router_core.profiles import Profile
from router_core.types import Doubles

# Each is used both ways.
SPLITS = 5

# Error sums and labels, (M, K) each.
Sums = tuple[Doubles, Doubles]


@dataclass(frozen=True, eq=False)
class GradedPrompts:
    """The answers that profiles were measured by."""

    weights: Doubles
    """(P, K) of the validation prompts."""
    scores: Mapping[str, Doubles]
    """Model → (P,) in [0, 1]; NaN where it has no label."""

    def sums(self, model: str, chosen: Doubles) -> tuple[Doubles, Doubles]:
        """Return the (K,) error sums and labels of the prompts that (P,) `chosen` is 1 for."""
        scores = self.scores[model]
        labelled = ~np.isnan(scores)
        counted = chosen * labelled
        return (counted * np.where(labelled, 1.0 - scores, 0.0)) @ self.weights, counted @ self.weights

    def measured(self, model: str, profile: Profile) -> bool:
        """Return whether these answers made the profile."""
        if model not in self.scores:
            return False
        errors, labels = self.sums(model, np.ones(len(self.weights)))
        return np.allclose(errors, profile.error_sums, atol=1e-3) and np.allclose(labels, profile.labels, atol=1e-3)


class SelectionBias:
    """Compute it for single choices among models of one map."""

    def __init__(
        self,
        profiles: Mapping[str, Profile],
        cluster_map: ClusterMap,
        estimator: Estimator = POOLED,
        graded: GradedPrompts | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """
        Args:
            profiles: as measured, on this map. Those with rates that are stated without sums cannot be halved.
            graded: the answers behind them, as far as they are known.
        """
        names = sorted(name for name, profile in profiles.items() if profile.stated_rates is None)
        self.map_id = cluster_map.id
        self._rows = {name: row for row, name in enumerate(names)}
        if not names:
            return
        measured = [profiles[name] for name in names]
        self._whole = estimator.rates(*_sums(measured), cluster_map)
        choosing: list[Doubles] = []
        judging: list[Doubles] = []
        for halves in _halves(names, measured, cluster_map, graded, np.random.default_rng(seed)):
            one, other = (estimator.rates(*half, cluster_map) for half in halves)
            choosing += [one, other]
            judging += [other, one]
        # (K, 2 · SPLITS, M): one gather reads all rates of a prompt's clusters.
        self._choosing, self._judging = (
            np.ascontiguousarray(np.array(each).transpose(2, 0, 1)) for each in (choosing, judging)
        )

    def of(
        self,
        models: Sequence[str],
        costs: Sequence[float],
        lambda_: float,
        tie: float,
        clusters: Mapping[int, float],
    ) -> float | None:
        """Return how much higher the error of the choice is, judged by labels that did not make it.

        Args:
            models, costs: the candidates of one prompt.
            clusters: cluster → weight of the prompt.

        Returns:
            None: one of the models is not known.
        """
        rows = [self._rows.get(name, -1) for name in models]
        if not rows or min(rows) < 0:
            return None
        ids, weights, cost = list(clusters), np.array(list(clusters.values())), np.array(costs, dtype=np.float64)
        whole = weights @ self._whole[np.ix_(rows, ids)].T
        expected = whole[argmin_with_ties(whole + lambda_ * cost, cost, tie)]
        choosing, judging = (
            np.tensordot(weights, rates[ids][:, :, rows], 1) for rates in (self._choosing, self._judging)
        )
        chosen = argmin_rows_with_ties(choosing + lambda_ * cost, np.broadcast_to(cost, choosing.shape), tie)
        return float(judging[np.arange(len(chosen)), chosen].mean() - expected)


def _sums(profiles: Sequence[Profile]) -> Sums:
    return np.array([each.error_sums for each in profiles]), np.array([each.labels for each in profiles])


def _halves(
    names: Sequence[str],
    profiles: Sequence[Profile],
    cluster_map: ClusterMap,
    graded: GradedPrompts | None,
    rng: np.random.Generator,
) -> Iterator[tuple[Sums, Sums]]:
    """Yield two halves of the labels, SPLITS times."""
    known = [graded is not None and graded.measured(name, each) for name, each in zip(names, profiles, strict=True)]
    for one, other in _thinned(*_sums(profiles), cluster_map, rng):
        if graded is not None:
            chosen = np.asarray(rng.permutation(len(graded.weights)) % 2, dtype=np.float64)
            for row in np.flatnonzero(known).tolist():
                one[0][row], one[1][row] = graded.sums(names[row], chosen)
                other[0][row], other[1][row] = graded.sums(names[row], 1.0 - chosen)
        yield one, other


def _thinned(
    error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap, rng: np.random.Generator
) -> Iterator[tuple[Sums, Sums]]:
    """Halve (M, K) sums with Gaussian noise: prompts that clusters share make the noise of both alike.

    The sums of a half may be below 0, and above its labels: cut off there, they would not add up.
    """
    clusters = cluster_map.size
    reference = cluster_map.reference_models
    overlap = np.eye(clusters) if reference is None else reference.overlap
    root = np.linalg.cholesky(overlap + JITTER * np.eye(clusters))
    means = (error_sums.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    deviations = np.sqrt(means * (1.0 - means))[:, None] * np.sqrt(labels)
    for _ in range(SPLITS):
        noise = 0.5 * deviations * (rng.normal(size=labels.shape) @ root.T)
        yield (error_sums / 2 + noise, labels / 2), (error_sums / 2 - noise, labels / 2)
