"""Clusters fitted to what known models got wrong, beside those of the embedding.

`ErrorClusters` clusters the errors that a ridge regression expects of the known models. `LearnedMap` is UniRoute's
learned map (arXiv 2502.08773, section 5.2): Φ(x) = softmax(x·W + b), trained by Adam on the log loss of Φ(x)·Ψ(m) over
the known models. Where the embedding's own clusters hold prompts of one subject together, these hold prompts together
on which the known models are wrong alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from router_core.clustering import LearnedClusters, kmeans
from router_core.errors import InvalidInput
from router_core.types import Assignment, Doubles, Floats, Indices

# Of 32 clusters, the eight heaviest hold all but a thousandth of most prompts.
DEFAULT_TOP = 8

ERROR_CLUSTERS = 32

ERROR_TOP = 8

RIDGE_PENALTY = 10.0

# Sharpness of the softmax over squared distances, per known model: with R of them its temperature is R/12.
ERROR_SHARPNESS = 12.0

TRAINED_CLUSTERS = 32

# Sharpness of the softmax over cosines that training starts from: a temperature of 0.1.
INITIAL_SHARPNESS = 10.0

MAX_EPOCHS = 80

# Training stops after so many epochs without a gain on the held-out prompts; there is no weight decay.
PATIENCE_EPOCHS = 8

BATCH_SIZE = 256

LEARNING_RATE = 0.01

HELD_OUT_SHARE = 0.1

# Adam's constants β1, β2 and ε (arXiv 1412.6980).
ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8

# In training, rates stay this far from 0 and 1, where the log loss is infinite.
RATE_MARGIN = 0.01

MIN_MODELS = 3

# With fewer labels a known model adds nothing to the embedding's own clusters, and is left out.
MIN_LABELS = 100


@dataclass(frozen=True, eq=False)
class LearnedMap:
    """Φ(x) = softmax(x·slope + offset)."""

    slope: Floats
    """(d, K)"""
    offset: Floats
    """(K,)"""
    top: int = DEFAULT_TOP
    """How many clusters share a prompt when it is assigned; the small weights of the others are left out."""
    digest_name: ClassVar[str] = "LearnedMap"

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
        """Return the (n, K) weights of all clusters for (n, d) vectors; rows sum to one."""
        logits = vectors @ self.slope + self.offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def assign(self, vectors: Floats) -> Assignment:
        """Assign each row of `vectors`, (n, d), to its heaviest clusters."""
        weights = self.weights(vectors)
        ids = np.argsort(-weights, axis=1, kind="stable")[:, : self.top]
        heaviest = np.take_along_axis(weights, ids, axis=1)
        return Assignment(ids.astype(np.int64), heaviest / heaviest.sum(axis=1, keepdims=True))

    def similarity(self) -> Doubles:
        """Return the (K, K) identity: training makes its clusters as different as it can."""
        return np.eye(self.size)


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
    digest_name: ClassVar[str] = "ResponseClusters"

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
        """Assign each row of `vectors`, (n, d), with weights ∝ exp(−distance²/τ) over the `top` nearest clusters."""
        distances = _squared_distances(vectors @ self.weights + self.offsets, self.centroids)
        ids = np.argsort(distances, axis=1, kind="stable")[:, : self.top]
        nearest = np.take_along_axis(distances, ids, axis=1)
        weights = np.exp((nearest[:, :1] - nearest) * np.float32(ERROR_SHARPNESS / self.offsets.size))
        return Assignment(ids.astype(np.int64), weights / weights.sum(axis=1, keepdims=True))

    def similarity(self) -> Doubles:
        """Return (K, K) exp(−distance² ÷ mean distance²), 1 on the diagonal."""
        centroids = self.centroids.astype(np.float64)
        distances = _squared_distances(centroids, centroids)
        return np.asarray(np.exp(-distances / max(float(distances.mean()), 1e-12)))


def fit_learned_clusters(
    vectors: Floats, surface: Floats, scores: Doubles, *, seed: int
) -> tuple[LearnedClusters, ...]:
    """Fit both kinds to n prompts, (n, d), their surface features, (n, f), and (n, R) scores of known models.

    Scores are in [0, 1], NaN where unlabelled.

    They err in different places: each of the two, and the embedding's own clusters, then hold a third of every prompt.
    Returns nothing if there are fewer than MIN_MODELS models with MIN_LABELS labels.
    """
    enough = (~np.isnan(scores)).sum(axis=0) >= MIN_LABELS
    if enough.sum() < MIN_MODELS:
        return ()
    known = scores[:, enough]
    return (
        fit_error_clusters(np.concatenate((vectors, surface), axis=1), known, seed=seed),
        fit_learned_map(vectors, known, seed=seed + 1, surface=surface),
    )


def fit_error_clusters(vectors: Floats, scores: Doubles, *, seed: int) -> ErrorClusters:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled."""
    fitted = [_ridge(vectors, 1.0 - column) for column in scores.T]
    weights = np.stack([slope for slope, _ in fitted], axis=1)
    offsets = np.array([offset for _, offset in fitted], dtype=np.float32)
    expected = vectors @ weights + offsets
    distinct = len(np.unique(expected, axis=0))
    centroids = kmeans(expected, min(ERROR_CLUSTERS, distinct), seed=seed, spherical=False)
    return ErrorClusters(weights, offsets, centroids, top=min(ERROR_TOP, len(centroids)))


