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

SHARPNESS = 10.0
"""Of the softmax over cosines that training starts from: a temperature of 0.1."""
EPOCHS, PATIENCE = 80, 8
"""Passes over the train prompts; and after how many without a gain on the held-out ones it stops, in place of decay."""
BATCH = 256
RATE = 0.01
HELD_OUT = 0.1
FIRST, SECOND, TINY = 0.9, 0.999, 1e-8
"""Adam's constants (arXiv 1412.6980)."""
SURE = 0.01
"""Rates are kept this far from 0 and 1 in training, where the log loss has no end."""
SMOOTHING = 0.5
"""Labels of the model's mean in each cluster; the paper has none, and does worse at few labels."""


@dataclass(frozen=True, eq=False)
class SoftMap:
    slope: Floats
    """(d, K)"""
    offset: Floats
    """(K,)"""

    def weights(self, vectors: Floats) -> Floats:
        """(n, K), rows sum to one."""
        logits = vectors @ self.slope + self.offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Answers:
    """What R known models made of n prompts."""

    vectors: Floats
    """(n, d)"""
    errors: Floats
    """(n, R), 0 where unlabelled."""
    labelled: Floats
    """(n, R), 1 or 0."""

    def at(self, rows: Indices) -> Answers:
        return Answers(self.vectors[rows], self.errors[rows], self.labelled[rows])


def learned_map(known: Known) -> Estimator:
    if not known.models:
        return kmeans_raw(known)
    trained = trained_map(known)
    weights = trained.weights(known.vectors).astype(np.float64)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        errors, labels = sums(weights[asked.rows], asked)
        rates = (errors + SMOOTHING * means(asked)[:, None]) / (labels + SMOOTHING)
        return np.clip(trained.weights(vectors).astype(np.float64) @ rates.T, 0.0, 1.0)

    return estimator


def starting_map(known: Known) -> SoftMap:
    """Soft K-means: what training has to be better than."""
    centroids = hard_map(known, DEFAULT_SIZE).centroids
    return SoftMap(np.float32(SHARPNESS) * centroids.T, np.zeros(len(centroids), dtype=np.float32))


def trained_map(known: Known) -> SoftMap:
    """A tenth of the prompts is held out, to know when to stop."""
    rng = np.random.default_rng(known.seed)
    order = rng.permutation(len(known.vectors))
    split = max(1, round(HELD_OUT * order.size))
    answers = answers_of(known)
    return train(starting_map(known), answers.at(order[split:]), answers.at(order[:split]), rng)


def train(start: SoftMap, fitted: Answers, held_out: Answers, rng: np.random.Generator) -> SoftMap:
    """The map of the epoch with the least log loss on what is held out; the start is one of them."""
    learner = _Learner(start)
    best, least, best_epoch = start, np.inf, 0
    for epoch in range(EPOCHS + 1):
        rates = rates_of(learner.map, fitted)
        loss = log_loss(learner.map, rates, held_out)
        if loss < least:
            best, least, best_epoch = learner.map, loss, epoch
        if epoch - best_epoch >= PATIENCE:
            break
        learner.epoch(fitted, rates, rng.permutation(len(fitted.vectors)))
    return best


def answers_of(known: Known) -> Answers:
    labelled = ~np.isnan(known.scores)
    errors = np.where(labelled, 1.0 - known.scores, 0.0)
    return Answers(known.vectors, errors.astype(np.float32), labelled.astype(np.float32))


def rates_of(soft: SoftMap, answers: Answers) -> Floats:
    """(R, K) Ψ: mean errors under Φ; a cluster without any prompt has the model's mean."""
    weights = soft.weights(answers.vectors)
    overall = (answers.errors.sum(axis=0) + 0.5) / (answers.labelled.sum(axis=0) + 1.0)
    rates = (answers.errors.T @ weights + SURE * overall[:, None]) / (answers.labelled.T @ weights + SURE)
    return np.asarray(np.clip(rates, SURE, 1.0 - SURE), dtype=np.float32)


def log_loss(soft: SoftMap, rates: Floats, answers: Answers) -> float:
    """Mean over the labels, in nats; infinite without any."""
    expected = soft.weights(answers.vectors) @ rates.T
    right = answers.labelled - answers.errors
    total = float((answers.errors * np.log(expected) + right * np.log(1.0 - expected)).sum())
    labels = float(answers.labelled.sum())
    return -total / labels if labels else np.inf


def gradient(soft: SoftMap, rates: Floats, answers: Answers) -> tuple[Floats, Floats]:
    """Of the log loss by slope and offset, `rates` held."""
    weights = soft.weights(answers.vectors)
    expected = weights @ rates.T
    slack = (answers.labelled * expected - answers.errors) / (expected * (1.0 - expected))
    pull = slack @ rates / max(float(answers.labelled.sum()), 1.0)
    logits = weights * (pull - (weights * pull).sum(axis=1, keepdims=True))
    return np.asarray(answers.vectors.T @ logits), np.asarray(logits.sum(axis=0))


class _Learner:
    """Adam on slope and offset, a batch at a time."""

    def __init__(self, start: SoftMap) -> None:
        self.map = start
        self._steps = 0
        self._slope, self._offset = _Moments(start.slope), _Moments(start.offset)

    def epoch(self, answers: Answers, rates: Floats, order: Indices) -> None:
        for start in range(0, order.size, BATCH):
            self._step(answers.at(order[start : start + BATCH]), rates)

    def _step(self, answers: Answers, rates: Floats) -> None:
        slope, offset = gradient(self.map, rates, answers)
        self._steps += 1
        self.map = SoftMap(
            self.map.slope - self._slope.stretch(slope, self._steps),
            self.map.offset - self._offset.stretch(offset, self._steps),
        )


class _Moments:
    def __init__(self, like: Floats) -> None:
        self._mean, self._square = np.zeros_like(like), np.zeros_like(like)

    def stretch(self, slope: Floats, steps: int) -> Floats:
        """How far to go down at this step, the first being 1."""
        self._mean = np.asarray(FIRST * self._mean + (1 - FIRST) * slope)
        self._square = np.asarray(SECOND * self._square + (1 - SECOND) * slope**2)
        mean, square = self._mean / (1 - FIRST**steps), self._square / (1 - SECOND**steps)
        return np.asarray(RATE * mean / (np.sqrt(square) + TINY))
