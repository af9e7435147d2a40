"""Methods that estimate errors per cluster: k-means, hierarchical shrinkage, the learned map, and the product."""

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


def kmeans_raw(history: History) -> PromptEstimator:
    """UniRoute's k-means (arXiv 2502.08773, section 5.1): hard clusters and the mean error in each.

    K is chosen on the known models, as in its appendix F.1; with none it is DEFAULT_SIZE.
    """
    return _kmeans(history, RAW)


def kmeans_laplace(history: History) -> PromptEstimator:
    """The same with rates smoothed by Laplace's rule of succession."""
    return _kmeans(history, LAPLACE)


def _kmeans(history: History, estimator: Estimator) -> PromptEstimator:
    def estimate(size: int, sample: LabelledSample, vectors: Floats) -> Doubles:
        cluster_map = hard_map(history, size)
        weights = cluster_map.assign(history.vectors[sample.rows]).dense(cluster_map.size)
        return cluster_map.assign(vectors).expected(estimator.rates(*sums(weights, sample), cluster_map))

    tuned = Tuned(history, SIZES, estimate, DEFAULT_SIZE)
    return lambda sample, vectors: estimate(tuned.choice(len(sample.rows)), sample, vectors)


@lru_cache(maxsize=2 * len(SIZES))
def hard_map(history: History, size: int) -> ClusterMap:
    """Cluster the train prompts, each wholly in its nearest."""
    centroids = kmeans(history.vectors, clusters_within(history, size), seed=history.seed % 2**16)
    return ClusterMap(centroids, embedder_id=history.embedder_id, top=1)


def clusters_within(history: History, wanted: int) -> int:
    """Return `wanted`, or the number of distinct vectors if it is smaller."""
    return min(wanted, len(np.unique(history.vectors, axis=0)))


# Clusters of the two levels of `hiershrink`.
COARSE, FINE = 20, 100

# Labels that the rate of the level above counts as.
STRENGTH = 24.0


def hiershrink(history: History) -> PromptEstimator:
    """Shrink the rates of fine clusters towards their coarse one, and these towards the model's mean."""
    coarse, fine = hard_map(history, COARSE), hard_map(history, FINE)
    parents = coarse.assign(fine.centroids).ids[:, 0]

    def estimator(sample: LabelledSample, vectors: Floats) -> Doubles:
        weights = fine.assign(history.vectors[sample.rows]).dense(fine.size)
        errors, labels = sums(weights, sample)
        return fine.assign(vectors).expected(nested_rates(errors, labels, parents, means(sample)))

    return estimator


def nested_rates(errors: Doubles, labels: Doubles, parents: Indices, overall: Doubles) -> Doubles:
    """Return (M, fine) rates from (M, fine) sums and labels.

    Args:
        parents: (fine,) the coarse cluster of each fine one.
        overall: (M,) mean errors.
    """
    member = np.eye(int(parents.max()) + 1)[parents]
    coarse = _shrink(errors @ member, labels @ member, overall[:, None])
    return _shrink(errors, labels, coarse[:, parents])


def _shrink(errors: Doubles, labels: Doubles, towards: Doubles) -> Doubles:
    return np.asarray((errors + STRENGTH * towards) / (labels + STRENGTH))


# Labels that the model's mean counts as in each cluster. The paper has none, and does worse with few labels.
SMOOTHING = 0.5


def learned_map(history: History) -> PromptEstimator:
    """UniRoute's learned map (arXiv 2502.08773, section 5.2), trained on the known models; without any, k-means."""
    if not history.models:
        return kmeans_raw(history)
    trained = fit_learned_map(history.vectors, history.scores, seed=history.seed % 2**16, clusters=DEFAULT_SIZE)
    weights = trained.weights(history.vectors).astype(np.float64)

    def estimator(sample: LabelledSample, vectors: Floats) -> Doubles:
        errors, labels = sums(weights[sample.rows], sample)
        rates = (errors + SMOOTHING * means(sample)[:, None]) / (labels + SMOOTHING)
        return np.clip(trained.weights(vectors).astype(np.float64) @ rates.T, 0.0, 1.0)

    return estimator


CLUSTERS = 64


class Deployment:
    """The product: a map fitted on the train prompts and known models, which new models join with a few labels."""

    def __init__(self, history: History) -> None:
        self._seed = history.seed
        embedded = EmbeddedPrompts(history.texts, history.vectors, history.embedder_id)
        clusters = clusters_within(history, CLUSTERS)
        self.cluster_map: ClusterMap = fit_with_outcomes(
            embedded, history.scores, history.models, clusters, seed=history.seed % 2**16
        )
        self.assignment: Assignment = self.cluster_map.assign(embedded.vectors, embedded.surface)

    def choose(self, count: int) -> Indices:
        """Choose (count,) train prompts to ask a new model, as `uniroute models add` does."""
        return choose_prompts(self.assignment, count, families=[""] * len(self.assignment), seed=self._seed)

    def pool(self, sample: LabelledSample, prices: Sequence[Price]) -> Pool:
        """Lay out the new models, in their order, with the profiles that `sample` gives them."""
        assignment = Assignment(self.assignment.ids[sample.rows], self.assignment.weights[sample.rows])
        candidates = [
            Candidate(f"{number:06}", self._profile(assignment, scores, tokens), price)
            for number, (scores, tokens, price) in enumerate(
                zip(sample.scores.T, sample.output_tokens.T, prices, strict=True)
            )
        ]
        return Pool.build(candidates, self.cluster_map)

    def _profile(self, assignment: Assignment, scores: Doubles, tokens: Doubles) -> Profile:
        unknown = np.full(len(scores), np.nan)
        return measure(
            self.cluster_map.id, self.cluster_map.size, assignment, scores, output_tokens=tokens, seconds=unknown
        )
