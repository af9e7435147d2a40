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
        seen = known.vectors[asked.rows].astype(np.float64)
        columns = [_line(seen, 1.0 - scores, vectors, strength) for scores in asked.scores.T]
        return np.clip(np.stack(columns, axis=1) + means(asked), 0.0, 1.0)

    tuned = Tuned(known, STRENGTHS, estimate, DEFAULT_STRENGTH)
    return lambda asked, vectors: estimate(tuned.choice(len(asked.rows)), asked, vectors)


def _line(seen: Doubles, errors: Doubles, vectors: Floats, strength: float) -> Doubles:
    """(t,) how far the errors expected of `vectors` are from the mean; solved among the N prompts, fewer than d."""
    labelled = ~np.isnan(errors)
    if not labelled.any():
        return np.zeros(len(vectors))
    x, y = seen[labelled], errors[labelled]
    middle = x.mean(axis=0)
    x = x - middle
    dual = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y - y.mean())
    return np.asarray((vectors - middle) @ (x.T @ dual))
