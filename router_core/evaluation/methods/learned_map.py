"""UniRoute's learned map (arXiv 2502.08773, section 5.2): a softmax over clusters, trained on the known models.

Φ(x) = softmax(x·W + b) starts as the softmax of cosines to K-means centroids, and follows the log loss of Φ(x)·Ψ(m) on
the known models' errors, Ψ held to its weighted means. With no known model it is the paper's K-means with raw rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.evaluation.methods.kmeans import DEFAULT_SIZE, hard_map, kmeans_raw
from router_core.evaluation.methods.tuning import means, sums
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats, Indices

SHARPNESS = 20.0
"""Of the softmax over cosines that training starts from: a temperature of 0.05."""
EPOCHS = 60
BATCH = 512
RATE = 0.01
DECAY = 1e-4
HELD_OUT = 0.1
FIRST, SECOND, TINY = 0.9, 0.999, 1e-8
"""Adam's constants (arXiv 1412.6980)."""
SURE = 0.01
"""Rates are kept this far from 0 and 1, where the log loss has no end."""


@dataclass(frozen=True, eq=False)
class SoftMap:
    slope: Doubles
    """(d, K)"""
    offset: Doubles
    """(K,)"""

    def weights(self, vectors: Floats | Doubles) -> Doubles:
        """(n, K), rows sum to one."""
        logits = vectors @ self.slope + self.offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def learned_map(known: Known) -> Estimator:
    if not known.models:
        return kmeans_raw(known)
    trained = train(known)
    weights = trained.weights(known.vectors)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        return np.asarray(trained.weights(vectors) @ _rates(weights[asked.rows], asked).T)

    return estimator


def train(known: Known) -> SoftMap:
    """The map of the epoch with the least log loss on a held-out tenth of the prompts; the start is one of them."""
    rng = np.random.default_rng(known.seed)
    order = rng.permutation(len(known.vectors))
    held_out = order[: max(1, round(HELD_OUT * order.size))]
    fitted = order[held_out.size :]
    centroids = hard_map(known, DEFAULT_SIZE).centroids.astype(np.float64)
    learner = _Learner(SoftMap(SHARPNESS * centroids.T, np.zeros(len(centroids))))
    best, least = learner.map, np.inf
    for _ in range(EPOCHS):
        rates = _weighted_means(learner.map, known, fitted)
        loss = _log_loss(learner.map, rates, known.vectors[held_out], 1.0 - known.scores[held_out])
        if loss < least:
            best, least = learner.map, loss
        shuffled = rng.permutation(fitted)
        for start in range(0, shuffled.size, BATCH):
            rows = shuffled[start : start + BATCH]
            learner.step(known.vectors[rows].astype(np.float64), 1.0 - known.scores[rows], rates)
    return best


class _Learner:
    """Adam on slope and offset."""

    def __init__(self, start: SoftMap) -> None:
        self.map = start
        self._steps = 0
        self._moments = [np.zeros_like(array) for array in (start.slope, start.offset) for _ in range(2)]

    def step(self, vectors: Doubles, errors: Doubles, rates: Doubles) -> None:
        """One batch: (n, d), (n, R) with NaN where unlabelled, (R, K)."""
        weights = self.map.weights(vectors)
        expected = weights @ rates.T
        slack = np.where(np.isnan(errors), 0.0, (expected - errors) / (expected * (1.0 - expected)))
        pull = slack @ rates / max(int((~np.isnan(errors)).sum()), 1)
        logits = weights * (pull - (weights * pull).sum(axis=1, keepdims=True))
        slope, offset = vectors.T @ logits + DECAY * self.map.slope, logits.sum(axis=0)
        self._steps += 1
        self.map = SoftMap(
            self.map.slope - RATE * SHARPNESS * self._adam(0, slope), self.map.offset - RATE * self._adam(2, offset)
        )

    def _adam(self, at: int, gradient: Doubles) -> Doubles:
        self._moments[at] = FIRST * self._moments[at] + (1 - FIRST) * gradient
        self._moments[at + 1] = SECOND * self._moments[at + 1] + (1 - SECOND) * gradient**2
        mean = self._moments[at] / (1 - FIRST**self._steps)
        spread = self._moments[at + 1] / (1 - SECOND**self._steps)
        return np.asarray(mean / (np.sqrt(spread) + TINY))


def _weighted_means(soft: SoftMap, known: Known, rows: Indices) -> Doubles:
    answers = Asked(rows, known.scores[rows], np.empty((rows.size, 0)))
    return np.clip(_rates(soft.weights(known.vectors[rows]), answers), SURE, 1 - SURE)


def _rates(weights: Doubles, asked: Asked) -> Doubles:
    """(M, K) weighted means, with a hundredth of a label of the model's mean where nothing was asked."""
    errors, labels = sums(weights, asked)
    return np.asarray((errors + 0.01 * means(asked)[:, None]) / (labels + 0.01))


def _log_loss(soft: SoftMap, rates: Doubles, vectors: Floats, errors: Doubles) -> float:
    expected = soft.weights(vectors) @ rates.T
    losses = -(errors * np.log(expected) + (1.0 - errors) * np.log(1.0 - expected))
    return float(np.nanmean(losses)) if np.isfinite(losses).any() else np.inf
