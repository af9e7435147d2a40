"""Clusters of prompts that known models find alike, by the errors that a ridge expects of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.errors import InvalidInput
from router_core.kmeans import kmeans
from router_core.types import Assignment, Doubles, Floats

ERROR_CLUSTERS = 32
ERROR_TOP = 8
RIDGE = 10.0
ERROR_SHARPNESS = 12.0
"""Of the softmax over squared distances, per known model: with R of them its temperature is R/12."""


@dataclass(frozen=True, eq=False)
class ResponseClusters:
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


def fit_response(vectors: Floats, scores: Doubles, *, seed: int) -> ResponseClusters:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled."""
    fitted = [_ridge(vectors, 1.0 - column) for column in scores.T]
    weights = np.stack([slope for slope, _ in fitted], axis=1)
    offsets = np.array([offset for _, offset in fitted], dtype=np.float32)
    expected = vectors @ weights + offsets
    distinct = len(np.unique(expected, axis=0))
    centroids = kmeans(expected, min(ERROR_CLUSTERS, distinct), seed=seed, spherical=False)
    return ResponseClusters(weights, offsets, centroids, top=min(ERROR_TOP, len(centroids)))


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
