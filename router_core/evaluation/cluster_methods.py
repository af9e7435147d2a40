"""K-means as in the UniRoute paper (arXiv 2502.08773, section 5.1): hard clusters, raw or Laplace-smoothed error rates.

K is chosen on the known models, as in its appendix F.1; with none it is 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from router_core.clustering import ClusterMap, kmeans
from router_core.estimators import LAPLACE, RAW, Estimator
from router_core.evaluation.baselines import Tuned, means, sums
from router_core.evaluation.trials import History, LabelledSample, PromptEstimator
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from router_core.learned_clusters import fit_learned_map
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile, measure
from router_core.types import Assignment, Doubles, Floats, Indices, Price
from router_core.validation.validation_set import choose_prompts

SIZES = (4, 8, 16, 32, 64)

DEFAULT_SIZE = 16


def kmeans_raw(known: History) -> PromptEstimator:
    return _kmeans(known, RAW)


def kmeans_laplace(known: History) -> PromptEstimator:
    return _kmeans(known, LAPLACE)


def _kmeans(known: History, recipe: Estimator) -> PromptEstimator:
    def estimate(size: int, asked: LabelledSample, vectors: Floats) -> Doubles:
        cluster_map = hard_map(known, size)
        weights = cluster_map.assign(known.vectors[asked.rows]).dense(cluster_map.size)
        return cluster_map.assign(vectors).expected(recipe.rates(*sums(weights, asked), cluster_map))

    tuned = Tuned(known, SIZES, estimate, DEFAULT_SIZE)
    return lambda asked, vectors: estimate(tuned.choice(len(asked.rows)), asked, vectors)


@lru_cache(maxsize=2 * len(SIZES))
def hard_map(known: History, size: int) -> ClusterMap:
    """Hard clusters of the train prompts."""
    centroids = kmeans(known.vectors, clusters_within(known, size), seed=known.seed % 2**16)
    return ClusterMap(centroids, embedder_id=known.embedder_id, top=1)


def clusters_within(known: History, wanted: int) -> int:
    """So many clusters, or one for each distinct vector where those are fewer."""
    return min(wanted, len(np.unique(known.vectors, axis=0)))


COARSE, FINE = 20, 100

# Labels that the level above counts as.
STRENGTH = 24.0


def hiershrink(known: History) -> PromptEstimator:
    coarse, fine = hard_map(known, COARSE), hard_map(known, FINE)
    parents = coarse.assign(fine.centroids).ids[:, 0]

    def estimator(asked: LabelledSample, vectors: Floats) -> Doubles:
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


# Labels of the model's mean in each cluster; the paper has none, and does worse at few labels.
SMOOTHING = 0.5


def learned_map(known: History) -> PromptEstimator:
    if not known.models:
        return kmeans_raw(known)
    trained = fit_learned_map(known.vectors, known.scores, seed=known.seed % 2**16, clusters=DEFAULT_SIZE)
    weights = trained.weights(known.vectors).astype(np.float64)

    def estimator(asked: LabelledSample, vectors: Floats) -> Doubles:
        errors, labels = sums(weights[asked.rows], asked)
        rates = (errors + SMOOTHING * means(asked)[:, None]) / (labels + SMOOTHING)
        return np.clip(trained.weights(vectors).astype(np.float64) @ rates.T, 0.0, 1.0)

    return estimator


CLUSTERS = 64


class Deployment:
    """A map fitted on the train prompts and the known models; new models join it by what they were asked."""

    def __init__(self, known: History) -> None:
        self._seed = known.seed
        embedded = EmbeddedPrompts(known.texts, known.vectors, known.embedder_id)
        clusters = clusters_within(known, CLUSTERS)
        self.cluster_map: ClusterMap = fit_with_outcomes(
            embedded, known.scores, known.models, clusters, seed=known.seed % 2**16
        )
        self.assignment: Assignment = self.cluster_map.assign(known.vectors)

    def choose(self, count: int) -> Indices:
        """(count,) train prompts to ask a new model, as `uniroute models add` chooses them."""
        return choose_prompts(self.assignment, count, families=[""] * len(self.assignment), seed=self._seed)

    def pool(self, asked: LabelledSample, prices: Sequence[Price]) -> Pool:
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
