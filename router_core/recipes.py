"""Three ways to turn a profile's sums into error rates. The sums themselves are profiles.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router_core.types import Doubles

SHRINKAGE = 0.5
"""Label weight of a model's own mean in each cluster: s of the shrunk recipe."""

ErrorRates = Callable[[Doubles, Doubles], Doubles]


def mean_error(total_error: float, total_labels: float) -> float:
    """ē = (Σe + ½)/(n + 1): one half where nothing was labelled."""
    return (total_error + 0.5) / (total_labels + 1.0)


def _shrunk(error_sums: Doubles, labels: Doubles) -> Doubles:
    prior = mean_error(float(error_sums.sum()), float(labels.sum()))
    return np.clip((error_sums + SHRINKAGE * prior) / (labels + SHRINKAGE), 0.0, 1.0)


def _raw(error_sums: Doubles, labels: Doubles) -> Doubles:
    rates = np.divide(error_sums, labels, out=np.full_like(labels, 0.5), where=labels > 0)
    return np.clip(rates, 0.0, 1.0)


def _laplace(error_sums: Doubles, labels: Doubles) -> Doubles:
    alpha = 1.0
    return np.clip((error_sums + alpha) / (labels + 2 * alpha), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How prompts count towards clusters when a profile is measured, and how its sums become error rates."""

    name: str
    hard: bool
    """Whole labels to the nearest cluster (the paper, section 5.1) instead of shares to the top p."""
    error_rates: ErrorRates
    """(K,) sums and (K,) label weights to (K,) rates."""


SHRUNK = Recipe("shrunk", hard=False, error_rates=_shrunk)
RAW = Recipe("raw", hard=True, error_rates=_raw)
LAPLACE = Recipe("laplace", hard=True, error_rates=_laplace)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in (SHRUNK, RAW, LAPLACE)})
