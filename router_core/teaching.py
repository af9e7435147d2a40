"""Which clusters known models teach a map. Each kind on its own: response.py, map_training.py."""

from __future__ import annotations

import numpy as np

from router_core.map_training import fit_learned_map
from router_core.response import fit_response
from router_core.taught import TaughtClusters
from router_core.types import Doubles, Floats

LEAST_MODELS = 3
LEAST_LABELS = 100
"""Fewer tell nothing that the embedding's own clusters don't: then nothing is taught."""


def fit_taught(vectors: Floats, scores: Doubles, *, seed: int) -> tuple[TaughtClusters, ...]:
    """Fit to n prompts, (n, d), and (n, R) scores in [0, 1] of known models, NaN where unlabelled.

    Two kinds, which err in different places: each, and the embedding's own clusters, then hold a third of every prompt.
    """
    enough = (~np.isnan(scores)).sum(axis=0) >= LEAST_LABELS
    if enough.sum() < LEAST_MODELS:
        return ()
    known = scores[:, enough]
    return (fit_response(vectors, known, seed=seed), fit_learned_map(vectors, known, seed=seed + 1))
