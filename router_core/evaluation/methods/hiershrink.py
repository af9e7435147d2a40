"""Nested shrinkage: fine clusters lean on the coarse ones that they lie in, and those on the model's mean."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.kmeans import hard_map
from router_core.evaluation.methods.tuning import means, sums
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats, Indices

COARSE, FINE = 20, 100
STRENGTH = 24.0
"""Labels that the level above counts as."""


def hiershrink(known: Known) -> Estimator:
    coarse, fine = hard_map(known, COARSE), hard_map(known, FINE)
    parents = coarse.assign(fine.centroids).ids[:, 0]

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        weights = fine.assign(known.vectors[asked.rows]).dense(fine.size)
        errors, labels = sums(weights, asked)
        return fine.assign(vectors).expected(nested_rates(errors, labels, parents, means(asked)))

    return estimator


def nested_rates(errors: Doubles, labels: Doubles, parents: Indices, overall: Doubles) -> Doubles:
    """(M, fine) rates of (M, fine) sums and labels; `parents`: (fine,) coarse clusters; `overall`: (M,) mean errors."""
    member = np.eye(int(parents.max()) + 1)[parents]
    above = _leaning(errors @ member, labels @ member, overall[:, None])
    return _leaning(errors, labels, above[:, parents])


def _leaning(errors: Doubles, labels: Doubles, on: Doubles) -> Doubles:
    return np.asarray((errors + STRENGTH * on) / (labels + STRENGTH))
