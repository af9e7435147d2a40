"""UniRoute's learned map (arXiv 2502.08773, section 5.2): a softmax over clusters. Training is map_training.py.

Φ(x) = softmax(x·W + b). Where the embedding's own clusters hold prompts of one subject together, these hold prompts
together on which models that are known are wrong alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.errors import InvalidInput
from router_core.types import Assignment, Doubles, Floats

TOP = 8
"""Of 32 clusters, the eight heaviest hold all but a thousandth of most prompts."""


@dataclass(frozen=True, eq=False)
class LearnedMap:
    slope: Floats
    """(d, K)"""
    offset: Floats
    """(K,)"""
    top: int = TOP
    """How many clusters share a prompt when it is assigned; the others' small weights are left out."""

    def __post_init__(self) -> None:
        if self.slope.ndim != 2 or self.offset.shape != self.slope.shape[1:]:
            raise InvalidInput("a learned map needs a (d, K) slope and a (K,) offset")
        if not 1 <= self.top <= self.size:
            raise InvalidInput(f"top must be from 1 to {self.size}; got {self.top}")

    @property
    def size(self) -> int:
        return int(self.offset.size)

    @property
    def dimension(self) -> int:
        return len(self.slope)

    def weights(self, vectors: Floats) -> Floats:
        """(n, K) of all clusters, rows sum to one."""
        logits = vectors @ self.slope + self.offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def assign(self, vectors: Floats) -> Assignment:
        """The heaviest clusters of each row of `vectors`, (n, d)."""
        weights = self.weights(vectors)
        ids = np.argsort(-weights, axis=1, kind="stable")[:, : self.top]
        heaviest = np.take_along_axis(weights, ids, axis=1)
        return Assignment(ids.astype(np.int64), heaviest / heaviest.sum(axis=1, keepdims=True))

    def likeness(self) -> Doubles:
        """(K, K): training makes its clusters as different as it can, so no two are alike beforehand."""
        return np.eye(self.size)
