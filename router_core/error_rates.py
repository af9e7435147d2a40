"""Ψ of all models of one map under one recipe, computed anew only when a profile's sums have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from router_core.clustering import ClusterMap
from router_core.profiles import Profile
from router_core.recipes import POOLED, Recipe
from router_core.types import Doubles


class ErrorRates:
    """Under the pooled recipe a model's rates depend on the others': so they are asked for together."""

    def __init__(self, cluster_map: ClusterMap, recipe: Recipe = POOLED) -> None:
        self._map = cluster_map
        self._recipe = recipe
        self._last: tuple[bytes, Doubles] | None = None

    def of(self, profiles: Sequence[Profile | None]) -> Doubles:
        """(M, K) in [0, 1], read-only; NaN rows without a profile. Rates that a profile states are served as stated."""
        rates = np.full((len(profiles), self._map.size), np.nan)
        measured = [row for row, profile in enumerate(profiles) if profile and profile.stated is None]
        if measured:
            rates[measured] = self._computed([profiles[row] for row in measured])
        for row, profile in enumerate(profiles):
            if profile and profile.stated is not None:
                rates[row] = profile.stated
        return rates

    def _computed(self, profiles: Sequence[Profile | None]) -> Doubles:
        sums = np.array([profile.error_sums for profile in profiles if profile])
        labels = np.array([profile.labels for profile in profiles if profile])
        digest = hashlib.blake2b(sums.tobytes() + labels.tobytes()).digest()
        if self._last is None or self._last[0] != digest:
            self._last = digest, self._recipe.rates(sums, labels, self._map)
        return self._last[1]
