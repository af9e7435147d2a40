from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap, assign_prompts
from router_core.decision import RoutingDecision, ScoreDetails, Scores
from router_core.embedding import static_embedder
from router_core.errors import InvalidInput, InvalidProfile, MapMismatch, NoEligibleModel
from router_core.estimators import POOLED, SHRINKAGE, Estimator
from router_core.kernels import argmin_with_ties
from router_core.pool import CachedEstimator
from router_core.profiles import Profile
from router_core.scoring import TIE_TOLERANCE
from router_core.types import Assignment, Doubles, Embedder

DEFAULT_CACHE = Path.home() / ".cache" / "uniroute"

# A measured profile, or K error rates in [0, 1].
Rates: TypeAlias = Profile | ArrayLike


class Router:
    """Route texts without a server: `chosen, score, scores = router.route("What is 17 times 23?")`.

    Profiles and costs are plain mappings that may be replaced at any time.
    """

    def __init__(
        self,
        *,
        model_profile: Mapping[str, Rates] | None = None,
        cost_by_model: Mapping[str, float] | None = None,
        cluster_map: ClusterMap | None = None,
        embedder: Embedder | None = None,
        estimator: Estimator = POOLED,
        tie: float = TIE_TOLERANCE,
    ) -> None:
        """
        Args:
            model_profile: model → Ψ(m). The attribute of this name may be assigned to at any time.
            cost_by_model: model → cost of one request, in any unit; λ is in its inverse. May be assigned to, too.
            cluster_map: the built-in map unless given.
            embedder: the static embedder unless given; its table is distilled into the user's cache on first use.
            estimator: how measured profiles become rates.
            tie: scores this close to the best count as equal; the cheapest of them is chosen.

        Raises:
            MapMismatch: the map was fitted on another embedder's vectors.
        """
        self.cluster_map = cluster_map or builtin_map()
        self.embedder = embedder or static_embedder(DEFAULT_CACHE)
        if self.embedder.id != self.cluster_map.embedder_id:
            raise MapMismatch(f"the map was fitted with {self.cluster_map.embedder_id}, not with {self.embedder.id}")
        self.model_profile: Mapping[str, Rates] = model_profile or {}
        self.cost_by_model: Mapping[str, float] = cost_by_model or {}
        self._error_rates = CachedEstimator(self.cluster_map, estimator)
        self._tie = tie

    def route(
        self, text: str, candidate_models: Collection[str] | None = None, lambda_: float = 0.4
    ) -> RoutingDecision:
        """Choose the model with the smallest Φ(x)·Ψ(m) + λ·cost(m) for `text`.

        Args:
            candidate_models: the models to choose from; all that have a profile unless given.
            lambda_: λ, in errors per unit of cost.

        Raises:
            NoEligibleModel: there is nothing to choose from.
            InvalidInput: a candidate has no profile or no cost, or λ is negative or not finite.
            MapMismatch: a profile was measured on another map.
        """
        if not (np.isfinite(lambda_) and lambda_ >= 0):
            raise InvalidInput(f"lambda_ must be a finite number, 0 or more; got {lambda_!r}")
        names = tuple(sorted(set(self.model_profile if candidate_models is None else candidate_models)))
        if not names:
            raise NoEligibleModel("there is no model to choose from; assign model_profile", {})
        assignment = assign_prompts([text], self.embedder, self.cluster_map)
        errors, labels = self._expected(names, assignment)
        costs = np.array([self._cost(name) for name in names])
        scores = errors + lambda_ * costs
        unknown = np.full(len(names), np.nan)
        details = ScoreDetails(labels, unknown, unknown, errors, np.zeros(len(names)))
        return RoutingDecision(
            Scores(names, (errors, costs, scores, unknown), lambda: details),
            argmin_with_ties(scores, costs, self._tie),
            lambda_=lambda_,
            tie=self._tie,
            assignment=assignment,
            cluster_names=self.cluster_map.names,
        )

    def _expected(self, names: tuple[str, ...], assignment: Assignment) -> tuple[Doubles, Doubles]:
        """Return the (m,) expected errors for one prompt, and the labels that each is worth."""
        ids, weights = assignment.ids[0], assignment.weights[0].astype(np.float64)
        errors = self._rates(names)[:, ids] @ weights
        labels = np.array([1.0 / (weights**2 / (self._labels(name)[ids] + SHRINKAGE)).sum() for name in names])
        return errors, labels

    def _rates(self, names: tuple[str, ...]) -> Doubles:
        """Return the (M, K) rates of `names`, estimated from all profiles of this map, candidates or not."""
        stated = {name: profile for name in names if not isinstance(profile := self._profile(name), Profile)}
        measured = {
            name: profile
            for name, profile in sorted(self.model_profile.items())
            if isinstance(profile, Profile) and profile.map_id == self.cluster_map.id
        }
        rates = dict(zip(measured, self._error_rates.rates(list(measured.values())), strict=True))
        return np.array([self._checked(name, stated[name]) if name in stated else rates[name] for name in names])

    def _checked(self, name: str, stated: ArrayLike) -> Doubles:
        rates = np.asarray(stated, dtype=np.float64)
        if rates.shape != (self.cluster_map.size,) or not ((rates >= 0) & (rates <= 1)).all():
            raise InvalidProfile(f"the profile of {name} must be {self.cluster_map.size} error rates in [0, 1]")
        return rates

    def _labels(self, name: str) -> Doubles:
        profile = self._profile(name)
        return profile.labels if isinstance(profile, Profile) else np.zeros(self.cluster_map.size)

    def _profile(self, name: str) -> Rates:
        if name not in self.model_profile:
            raise InvalidInput(f"{name} has no profile; assign model_profile[{name!r}]")
        profile = self.model_profile[name]
        if isinstance(profile, Profile) and profile.map_id != self.cluster_map.id:
            raise MapMismatch(f"the profile of {name} was measured on map {profile.map_id}, not {self.cluster_map.id}")
        return profile

    def _cost(self, name: str) -> float:
        cost = self.cost_by_model.get(name)
        if cost is None or not np.isfinite(cost) or cost < 0:
            raise InvalidInput(f"the cost of {name} must be a finite number, 0 or more; got {cost!r}")
        return float(cost)
