"""A linear model of each new model's errors on the embedding, with its mean left free."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.tuning import Tuned, means
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
DEFAULT_STRENGTH = 10.0


def ridge(known: Known) -> Estimator:
    """The penalty is chosen on the known models."""

    def estimate(strength: float, asked: Asked, vectors: Floats) -> Doubles:
        return linear_errors(known.vectors[asked.rows].astype(np.float64), asked, vectors, strength)

    tuned = Tuned(known, STRENGTHS, estimate, DEFAULT_STRENGTH)
    return lambda asked, vectors: estimate(tuned.choice(len(asked.rows)), asked, vectors)


def linear_errors(seen: Doubles, asked: Asked, vectors: Floats, strength: float) -> Doubles:
    """(t, M) errors expected of (t, d) vectors, from the (N, d) that were asked; models of the same labels at once."""
    labelled = ~np.isnan(asked.scores)
    expected = np.tile(means(asked), (len(vectors), 1))
    for pattern in np.unique(labelled, axis=1).T:
        models = np.flatnonzero((labelled == pattern[:, None]).all(axis=0))
        if pattern.any():
            errors = 1.0 - asked.scores[np.ix_(pattern, models)]
            expected[:, models] += _slopes(seen[pattern], errors - errors.mean(axis=0), vectors, strength)
    return np.asarray(np.clip(expected, 0.0, 1.0))


def _slopes(seen: Doubles, errors: Doubles, vectors: Floats, strength: float) -> Doubles:
    """(t, m) how far errors are expected from their means; solved among the N prompts, which are few."""
    middle = seen.mean(axis=0)
    centred = seen - middle
    dual = np.linalg.solve(centred @ centred.T + strength * np.eye(len(centred)), errors)
    return np.asarray((vectors - middle) @ (centred.T @ dual))
