"""What is served: the product's map, profiles and pool, with the known models as its history. No rule of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_core.clustering import ClusterMap
from router_core.evaluation.methods.kmeans import clusters_within
from router_core.evaluation.seen import Asked, Known
from router_core.fitting import EmbeddedPrompts, fit_with_history
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile, measure
from router_core.types import Assignment, Doubles, Indices, Price
from router_core.validation.selection import choose_prompts

CLUSTERS = 64


class Deployment:
    """A map fitted on the train prompts and the known models; new models join it by what they were asked."""

    def __init__(self, known: Known) -> None:
        self._seed = known.seed
        embedded = EmbeddedPrompts(known.texts, known.vectors, known.embedder_id)
        clusters = clusters_within(known, CLUSTERS)
        self.cluster_map: ClusterMap = fit_with_history(
            embedded, known.scores, known.models, clusters, seed=known.seed % 2**16
        )
        self.assignment: Assignment = self.cluster_map.assign(known.vectors)

    def choose(self, count: int) -> Indices:
        """(count,) train prompts to ask a new model, as `uniroute models add` chooses them."""
        return choose_prompts(self.assignment, count, families=[""] * len(self.assignment), seed=self._seed)

    def pool(self, asked: Asked, prices: Sequence[Price]) -> Pool:
        """The new models, in their order, with the profiles that they would get."""
        placed = Assignment(self.assignment.ids[asked.rows], self.assignment.weights[asked.rows])
        candidates = [
            Candidate(f"{number:06}", self._profile(placed, scores, tokens), price)
            for number, (scores, tokens, price) in enumerate(
                zip(asked.scores.T, asked.output_tokens.T, prices, strict=True)
            )
        ]
        return Pool.build(candidates, self.cluster_map)

    def _profile(self, placed: Assignment, scores: Doubles, tokens: Doubles) -> Profile:
        unknown = np.full(len(scores), np.nan)
        return measure(
            self.cluster_map.id, self.cluster_map.size, placed, scores, output_tokens=tokens, seconds=unknown
        )
