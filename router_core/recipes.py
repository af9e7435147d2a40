"""The ways to turn the sums of profiles into error rates. The sums themselves are profiles.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.clustering import ClusterMap
from router_core.history import LARGEST
from router_core.pooling import pooled_rates
from router_core.types import Doubles

SHRINKAGE = 0.5
"""Label weight of a model's own mean in each cluster: s of the shrunk recipe."""

Rates = Callable[[Doubles, Doubles, ClusterMap], Doubles]


def mean_error(total_error: float, total_labels: float) -> float:
    """ē = (Σe + ½)/(n + 1): one half where nothing was labelled."""
    return (total_error + 0.5) / (total_labels + 1.0)


def shrunk_rates(error_sums: Doubles, labels: Doubles) -> Doubles:
    """(M, K) each model's rates, shrunk towards its own mean."""
    means = (error_sums.sum(axis=1) + 0.5) / (labels.sum(axis=1) + 1.0)
    return np.asarray(np.clip((error_sums + SHRINKAGE * means[:, None]) / (labels + SHRINKAGE), 0.0, 1.0))


def _pooled(error_sums: Doubles, labels: Doubles, cluster_map: ClusterMap) -> Doubles:
    if cluster_map.size > LARGEST or not len(error_sums):
        return shrunk_rates(error_sums, labels)
    return pooled_rates(error_sums, labels, cluster_map)


def _shrunk(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    return shrunk_rates(error_sums, labels)


def _raw(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    rates = np.divide(error_sums, labels, out=np.full_like(labels, 0.5), where=labels > 0)
    return np.clip(rates, 0.0, 1.0)


def _laplace(error_sums: Doubles, labels: Doubles, _map: ClusterMap) -> Doubles:
    alpha = 1.0
    return np.clip((error_sums + alpha) / (labels + 2 * alpha), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How prompts count towards clusters when a profile is measured, and how sums become error rates."""

    name: str
    hard: bool
    """Whole labels to the nearest cluster (the paper, section 5.1) instead of shares to the top p."""
    rates: Rates
    """(M, K) error sums and (M, K) labels of M models on a map to (M, K) rates in [0, 1]."""


POOLED = Recipe("pooled", hard=False, rates=_pooled)
"""All models together; on a map of more than LARGEST clusters it is the shrunk recipe."""
SHRUNK = Recipe("shrunk", hard=False, rates=_shrunk)
RAW = Recipe("raw", hard=True, rates=_raw)
LAPLACE = Recipe("laplace", hard=True, rates=_laplace)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in (POOLED, SHRUNK, RAW, LAPLACE)})
