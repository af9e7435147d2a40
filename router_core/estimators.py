"""From sums of graded answers to error rates: the pooled estimator, and three that take each model alone.

Pooled: a model's K rates are a difficulty per cluster that all models share, plus a deviation of its own, as in partial
pooling of a multilevel model (Gelman and Hill 2007). Deviations have one Gaussian prior: models differ in ability,
similar clusters deviate alike, and each cluster has a little of its own. How far models differ is a scale of that
prior: the one with the largest marginal likelihood, less a penalty, is taken. A few steps of EM then fit the covariance
to the models with the most labels. So a rate with few labels leans on other models and clusters, and one with many is
close to the model's own mean.

Efforts of one model stand along a line, and their deviations are the more alike the nearer they stand (an exponential
kernel along effort, in a Kronecker product with the covariance over the clusters). What is common to all clusters is
less alike than the rest: how much better an effort is has to be seen, and where it is better is where its neighbour is.

The constants were chosen on the two public outcome files of the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from router_core.clustering import MAX_CLUSTERS_FOR_OVERLAP, ClusterMap, ReferenceModels
from router_core.types import Doubles

# In the shrunk estimator, a model's own mean counts as this many labels in each cluster.
SHRINKAGE = 0.5

# The unit of prior variances: about the variance of a label of probability 0.2 or 0.8.
NOISE = 0.15

# Prior variances of the three parts of a deviation, in units of NOISE: common to all clusters, shared by similar
# clusters, and of one cluster alone.
ABILITY, SIMILAR, OWN = 0.15, 0.2, 0.13

# Factors tried for SIMILAR and OWN. The smallest is not 0: models that look alike by few labels still differ somewhere.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)

# The scale expected beforehand, and how strongly: with few labels the likelihood alone would go to extremes.
PRIOR_SCALE, SCALE_PENALTY = 0.5, 0.25

# The share of the noise that is taken as independent between clusters, because the prompts of a profile do not overlap
# the clusters exactly as the map's own prompts do.
MISFIT = 0.15

# Added to the noise of every cluster, so that the matrices can be inverted where there is no label.
JITTER = 1e-9

# Least variance of one label, for models whose mean error is near 0 or 1.
MIN_NOISE = 0.02

# Correlation of the deviations of neighbouring efforts of one model: of what all clusters have in common, and the rest.
LIKE_ABILITY, LIKE_REST = 0.5, 0.9

# Iterations of the balancing that makes the rows of a Gram matrix sum to the labels.
BALANCING_STEPS = 30

EM_STEPS = 4

# How many models the prior covariance counts as.
PRIOR_MODELS = 10.0

# Models whose (K, K) matrices are computed at once.
BATCH_SIZE = 64

# The models with the most labels, from which scale and covariance are learned.
MAX_LEARNED_FROM = 64


# The rows of each model that is asked at several efforts, ascending.
Efforts = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What M profiles say about K clusters beyond the shared difficulty: residual ~ N(gram·deviation, noise)."""

    residual: Doubles
    """(M, K) error sums less what the difficulty explains."""
    gram: Doubles
    """(M, K, K) Σ_j w_jk·w_jl over a model's labelled prompts j, estimated from the overlap of the map's prompts."""
    noise: Doubles
    """(M, K, K)"""


def partially_pooled_rates(
    error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap, efforts: Efforts = ()
) -> Doubles:
    """Estimate (M, K) error rates in [0, 1] from the (M, K) sums of M profiles and those of the map's known models."""
    rates = np.empty_like(error_sums)
    for group in cluster_map.groups:
        columns, share = group.columns, group.share
        reference = cluster_map.reference_models or _no_reference(cluster_map.size, share)
        # A group holds only a share of every prompt: divided by it, its labels are whole again.
        pooled = _pooled_rates(
            np.concatenate((error_sums[:, columns], reference.error_sums[:, columns])) / share,
            np.concatenate((labels[:, columns], reference.labels[:, columns])) / share,
            reference.overlap[columns, columns] / share,
            group.similarity,
            efforts,
        )
        rates[:, columns] = pooled[: len(rates)]
    return rates


