"""Error rates of all models together: what one model's few labels leave open, the others answer.

A model's K rates are a cluster difficulty that all models share, plus a deviation of its own. Deviations are drawn from
one Gaussian: models differ in ability, alike clusters deviate alike, and each has a little of its own. How far models
differ is read off the profiles by their marginal likelihood, then the covariance follows the models it has seen by a
few steps of EM. So with few labels a rate leans on what is known elsewhere, and with many it is the model's own mean.

The constants were chosen on the two public outcome files that the README names. Takes no prompt, knows no price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.clustering import MAX_CLUSTERS_FOR_OVERLAP, ClusterMap, ReferenceModels
from router_core.types import Doubles

NOISE = 0.15
"""The unit of prior variances: about that of a label of probability 0.2 or 0.8."""

ABILITY, ALIKE, OWN = 0.15, 0.2, 0.13
"""Prior variances of a deviation, in units of NOISE: over all clusters, over alike ones, in each alone."""

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""What ALIKE and OWN may be multiplied by: however alike models look by few labels, they differ somewhere."""

USUAL_SCALE, SCALE_PENALTY = 0.5, 0.25
"""The scale expected beforehand, and how strongly: with few labels the likelihood alone would go to extremes."""

MISFIT, TINY = 0.15, 1e-9
"""The share of the noise that does not overlap as the map's own prompts do; and for clusters without any label."""

MIN_NOISE = 0.02

BALANCING = 30
"""Steps towards a Gram matrix whose rows sum to the labels."""

STEPS = 4

PRIOR_MODELS = 10.0
"""How many models the prior covariance counts as."""

BATCH_SIZE = 64
"""Models that are laid out together; scale and covariance are learned from so many, those with the most labels."""


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What M profiles say about K clusters beyond the shared difficulty: residual ~ N(gram·deviation, noise)."""

    residual: Doubles
    """(M, K) error sums less what the difficulty explains."""
    gram: Doubles
    """(M, K, K) Σ_j w_jk·w_jl over a model's labelled prompts, as the map's own prompts overlap."""
    noise: Doubles
    """(M, K, K)"""


def partially_pooled_rates(error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap) -> Doubles:
    """(M, K) error rates in [0, 1] from the sums of M profiles and those of the map's known models."""
    rates = np.empty_like(error_sums)
    for view in cluster_map.views:
        own = view.columns
        history = cluster_map.reference_models or _nothing_known(cluster_map.size, view.share)
        together = _rates(
            np.concatenate((error_sums[:, own], history.error_sums[:, own])) / view.share,
            np.concatenate((labels[:, own], history.labels[:, own])) / view.share,
            history.overlap[own, own] / view.share,
            view.likeness,
        )
        rates[:, own] = together[: len(rates)]
    return rates


def _nothing_known(clusters: int, share: float) -> ReferenceModels:
    return ReferenceModels(share * np.eye(clusters), (), np.empty((0, clusters)), np.empty((0, clusters)))


