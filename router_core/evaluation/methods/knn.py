"""k nearest neighbours: a prompt's expected error is the mean over the asked prompts that are most like it."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.tuning import Tuned, labelled_alike, squared_error
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats

NEIGHBOURS = (5, 10, 20, 40, 80)
SMOOTHING = 5.0
"""Labels that the model's mean counts as: of 0.5, 2, 5 and 10 the best at 100 and 400 labels of llmrouter9."""


def knn(known: Known) -> Estimator:
    """k is chosen on the known models; with none, on the asked prompts, each left out once."""

    def estimate(k: int, asked: Asked, vectors: Floats) -> Doubles:
        return neighbour_means(vectors @ known.vectors[asked.rows].T, asked, k)

    tuned = Tuned(known, NEIGHBOURS, estimate, 0)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        k = tuned.choice(len(asked.rows)) or best_neighbour_count(known.vectors[asked.rows], asked)
        return estimate(k, asked, vectors)

    return estimator


def neighbour_means(cosines: Floats, asked: Asked, k: int) -> Doubles:
    """(t, M) means over the k labelled prompts of the largest (t, N) cosines, leaning on the model's mean.

    A cosine of -inf is no neighbour, and not in the mean either.
    """
    expected = np.full((len(cosines), asked.scores.shape[1]), 0.5)
    for rows, models in labelled_alike(asked):
        errors, likeness = 1.0 - asked.scores[np.ix_(rows, models)], cosines[:, rows]
        others = np.isfinite(likeness)
        overall = (others @ errors + 0.5) / (others.sum(axis=1, keepdims=True) + 1.0)
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :k]
        counted = np.take_along_axis(others, nearest, axis=1)
        total = np.einsum("tk,tkm->tm", counted, errors[nearest])
        expected[:, models] = (total + SMOOTHING * overall) / (counted.sum(axis=1, keepdims=True) + SMOOTHING)
    return expected


def best_neighbour_count(vectors: Floats, asked: Asked) -> int:
    """The k with the least squared error on each asked prompt, told by the others."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    losses = [squared_error(neighbour_means(cosines, asked, k), 1.0 - asked.scores) for k in NEIGHBOURS]
    return NEIGHBOURS[int(np.argmin(losses))]
