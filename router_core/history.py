"""What a map remembers of the prompts and models it was fitted with. Sums alone: no prompt, no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_core.errors import InvalidInput
from router_core.types import Assignment, Doubles

LARGEST = 256
"""Clusters up to which a map keeps how they overlap: the matrix, and all that is computed with it, grows with K²."""
_ROWS = 4096
"""Prompts that are laid out densely at once."""


@dataclass(frozen=True, eq=False)
class History:
    """How a map's K clusters share prompts, and what R known models got wrong in each.

    The known models are never routed to. They tell how hard the clusters are and how much models differ, so that the
    few answers of a new one go further.
    """

    overlap: Doubles
    """(K, K) Σ_j w_jk·w_jl / √(n_k·n_l) over the prompts, n_k = Σ_j w_jk; a hard assignment gives the identity."""
    models: tuple[str, ...]
    error_sums: Doubles
    """(R, K)"""
    labels: Doubles
    """(R, K)"""

    def __post_init__(self) -> None:
        clusters = len(self.overlap)
        if self.overlap.shape != (clusters, clusters):
            raise InvalidInput(f"an overlap must be a square matrix; got shape {self.overlap.shape}")
        if not self.error_sums.shape == self.labels.shape == (len(self.models), clusters):
            raise InvalidInput(f"a history of {len(self.models)} models must have as many rows, of {clusters} clusters")
        arrays = (self.overlap, self.error_sums, self.labels)
        if not all(np.isfinite(array).all() and (array >= 0).all() for array in arrays):
            raise InvalidInput("the numbers of a history must be finite and 0 or more")


def history_of(assignment: Assignment, clusters: int, scores: Doubles, models: Sequence[str]) -> History:
    """What n prompts tell: (n, R) scores in [0, 1] of R models, NaN where unlabelled."""
    together = np.zeros((clusters, clusters))
    error_sums, labels = np.zeros((2, len(models), clusters))
    for start in range(0, len(assignment), _ROWS):
        rows = slice(start, start + _ROWS)
        weights = Assignment(assignment.ids[rows], assignment.weights[rows]).dense(clusters)
        labelled = ~np.isnan(scores[rows])
        together += weights.T @ weights
        labels += labelled.T.astype(np.float64) @ weights
        error_sums += np.where(labelled, 1.0 - scores[rows], 0.0).T @ weights
    mass = together.sum(axis=1)
    overlap = np.divide(together, np.sqrt(np.outer(mass, mass)), out=np.eye(clusters), where=np.outer(mass, mass) > 0)
    return History(overlap, tuple(models), error_sums, labels)
