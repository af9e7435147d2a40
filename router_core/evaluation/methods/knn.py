"""k nearest neighbours: a prompt's expected error is the mean over the asked prompts that are most like it."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.tuning import Tuned, means
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats

NEIGHBOURS = (5, 10, 20, 40, 80)


def knn(known: Known) -> Estimator:
    """k is chosen on the known models; with none, on the asked prompts, each left out once."""

    def estimate(k: int, asked: Asked, vectors: Floats) -> Doubles:
        return neighbour_means(vectors @ known.vectors[asked.rows].T, asked, k)

    tuned = Tuned(known, NEIGHBOURS, estimate, 0)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        k = tuned.choice(len(asked.rows)) or _left_one_out(known.vectors[asked.rows], asked)
        return estimate(k, asked, vectors)

    return estimator


def neighbour_means(cosines: Floats, asked: Asked, k: int) -> Doubles:
    """(t, M) means over the k labelled prompts of the largest (t, N) cosines, with half a label of the model's mean."""
    overall = means(asked)
    expected = np.empty((len(cosines), overall.size))
    for model, scores in enumerate(asked.scores.T):
        labelled = np.flatnonzero(~np.isnan(scores))
        count = min(k, labelled.size)
        nearest = labelled[np.argsort(-cosines[:, labelled], axis=1, kind="stable")[:, :count]]
        expected[:, model] = ((1.0 - scores[nearest]).sum(axis=1) + 0.5 * overall[model]) / (count + 0.5)
    return expected


def _left_one_out(vectors: Floats, asked: Asked) -> int:
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    truth = 1.0 - asked.scores
    losses = [np.nanmean((neighbour_means(cosines, asked, k) - truth) ** 2) for k in NEIGHBOURS if k < len(vectors)]
    return NEIGHBOURS[int(np.argmin(losses))] if losses else NEIGHBOURS[0]