def _rates(errors: Doubles, labels: Doubles, overlap: Doubles, likeness: Doubles) -> Doubles:
    difficulty = _difficulty(errors, labels)
    best_known = np.argsort(-labels.sum(axis=1), kind="stable")[:BATCH_SIZE]
    covariance = _covariance(_evidence(errors[best_known], labels[best_known], overlap, difficulty), likeness)
    rates = np.empty_like(errors)
    for start in range(0, len(errors), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        deviation, _ = _posterior(_evidence(errors[rows], labels[rows], overlap, difficulty), covariance)
        rates[rows] = np.clip(difficulty + deviation, 0.0, 1.0)
    return rates


def _evidence(errors: Doubles, labels: Doubles, overlap: Doubles, difficulty: Doubles) -> _Evidence:
    gram, own = _gram(labels, overlap), np.eye(len(overlap))
    spread = (1 - MISFIT) * gram + MISFIT * labels[:, :, None] * own
    means = (errors.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    noise = np.maximum(means * (1.0 - means), MIN_NOISE)
    return _Evidence(errors - gram @ difficulty, gram, noise[:, None, None] * spread + TINY * own)


def _gram(labels: Doubles, overlap: Doubles) -> Doubles:
    """(M, K, K) for (M, K) labels: the weights of each prompt sum to one, and so a row sums to the labels in it.

    Overlaps were seen on other prompts; by themselves they would credit a cluster with answers that were never given.
    """
    root = np.sqrt(labels)
    gram = root[:, :, None] * root[:, None, :] * overlap
    scale = np.ones_like(labels)
    for _ in range(BALANCING):
        rows = scale * np.einsum("mkl,ml->mk", gram, scale)
        scale *= np.sqrt(np.divide(labels, rows, out=np.ones_like(rows), where=rows > 0))
    return np.asarray(gram * scale[:, :, None] * scale[:, None, :])


def _difficulty(errors: Doubles, labels: Doubles) -> Doubles:
    """(K,) error rates of the average model, each model's own ability taken out of the labels it gave."""
    measured = labels.sum(axis=1) > 0
    if not measured.any():
        return np.full(labels.shape[1], 0.5)
    errors, labels = errors[measured], labels[measured]
    means = (errors.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    excess = (errors - labels * means[:, None]).sum(axis=0) / (labels.sum(axis=0) + 0.5)
    return np.asarray(means.mean() + excess)


def _covariance(evidence: _Evidence, likeness: Doubles) -> Doubles:
    """(K, K) of a model's deviations, in error rate squared."""
    prior = max(
        ((_fit(evidence, candidate, scale), candidate) for scale, candidate in _priors(likeness)),
        key=lambda fit: fit[0],
    )[1]
    covariance = prior
    for _ in range(STEPS):
        deviation, spread = _posterior(evidence, covariance)
        seen = deviation.T @ deviation + spread.sum(axis=0)
        covariance = (PRIOR_MODELS * prior + seen) / (PRIOR_MODELS + len(deviation))
    return covariance


def _priors(likeness: Doubles) -> list[tuple[float, Doubles]]:
    own = np.eye(len(likeness))
    return [(scale, NOISE * (ABILITY + scale * (ALIKE * likeness + OWN * own))) for scale in SCALES]


def _posterior(evidence: _Evidence, covariance: Doubles) -> tuple[Doubles, Doubles]:
    """(M, K) expected deviations, V G (G V G + Σ)⁻¹ R, and their (M, K, K) covariances."""
    known = evidence.gram @ covariance
    both = np.concatenate((evidence.residual[:, :, None], known), axis=2)
    explained = known.transpose(0, 2, 1) @ np.linalg.solve(known @ evidence.gram + evidence.noise, both)
    return explained[:, :, 0], covariance - explained[:, :, 1:]


def _fit(evidence: _Evidence, covariance: Doubles, scale: float) -> float:
    """Log marginal likelihood of the residuals, less the penalty of the scale, up to a constant."""
    system = evidence.gram @ covariance @ evidence.gram + evidence.noise
    whitened = np.linalg.solve(system, evidence.residual[:, :, None])[:, :, 0]
    likelihood = -(evidence.residual * whitened).sum() - np.linalg.slogdet(system)[1].sum()
    return float(likelihood / 2 - SCALE_PENALTY * np.log(scale / USUAL_SCALE) ** 2)


SHRINKAGE = 0.5
"""Label weight of a model's own mean in each cluster: s of the shrunk recipe."""

Rates = Callable[[Doubles, Doubles, ClusterMap], Doubles]


def mean_error(total_error: float, total_labels: float) -> float:
    """ē = (Σe + ½)/(n + 1): one half where nothing was labelled."""
    return (total_error + 0.5) / (total_labels + 1.0)


def shrunk_rates(error_sums: Doubles, labels: Doubles) -> Doubles:
    """(M, K) each model's rates, shrunk towards its own mean."""
    means = (error_sums.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    return np.asarray(np.clip((error_sums + SHRINKAGE * means[:, None]) / (labels + SHRINKAGE), 0.0, 1.0))


def _pooled(error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap) -> Doubles:
    if cluster_map.size > MAX_CLUSTERS_FOR_OVERLAP or not len(error_sums):
        return shrunk_rates(error_sums, labels)
    return partially_pooled_rates(error_sums, labels, cluster_map)


def _shrunk(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    return shrunk_rates(error_sums, labels)


def _raw(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    rates = np.divide(error_sums, labels, out=np.full_like(labels, 0.5), where=labels > 0)
    return np.clip(rates, 0.0, 1.0)


def _laplace(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    alpha = 1.0
    return np.clip((error_sums + alpha) / (labels + 2 * alpha), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Estimator:
    """How prompts count towards clusters when a profile is measured, and how sums become error rates."""

    name: str
    hard: bool
    """Whole labels to the nearest cluster (the paper, section 5.1) instead of shares to the top p."""
    rates: Rates
    """(M, K) error sums and (M, K) labels of M models on a map to (M, K) rates in [0, 1]."""


POOLED = Estimator("pooled", hard=False, rates=_pooled)
"""All models together; on a map of more than LARGEST clusters it is the shrunk recipe."""

SHRUNK = Estimator("shrunk", hard=False, rates=_shrunk)

RAW = Estimator("raw", hard=True, rates=_raw)

LAPLACE = Estimator("laplace", hard=True, rates=_laplace)

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {recipe.name: recipe for recipe in (POOLED, SHRUNK, RAW, LAPLACE)}
)