def _no_reference(clusters: int, share: float) -> ReferenceModels:
    return ReferenceModels(share * np.eye(clusters), (), np.empty((0, clusters)), np.empty((0, clusters)))


def _pooled_rates(errors: Doubles, labels: Doubles, overlap: Doubles, similarity: Doubles, efforts: Efforts) -> Doubles:
    """Estimate the (M, K) rates of one group's clusters; `overlap` and `similarity` are (K, K)."""
    difficulty = _difficulty(errors, labels)
    best_known = np.argsort(-labels.sum(axis=1), kind="stable")[:MAX_LEARNED_FROM]
    covariance = _covariance(_evidence(errors[best_known], labels[best_known], overlap, difficulty), similarity)
    rates = np.empty_like(errors)
    for start in range(0, len(errors), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        deviation, _ = _posterior(_evidence(errors[rows], labels[rows], overlap, difficulty), covariance)
        rates[rows] = np.clip(difficulty + deviation, 0.0, 1.0)
    for siblings in map(list, efforts):
        deviations = _joint_deviations(_evidence(errors[siblings], labels[siblings], overlap, difficulty), covariance)
        rates[siblings] = np.clip(difficulty + deviations, 0.0, 1.0)
    return rates


def _joint_deviations(evidence: _Evidence, covariance: Doubles) -> Doubles:
    """Return the (E, K) expected deviations of E efforts of one model, in ascending order."""
    efforts, clusters = evidence.residual.shape
    place = np.arange(efforts)
    distance = np.abs(place[:, None] - place)
    # The largest variance that all clusters can have in common under this covariance.
    ability = np.full_like(covariance, 1.0 / np.linalg.inv(covariance).sum())
    prior = np.kron(LIKE_ABILITY**distance, ability) + np.kron(LIKE_REST**distance, covariance - ability)
    joint = _Evidence(
        evidence.residual.reshape(1, -1), _block_diagonal(evidence.gram)[None], _block_diagonal(evidence.noise)[None]
    )
    return np.asarray(_posterior(joint, prior)[0].reshape(efforts, clusters))


def _block_diagonal(blocks: Doubles) -> Doubles:
    """Return the (E·K, E·K) matrix with these (E, K, K) blocks."""
    count, size, _ = blocks.shape
    whole = np.zeros((count, size, count, size))
    whole[np.arange(count), :, np.arange(count), :] = blocks
    return whole.reshape(count * size, count * size)


def _evidence(errors: Doubles, labels: Doubles, overlap: Doubles, difficulty: Doubles) -> _Evidence:
    gram, identity = _gram(labels, overlap), np.eye(len(overlap))
    spread = (1 - MISFIT) * gram + MISFIT * labels[:, :, None] * identity
    means = (errors.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    noise = np.maximum(means * (1.0 - means), MIN_NOISE)
    return _Evidence(errors - gram @ difficulty, gram, noise[:, None, None] * spread + JITTER * identity)


def _gram(labels: Doubles, overlap: Doubles) -> Doubles:
    """Return (M, K, K) Gram matrices for (M, K) labels, each balanced so that its rows sum to the labels.

    The weights of a prompt sum to one, so a row must sum to the labels in its cluster. Overlaps were seen on other
    prompts: unbalanced, they would credit a cluster with answers that were never given. The balancing is that of
    Sinkhorn and Knopp (1967), kept symmetric.
    """
    root = np.sqrt(labels)
    gram = root[:, :, None] * root[:, None, :] * overlap
    scale = np.ones_like(labels)
    for _ in range(BALANCING_STEPS):
        rows = scale * np.einsum("mkl,ml->mk", gram, scale)
        scale *= np.sqrt(np.divide(labels, rows, out=np.ones_like(rows), where=rows > 0))
    return np.asarray(gram * scale[:, :, None] * scale[:, None, :])


def _difficulty(errors: Doubles, labels: Doubles) -> Doubles:
    """Return the average model's (K,) error rates, with each model's own ability taken out of its labels."""
    measured = labels.sum(axis=1) > 0
    if not measured.any():
        return np.full(labels.shape[1], 0.5)
    errors, labels = errors[measured], labels[measured]
    means = (errors.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    excess = (errors - labels * means[:, None]).sum(axis=0) / (labels.sum(axis=0) + 0.5)
    return np.asarray(means.mean() + excess)


def _covariance(evidence: _Evidence, similarity: Doubles) -> Doubles:
    """Return the (K, K) covariance of a model's deviations: the likeliest prior, then EM_STEPS steps of EM."""
    prior = max(
        ((_log_likelihood(evidence, candidate, scale), candidate) for scale, candidate in _priors(similarity)),
        key=lambda fit: fit[0],
    )[1]
    covariance = prior
    for _ in range(EM_STEPS):
        deviation, spread = _posterior(evidence, covariance)
        seen = deviation.T @ deviation + spread.sum(axis=0)
        covariance = (PRIOR_MODELS * prior + seen) / (PRIOR_MODELS + len(deviation))
    return covariance


def _priors(similarity: Doubles) -> list[tuple[float, Doubles]]:
    identity = np.eye(len(similarity))
    return [(scale, NOISE * (ABILITY + scale * (SIMILAR * similarity + OWN * identity))) for scale in SCALES]


def _posterior(evidence: _Evidence, covariance: Doubles) -> tuple[Doubles, Doubles]:
    """Return the (M, K) expected deviations and their (M, K, K) covariances.

    With G the Gram matrix, V the prior covariance, Σ the noise and R the residual, the mean is V G (G V G + Σ)⁻¹ R
    (conditioning of a joint Gaussian).
    """
    gram_prior = evidence.gram @ covariance  # G V
    right_sides = np.concatenate((evidence.residual[:, :, None], gram_prior), axis=2)  # R and G V, solved for together
    system = gram_prior @ evidence.gram + evidence.noise
    terms = gram_prior.transpose(0, 2, 1) @ np.linalg.solve(system, right_sides)
    return terms[:, :, 0], covariance - terms[:, :, 1:]


def _log_likelihood(evidence: _Evidence, covariance: Doubles, scale: float) -> float:
    """Return the residuals' log marginal likelihood, less the penalty of the scale, up to a constant."""
    system = evidence.gram @ covariance @ evidence.gram + evidence.noise
    whitened = np.linalg.solve(system, evidence.residual[:, :, None])[:, :, 0]
    likelihood = -(evidence.residual * whitened).sum() - np.linalg.slogdet(system)[1].sum()
    return float(likelihood / 2 - SCALE_PENALTY * np.log(scale / PRIOR_SCALE) ** 2)


# How far models are expected to differ in what tools add to their errors, as a variance, before any was measured; and
# as how many models that counts. On simulated labels, where models differed by 0.2 or more, fewer answers with tools
# went wrong, and where they did not differ, at most 0.5 in 100 more did: `python -m tests.bench.tool_requests`.
TOOL_VARIANCE, TOOL_PRIOR_MODELS = 0.01, 2.0

# The variance of one label of a prompt with tools.
TOOL_NOISE = 0.2

# Where more of the labels are of prompts with tools, these say too little of texts to tell the two apart.
MAX_TOOLS_SHARE = 0.5

# How many labels of its own make a cluster's share of prompts with tools count as much as the share of all clusters. A
# cluster's rate is estimated from the labels of the others, too.
TOOLS_SHARE_SHRINKAGE = 4.0


def part_tools(
    rates: Doubles, labels: Doubles, tool_error_sums: Doubles, tool_labels: Doubles
) -> tuple[Doubles, Doubles]:
    """Part what M models err without tools from what tools add.

    The text of a prompt with tools says little of how well a model calls tools. What all models have in common is a
    mean; each model's own part is shrunk towards it, the more the less models are seen to differ (empirical Bayes).

    Args:
        rates: (M, K) as estimated from the labels of all prompts.
        labels: (M, K) of all prompts.
        tool_error_sums, tool_labels: (M, K) of the prompts that offer tools among them, zeros where there is none.

    Returns:
        (M, K) the part of each rate that is due to tools, and (M,) how many more errors each model makes where it is
        offered tools than where it is not.
    """
    count = tool_labels.sum(axis=1)
    measured = count > 0
    excess = np.zeros(len(rates))
    if not measured.any():
        return np.zeros_like(rates), excess
    overall = (count / np.maximum(labels.sum(axis=1), count + 1e-9))[:, None]
    shrunk = (tool_labels + TOOLS_SHARE_SHRINKAGE * overall) / (labels + TOOLS_SHARE_SHRINKAGE)
    share = np.minimum(shrunk, MAX_TOOLS_SHARE)
    beyond_rates = (tool_error_sums - tool_labels * rates)[measured].sum(axis=1)
    count = count[measured]
    # A rate holds its share of what tools add, so that only the rest of it is seen beyond the rates.
    own = beyond_rates / (tool_labels * (1.0 - share))[measured].sum(axis=1)
    mean = float((own * count).sum() / (count.sum() + TOOL_NOISE / TOOL_VARIANCE))
    noise = TOOL_NOISE / count
    seen = max(float(own.var(ddof=1) - noise.mean()), 0.0) if len(own) > 1 else 0.0
    variance = (TOOL_PRIOR_MODELS * TOOL_VARIANCE + len(own) * seen) / (TOOL_PRIOR_MODELS + len(own))
    excess[:] = mean
    excess[measured] += variance / (variance + noise) * (own - mean)
    return share * excess[:, None], excess


class Rates(Protocol):
    def __call__(
        self, error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap, efforts: Efforts = (), /
    ) -> Doubles:
        """Estimate (M, K) rates in [0, 1] from the (M, K) error sums and labels of M models on a map."""


def mean_error(total_error: float, total_labels: float) -> float:
    """Return (Σe + ½)/(n + 1), which is one half where nothing was labelled."""
    return (total_error + 0.5) / (total_labels + 1.0)


def shrunk_rates(error_sums: Doubles, labels: Doubles) -> Doubles:
    """Return (M, K) rates, each model's shrunk towards its own mean."""
    means = (error_sums.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    return np.asarray(np.clip((error_sums + SHRINKAGE * means[:, None]) / (labels + SHRINKAGE), 0.0, 1.0))


def _pooled(error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap, efforts: Efforts = ()) -> Doubles:
    if cluster_map.size > MAX_CLUSTERS_FOR_OVERLAP or not len(error_sums):
        return shrunk_rates(error_sums, labels)
    return partially_pooled_rates(error_sums, labels, cluster_map, efforts)


def _shrunk(error_sums: Doubles, labels: Doubles, _map: ClusterMap, _efforts: Efforts = ()) -> Doubles:
    return shrunk_rates(error_sums, labels)


def _raw(error_sums: Doubles, labels: Doubles, _map: ClusterMap, _efforts: Efforts = ()) -> Doubles:
    rates = np.divide(error_sums, labels, out=np.full_like(labels, 0.5), where=labels > 0)
    return np.clip(rates, 0.0, 1.0)


def _laplace(error_sums: Doubles, labels: Doubles, _map: ClusterMap, _efforts: Efforts = ()) -> Doubles:
    alpha = 1.0
    return np.clip((error_sums + alpha) / (labels + 2 * alpha), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Estimator:
    """How prompts count towards clusters when a profile is measured, and how sums become error rates."""

    name: str
    hard: bool
    """Whole labels to the nearest cluster (UniRoute, section 5.1) instead of shares to the nearest few."""
    rates: Rates


# All models together. A map of more than MAX_CLUSTERS_FOR_OVERLAP clusters gets the shrunk estimator.
POOLED = Estimator("pooled", hard=False, rates=_pooled)

SHRUNK = Estimator("shrunk", hard=False, rates=_shrunk)

# The paper's: the mean of the labels, and one half without any.
RAW = Estimator("raw", hard=True, rates=_raw)

# Laplace's rule of succession: (e + 1)/(n + 2).
LAPLACE = Estimator("laplace", hard=True, rates=_laplace)

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({each.name: each for each in (POOLED, SHRUNK, RAW, LAPLACE)})
