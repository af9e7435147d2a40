"""UniRoute's learned map (arXiv 2502.08773, section 5.2): a softmax over clusters. Training is map_training.py.

Φ(x) = softmax(x·W + b). Where the embedding's own clusters hold prompts of one subject together, these hold prompts
together on which models that are known are wrong alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.clustering import LearnedClusters, kmeans
from router_core.errors import InvalidInput
from router_core.types import Assignment, Doubles, Floats, Indices

TOP = 8
"""Of 32 clusters, the eight heaviest hold all but a thousandth of most prompts."""


@dataclass(frozen=True, eq=False)
class LearnedMap:
    slope: Floats
    """(d, K)"""
    offset: Floats
    """(K,)"""
    top: int = TOP
    """How many clusters share a prompt when it is assigned; the others' small weights are left out."""

    def __post_init__(self) -> None:
        if self.slope.ndim != 2 or self.offset.shape != self.slope.shape[1:]:
            raise InvalidInput("a learned map needs a (d, K) slope and a (K,) offset")
        if not 1 <= self.top <= self.size:
            raise InvalidInput(f"top must be from 1 to {self.size}; got {self.top}")

    @property
    def size(self) -> int:
        return int(self.offset.size)

    @property
    def dimension(self) -> int:
        return len(self.slope)

    def weights(self, vectors: Floats) -> Floats:
        """(n, K) of all clusters, rows sum to one."""
        logits = vectors @ self.slope + self.offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def assign(self, vectors: Floats) -> Assignment:
        """The heaviest clusters of each row of `vectors`, (n, d)."""
        weights = self.weights(vectors)
        ids = np.argsort(-weights, axis=1, kind="stable")[:, : self.top]
        heaviest = np.take_along_axis(weights, ids, axis=1)
        return Assignment(ids.astype(np.int64), heaviest / heaviest.sum(axis=1, keepdims=True))

    def likeness(self) -> Doubles:
        """(K, K): training makes its clusters as different as it can, so no two are alike beforehand."""
        return np.eye(self.size)


ERROR_CLUSTERS = 32

ERROR_TOP = 8

RIDGE = 10.0

ERROR_SHARPNESS = 12.0
"""Of the softmax over squared distances, per known model: with R of them its temperature is R/12."""


@dataclass(frozen=True, eq=False)
class ErrorClusters:
    """A linear map from the embedding to the errors expected of R known models, and K clusters of its values."""

    weights: Floats
    """(d, R)"""
    offsets: Floats
    """(R,)"""
    centroids: Floats
    """(K, R)"""
    top: int = ERROR_TOP

    def __post_init__(self) -> None:
        known = self.offsets.size
        if self.weights.ndim != 2 or self.weights.shape[1] != known or self.centroids.shape[1:] != (known,):
            raise InvalidInput("response clusters need (d, R) weights, (R,) offsets and (K, R) centroids")
        if not (1 <= self.top <= len(self.centroids)):
            raise InvalidInput(f"top must be from 1 to {len(self.centroids)}; got {self.top}")

    @property
    def size(self) -> int:
        return len(self.centroids)

    @property
    def dimension(self) -> int:
        return len(self.weights)

    def assign(self, vectors: Floats) -> Assignment:
        """Weights ∝ exp(−distance²/τ) over the p nearest of each row of `vectors`, (n, d)."""
        distances = _squared_distances(vectors @ self.weights + self.offsets, self.centroids)
        ids = np.argsort(distances, axis=1, kind="stable")[:, : self.top]
        nearest = np.take_along_axis(distances, ids, axis=1)
        weights = np.exp((nearest[:, :1] - nearest) * np.float32(ERROR_SHARPNESS / self.offsets.size))
        return Assignment(ids.astype(np.int64), weights / weights.sum(axis=1, keepdims=True))

    def likeness(self) -> Doubles:
        """(K, K) how alike two clusters are, 1 on the diagonal."""
        centroids = self.centroids.astype(np.float64)
        distances = _squared_distances(centroids, centroids)
        return np.asarray(np.exp(-distances / max(float(distances.mean()), 1e-12)))


def fit_response(vectors: Floats, scores: Doubles, *, seed: int) -> ErrorClusters:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled."""
    fitted = [_ridge(vectors, 1.0 - column) for column in scores.T]
    weights = np.stack([slope for slope, _ in fitted], axis=1)
    offsets = np.array([offset for _, offset in fitted], dtype=np.float32)
    expected = vectors @ weights + offsets
    distinct = len(np.unique(expected, axis=0))
    centroids = kmeans(expected, min(ERROR_CLUSTERS, distinct), seed=seed, spherical=False)
    return ErrorClusters(weights, offsets, centroids, top=min(ERROR_TOP, len(centroids)))


def _ridge(vectors: Floats, errors: Doubles) -> tuple[Floats, float]:
    """Slope and offset of the errors on the embedding, scaled so that the expected errors have variance one."""
    labelled = ~np.isnan(errors)
    x, y = vectors[labelled].astype(np.float64), errors[labelled]
    middle, mean = x.mean(axis=0), y.mean()
    x = x - middle
    # The penalty is meant for errors of variance one; a model that is always right has no slope at all.
    scale = max(float(y.std()), 1e-9)
    slope = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ ((y - mean) / scale))
    slope /= max(float((x @ slope).std()), 1e-9)
    return slope.astype(np.float32), -float(middle @ slope)


def _squared_distances(left: Floats | Doubles, right: Floats | Doubles) -> Doubles:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2.0 * left @ right.T
    return np.asarray(np.maximum(squares, 0.0))


# Training of a learned map: Adam on the log loss of Φ(x)·Ψ(m) over known models, Ψ held to its weighted means.
#
# It starts as the softmax of cosines to K-means centroids, and stops where prompts that are held out gain nothing more.

TRAINED_CLUSTERS = 32

TRAINED_SHARPNESS = 10.0
"""Of the softmax over cosines that training starts from: a temperature of 0.1."""

EPOCHS, PATIENCE = 80, 8
"""Passes over the prompts; and after how many without a gain on the held-out ones it stops, in place of decay."""

BATCH = 256

RATE = 0.01

HELD_OUT = 0.1

FIRST, SECOND, TINY = 0.9, 0.999, 1e-8
"""Adam's constants (arXiv 1412.6980)."""