def _ridge(vectors: Floats, errors: Doubles) -> tuple[Floats, float]:
    """Regress (n,) errors on (n, d) vectors; return slope and offset, scaled to expected errors of variance one."""
    labelled = ~np.isnan(errors)
    x, y = vectors[labelled].astype(np.float64), errors[labelled]
    x_mean, y_mean = x.mean(axis=0), y.mean()
    x = x - x_mean
    # The penalty is meant for errors of variance one; a model that is always right has no slope at all.
    scale = max(float(y.std()), 1e-9)
    slope = np.linalg.solve(x.T @ x + RIDGE_PENALTY * np.eye(x.shape[1]), x.T @ ((y - y_mean) / scale))
    slope /= max(float((x @ slope).std()), 1e-9)
    return slope.astype(np.float32), -float(x_mean @ slope)


def _squared_distances(left: Floats | Doubles, right: Floats | Doubles) -> Doubles:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2.0 * left @ right.T
    return np.asarray(np.maximum(squares, 0.0))


@dataclass(frozen=True, eq=False)
class TrainingTargets:
    """What R known models made of n prompts."""

    vectors: Floats
    """(n, d)"""
    errors: Floats
    """(n, R), 0 where unlabelled."""
    labelled: Floats
    """(n, R), 1 or 0."""

    @classmethod
    def from_scores(cls, vectors: Floats, scores: Doubles) -> TrainingTargets:
        labelled = ~np.isnan(scores)
        errors = np.where(labelled, 1.0 - scores, 0.0)
        return cls(vectors, errors.astype(np.float32), labelled.astype(np.float32))

    def at(self, rows: Indices) -> TrainingTargets:
        return TrainingTargets(self.vectors[rows], self.errors[rows], self.labelled[rows])


def fit_learned_map(
    vectors: Floats, scores: Doubles, *, seed: int, clusters: int = TRAINED_CLUSTERS, surface: Floats | None = None
) -> LearnedMap:
    """Train on n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled.

    A tenth of the prompts that have a label is held out, to know when to stop.

    Args:
        surface: (n, f) features that the map reads too.
    """
    start = initial_map(vectors, clusters, seed=seed)
    if surface is not None:
        unread = np.zeros((surface.shape[1], start.size), dtype=np.float32)
        start = LearnedMap(np.concatenate((start.slope, unread)), start.offset, start.top)
        vectors = np.concatenate((vectors, surface), axis=1)
    targets = TrainingTargets.from_scores(vectors, scores)
    usable = np.flatnonzero(targets.labelled.any(axis=1))
    if usable.size < 2:
        return start
    rng = np.random.default_rng(seed)
    order = rng.permutation(usable)
    split = max(1, round(HELD_OUT_SHARE * order.size))
    return train(start, targets.at(order[split:]), targets.at(order[:split]), rng)


def initial_map(vectors: Floats, clusters: int, *, seed: int) -> LearnedMap:
    """Return the softmax of cosines to k-means centroids, which training starts from."""
    distinct = len(np.unique(vectors, axis=0))
    centroids = kmeans(vectors, min(clusters, distinct), seed=seed)
    offset = np.zeros(len(centroids), dtype=np.float32)
    return LearnedMap(np.float32(INITIAL_SHARPNESS) * centroids.T, offset, min(DEFAULT_TOP, len(centroids)))


