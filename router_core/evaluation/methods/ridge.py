"""A linear model of each new model's errors on the embedding, with its mean left free."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.methods.tuning import Tuned, labelled_alike, means
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.types import Doubles, Floats

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
UNTUNED = 0.0


def ridge(known: Known) -> Estimator:
    """The penalty is chosen on the known models; with none, on the asked prompts, each left out once."""

    def estimate(strength: float, asked: Asked, vectors: Floats) -> Doubles:
        return linear_errors(known.vectors[asked.rows].astype(np.float64), asked, vectors, strength)

    tuned = Tuned(known, STRENGTHS, estimate, UNTUNED)

    def estimator(asked: Asked, vectors: Floats) -> Doubles:
        strength = tuned.choice(len(asked.rows)) or best_strength(known.vectors[asked.rows].astype(np.float64), asked)
        return estimate(strength, asked, vectors)

    return estimator


def linear_errors(seen: Doubles, asked: Asked, vectors: Floats, strength: float) -> Doubles:
    """(t, M) errors expected of (t, d) vectors, from the (N, d) that were asked; models of the same labels at once."""
    expected = np.tile(means(asked), (len(vectors), 1))
    for rows, models in labelled_alike(asked):
        errors = 1.0 - asked.scores[np.ix_(rows, models)]
        expected[:, models] += _slopes(seen[rows], errors - errors.mean(axis=0), vectors, strength)
    return np.asarray(np.clip(expected, 0.0, 1.0))


def _slopes(seen: Doubles, errors: Doubles, vectors: Floats, strength: float) -> Doubles:
    """(t, m) how far errors are expected from their means; solved among the N prompts or the d dimensions."""
    middle = seen.mean(axis=0)
    centred = seen - middle
    count, dimension = centred.shape
    if count < dimension:
        weights = centred.T @ np.linalg.solve(centred @ centred.T + strength * np.eye(count), errors)
    else:
        weights = np.linalg.solve(centred.T @ centred + strength * np.eye(dimension), centred.T @ errors)
    return np.asarray((vectors - middle) @ weights)


def best_strength(seen: Doubles, asked: Asked) -> float:
    """The strength with the least squared error on each asked prompt, told by the others."""
    losses = np.zeros(len(STRENGTHS))
    for rows, models in labelled_alike(asked):
        if rows.size > 1:
            losses += left_out_losses(seen[rows], 1.0 - asked.scores[np.ix_(rows, models)])
    return STRENGTHS[int(np.argmin(losses))]


def left_out_losses(seen: Doubles, errors: Doubles) -> Doubles:
    """(STRENGTHS,) squared errors of (n, m) labels, each left out once: PRESS (Allen 1974), which fits but once."""
    x, y = seen - seen.mean(axis=0), errors - errors.mean(axis=0)
    basis, singular, _ = np.linalg.svd(x, full_matrices=False)
    losses = []
    for strength in STRENGTHS:
        kept = basis * (singular**2 / (singular**2 + strength))
        leverage = 1.0 / len(seen) + (kept * basis).sum(axis=1)
        losses.append((((y - kept @ (basis.T @ y)) / (1.0 - leverage)[:, None]) ** 2).sum())
    return np.array(losses)