SURE = 0.01
"""Rates are kept this far from 0 and 1 in training, where the log loss has no end."""


@dataclass(frozen=True, eq=False)
class TrainingTargets:
    """What R known models made of n prompts."""

    vectors: Floats
    """(n, d)"""
    errors: Floats
    """(n, R), 0 where unlabelled."""
    labelled: Floats
    """(n, R), 1 or 0."""

    def at(self, rows: Indices) -> TrainingTargets:
        return TrainingTargets(self.vectors[rows], self.errors[rows], self.labelled[rows])


def fit_learned_map(vectors: Floats, scores: Doubles, *, seed: int, clusters: int = TRAINED_CLUSTERS) -> LearnedMap:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled.

    A tenth of the prompts that are labelled at all is held out, to know when to stop.
    """
    start = initial_map(vectors, clusters, seed=seed)
    answers = answers_of(vectors, scores)
    told = np.flatnonzero(answers.labelled.any(axis=1))
    if told.size < 2:
        return start
    rng = np.random.default_rng(seed)
    order = rng.permutation(told)
    split = max(1, round(HELD_OUT * order.size))
    return train(start, answers.at(order[split:]), answers.at(order[:split]), rng)


def initial_map(vectors: Floats, clusters: int, *, seed: int) -> LearnedMap:
    """Soft K-means: what training has to be better than."""
    distinct = len(np.unique(vectors, axis=0))
    centroids = kmeans(vectors, min(clusters, distinct), seed=seed)
    offset = np.zeros(len(centroids), dtype=np.float32)
    return LearnedMap(np.float32(TRAINED_SHARPNESS) * centroids.T, offset, min(TOP, len(centroids)))


def train(
    start: LearnedMap, fitted: TrainingTargets, held_out: TrainingTargets, rng: np.random.Generator
) -> LearnedMap:
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


def answers_of(vectors: Floats, scores: Doubles) -> TrainingTargets:
    labelled = ~np.isnan(scores)
    errors = np.where(labelled, 1.0 - scores, 0.0)
    return TrainingTargets(vectors, errors.astype(np.float32), labelled.astype(np.float32))


def rates_of(learned: LearnedMap, answers: TrainingTargets) -> Floats:
    """(R, K) Ψ: mean errors under Φ; a cluster without any prompt has the model's mean."""
    weights = learned.weights(answers.vectors)
    overall = (answers.errors.sum(axis=0) + 0.5) / (answers.labelled.sum(axis=0) + 1.0)
    rates = (answers.errors.T @ weights + SURE * overall[:, None]) / (answers.labelled.T @ weights + SURE)
    return np.asarray(np.clip(rates, SURE, 1.0 - SURE), dtype=np.float32)


def log_loss(learned: LearnedMap, rates: Floats, answers: TrainingTargets) -> float:
    """Mean over the labels, in nats; infinite without any."""
    expected = learned.weights(answers.vectors) @ rates.T
    right = answers.labelled - answers.errors
    total = float((answers.errors * np.log(expected) + right * np.log(1.0 - expected)).sum())
    labels = float(answers.labelled.sum())
    return -total / labels if labels else np.inf


def gradient(learned: LearnedMap, rates: Floats, answers: TrainingTargets) -> tuple[Floats, Floats]:
    """Of the log loss by slope and offset, `rates` held."""
    weights = learned.weights(answers.vectors)
    expected = weights @ rates.T
    slack = (answers.labelled * expected - answers.errors) / (expected * (1.0 - expected))
    pull = slack @ rates / max(float(answers.labelled.sum()), 1.0)
    logits = weights * (pull - (weights * pull).sum(axis=1, keepdims=True))
    return np.asarray(answers.vectors.T @ logits), np.asarray(logits.sum(axis=0))


class _Learner:
    """Adam on slope and offset, a batch at a time."""

    def __init__(self, start: LearnedMap) -> None:
        self.map = start
        self._steps = 0
        self._slope, self._offset = _Moments(start.slope), _Moments(start.offset)

    def epoch(self, answers: TrainingTargets, rates: Floats, order: Indices) -> None:
        for start in range(0, order.size, BATCH):
            self._step(answers.at(order[start : start + BATCH]), rates)

    def _step(self, answers: TrainingTargets, rates: Floats) -> None:
        slope, offset = gradient(self.map, rates, answers)
        self._steps += 1
        self.map = LearnedMap(
            self.map.slope - self._slope.stretch(slope, self._steps),
            self.map.offset - self._offset.stretch(offset, self._steps),
            self.map.top,
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


MIN_MODELS = 3

MIN_LABELS = 100
"""Fewer tell nothing that the embedding's own clusters don't: then nothing is taught."""


def fit_learned_clusters(vectors: Floats, scores: Doubles, *, seed: int) -> tuple[LearnedClusters, ...]:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled.

    Two kinds, which err in different places: each, and the embedding's own clusters, then hold a third of every prompt.
    """
    enough = (~np.isnan(scores)).sum(axis=0) >= MIN_LABELS
    if enough.sum() < MIN_MODELS:
        return ()
    known = scores[:, enough]
    return (fit_response(vectors, known, seed=seed), fit_learned_map(vectors, known, seed=seed + 1))