def train(
    start: LearnedMap, fitted: TrainingTargets, held_out: TrainingTargets, rng: np.random.Generator
) -> LearnedMap:
    """Return the map of the epoch with the least log loss on `held_out`; the start is one of them."""
    learner = _Learner(start)
    best, least, best_epoch = start, np.inf, 0
    for epoch in range(MAX_EPOCHS + 1):
        rates = error_rates(learner.map, fitted)
        loss = log_loss(learner.map, rates, held_out)
        if loss < least:
            best, least, best_epoch = learner.map, loss, epoch
        if epoch - best_epoch >= PATIENCE_EPOCHS:
            break
        learner.epoch(fitted, rates, rng.permutation(len(fitted.vectors)))
    return best


def error_rates(learned: LearnedMap, targets: TrainingTargets) -> Floats:
    """Return Ψ, (R, K): the mean errors under Φ. A cluster without any prompt gets the model's mean."""
    weights = learned.weights(targets.vectors)
    overall = (targets.errors.sum(axis=0) + 0.5) / (targets.labelled.sum(axis=0) + 1.0)
    rates = (targets.errors.T @ weights + RATE_MARGIN * overall[:, None]) / (targets.labelled.T @ weights + RATE_MARGIN)
    return np.asarray(np.clip(rates, RATE_MARGIN, 1.0 - RATE_MARGIN), dtype=np.float32)


def log_loss(learned: LearnedMap, rates: Floats, targets: TrainingTargets) -> float:
    """Return the mean log loss over the labels, in nats; infinite without any."""
    expected = learned.weights(targets.vectors) @ rates.T
    right = targets.labelled - targets.errors
    total = float((targets.errors * np.log(expected) + right * np.log(1.0 - expected)).sum())
    labels = float(targets.labelled.sum())
    return -total / labels if labels else np.inf


def gradient(learned: LearnedMap, rates: Floats, targets: TrainingTargets) -> tuple[Floats, Floats]:
    """Return the log loss' gradient by slope, (d, K), and offset, (K,), with `rates` held fixed."""
    weights = learned.weights(targets.vectors)
    expected = weights @ rates.T
    residual = (targets.labelled * expected - targets.errors) / (expected * (1.0 - expected))
    by_weight = residual @ rates / max(float(targets.labelled.sum()), 1.0)
    by_logit = weights * (by_weight - (weights * by_weight).sum(axis=1, keepdims=True))
    return np.asarray(targets.vectors.T @ by_logit), np.asarray(by_logit.sum(axis=0))


class _Learner:
    """Adam (arXiv 1412.6980) on slope and offset, a batch at a time."""

    def __init__(self, start: LearnedMap) -> None:
        self.map = start
        self._steps = 0
        self._slope, self._offset = _Moments(start.slope), _Moments(start.offset)

    def epoch(self, targets: TrainingTargets, rates: Floats, order: Indices) -> None:
        for start in range(0, order.size, BATCH_SIZE):
            slope, offset = gradient(self.map, rates, targets.at(order[start : start + BATCH_SIZE]))
            self._steps += 1
            self.map = LearnedMap(
                self.map.slope - self._slope.update(slope, self._steps),
                self.map.offset - self._offset.update(offset, self._steps),
                self.map.top,
            )


class _Moments:
    """Adam's running moments of one array's gradient."""

    def __init__(self, like: Floats) -> None:
        self._mean, self._square = np.zeros_like(like), np.zeros_like(like)

    def update(self, gradient: Floats, step: int) -> Floats:
        """Return how far to go against the gradient at this step, the first being 1."""
        self._mean = np.asarray(ADAM_BETA1 * self._mean + (1 - ADAM_BETA1) * gradient)
        self._square = np.asarray(ADAM_BETA2 * self._square + (1 - ADAM_BETA2) * gradient**2)
        mean, square = self._mean / (1 - ADAM_BETA1**step), self._square / (1 - ADAM_BETA2**step)
        return np.asarray(LEARNING_RATE * mean / (np.sqrt(square) + ADAM_EPSILON))
