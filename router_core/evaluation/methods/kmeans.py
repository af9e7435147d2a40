"""K-means as in the UniRoute paper (arXiv 2502.08773, section 5.1): hard clusters, raw or Laplace-smoothed error rates.

K is chosen on the known models, as in its appendix F.1; with none it is 16.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from router_core.clustering import ClusterMap
from router_core.evaluation.methods.tuning import Tuned, sums
from router_core.evaluation.seen import Asked, Estimator, Known
from router_core.kmeans import kmeans
from router_core.recipes import LAPLACE, RAW, Recipe
from router_core.types import Doubles, Floats

SIZES = (4, 8, 16, 32, 64)
DEFAULT_SIZE = 16


def kmeans_raw(known: Known) -> Estimator:
    return _kmeans(known, RAW)


def kmeans_laplace(known: Known) -> Estimator:
    return _kmeans(known, LAPLACE)


def _kmeans(known: Known, recipe: Recipe) -> Estimator:
    def estimate(size: int, asked: Asked, vectors: Floats) -> Doubles:
        cluster_map = hard_map(known, size)
        weights = cluster_map.assign(known.vectors[asked.rows]).dense(cluster_map.size)
        return cluster_map.assign(vectors).expected(recipe.rates(*sums(weights, asked), cluster_map))

    tuned = Tuned(known, SIZES, estimate, DEFAULT_SIZE)
    return lambda asked, vectors: estimate(tuned.choice(len(asked.rows)), asked, vectors)


@lru_cache(maxsize=2 * len(SIZES))
def hard_map(known: Known, size: int) -> ClusterMap:
    """Hard clusters of the train prompts."""
    centroids = kmeans(known.vectors, clusters_within(known, size), seed=known.seed % 2**16)
    return ClusterMap(centroids, embedder_id=known.embedder_id, top=1)


def clusters_within(known: Known, wanted: int) -> int:
    """So many clusters, or one for each distinct vector where those are fewer."""
    return min(wanted, len(np.unique(known.vectors, axis=0)))
