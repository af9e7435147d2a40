"""UniRoute's learned map by itself, trained on the known models; with none it is the paper's K-means with raw rates."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.kmeans import DEFAULT_SIZE, kmeans_raw
from router_core.evaluation.methods.tuning import means, sums
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.map_training import fit_learned_map
from router_core.types import Doubles, Floats

SMOOTHING = 0.5
"""Labels of the model's mean in each cluster; the paper has none, and does worse at few labels."""


def learned_map(known: Known) -> Estimator:
    if not known.models:
        return kmeans_raw(known)
    trained = fit_learned_map(known.vectors, known.scores, seed=known.seed % 2**16, clusters=DEFAULT_SIZE)
    weights = trained.weights(known.vectors).astype(np.float64)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        errors, labels = sums(weights[asked.rows], asked)
        rates = (errors + SMOOTHING * means(asked)[:, None]) / (labels + SMOOTHING)
        return np.clip(trained.weights(vectors).astype(np.float64) @ rates.T, 0.0, 1.0)

    return estimator
