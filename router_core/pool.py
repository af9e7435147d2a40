from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_core.clustering import ClusterMap
from router_core.errors import MapMismatch
from router_core.estimators import POOLED, SHRINKAGE, Estimator
from router_core.pricing import PriceColumns
from router_core.profiles import Profile
from router_core.types import CAPABILITY_NAMES, UNKNOWN_CAPABILITIES, Capabilities, Doubles, Price

# Output tokens expected of every model as long as no answer of any model was measured.
DEFAULT_OUTPUT_TOKENS = 256.0

# Value of a capability column for "not known", beside 0 (lacks it) and 1 (has it).
UNKNOWN = -1

NO_LIMIT = np.iinfo(np.int64).max


class CachedEstimator:
    """Compute the error rates of all models together, and keep the last result.

    The pooled estimator derives a model's rates from the labels of all others too, so rates cannot be kept per model.
    """

    def __init__(self, cluster_map: ClusterMap, estimator: Estimator = POOLED) -> None:
        self._map = cluster_map
        self._estimator = estimator
        self._last: tuple[bytes, Doubles] | None = None

    def rates(self, profiles: Sequence[Profile | None]) -> Doubles:
        """Return (M, K) rates in [0, 1], read-only, with a NaN row where there is no profile.

        A profile with `stated_rates` is served with these.
        """
        rates = np.full((len(profiles), self._map.size), np.nan)
        measured = [row for row, profile in enumerate(profiles) if profile and profile.stated_rates is None]
        if measured:
            rates[measured] = self._estimate([profiles[row] for row in measured])
        for row, profile in enumerate(profiles):
            if profile and profile.stated_rates is not None:
                rates[row] = profile.stated_rates
        return rates

    def _estimate(self, profiles: Sequence[Profile | None]) -> Doubles:
        sums = np.array([profile.error_sums for profile in profiles if profile])
        labels = np.array([profile.labels for profile in profiles if profile])
        digest = hashlib.blake2b(sums.tobytes() + labels.tobytes()).digest()
        if self._last is None or self._last[0] != digest:
            self._last = digest, self._estimator.rates(sums, labels, self._map)
        return self._last[1]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model as routing sees it. Without a profile or a price it is listed and never chosen."""

    name: str
    profile: Profile | None
    price: Price | None
    capabilities: Capabilities = UNKNOWN_CAPABILITIES


@dataclass(frozen=True, eq=False)
class Pool:
    """M candidates laid out as arrays, sorted by name, so that the first of equals is the first by name.

    Build it with `Pool.build`.
    """

    names: tuple[str, ...]
    candidates: Mapping[str, Candidate]
    index: Mapping[str, int]
    errors: Doubles
    """(M, K) error rates; NaN without a profile."""
    mean_errors: Doubles
    """(M,)"""
    label_weights: Doubles
    """(M, K) labels behind each rate, the shrinkage included."""
    total_labels: Doubles
    """(M,)"""
    output_tokens: Doubles
    """(M, K); a model without measured answers takes the mean of the others."""
    seconds: Doubles
    """(M, K)"""
    errors_and_tokens: Doubles
    """(K, 2M) error rates, then output tokens, by cluster: one gather reads both for a prompt."""
    prices: PriceColumns
    capabilities: Mapping[str, NDArray[np.int8]]
    """Name of a capability → (M,) of 1, 0 or UNKNOWN."""
    max_input_tokens: NDArray[np.int64]
    max_output_tokens: NDArray[np.int64]
    shares_window: NDArray[np.bool_]
    """(M,) whether prompt and answer must fit `max_input_tokens` together."""
    cluster_names: tuple[str, ...] = ()
    novel_below: float | None = None
    """The cosine with the nearest centroid below which a prompt is novel; None: it is not known."""

    @classmethod
    def build(
        cls, candidates: Sequence[Candidate], cluster_map: ClusterMap, error_rates: CachedEstimator | None = None
    ) -> Pool:
        """Lay out `candidates`.

        Args:
            error_rates: an estimator over `cluster_map`; the pooled one unless given.

        Raises:
            MapMismatch: a profile was measured on another map than `cluster_map`.
        """
        ordered = sorted(candidates, key=lambda candidate: candidate.name)
        for candidate in ordered:
            _check_map(candidate, cluster_map)
        profiles = [candidate.profile for candidate in ordered]
        blank = np.full(cluster_map.size, np.nan)
        names = tuple(candidate.name for candidate in ordered)
        errors = (error_rates or CachedEstimator(cluster_map)).rates(profiles)
        tokens = _fill_unmeasured([p.output_tokens() if p else blank for p in profiles], DEFAULT_OUTPUT_TOKENS, blank)
        return cls(
            names=names,
            candidates=MappingProxyType({candidate.name: candidate for candidate in ordered}),
            index=MappingProxyType({name: row for row, name in enumerate(names)}),
            errors=errors,
            mean_errors=np.array([p.mean_error if p else np.nan for p in profiles]),
            label_weights=_matrix([p.labels + SHRINKAGE if p else blank for p in profiles], cluster_map.size),
            total_labels=np.array([p.total_labels if p else np.nan for p in profiles]),
            output_tokens=tokens,
            errors_and_tokens=np.ascontiguousarray(np.concatenate((errors, tokens)).T),
            seconds=_fill_unmeasured([p.seconds() if p else blank for p in profiles], 0.0, blank),
            prices=PriceColumns.from_prices([candidate.price for candidate in ordered]),
            capabilities=_capability_columns([candidate.capabilities for candidate in ordered]),
            max_input_tokens=_limits([candidate.capabilities.max_input_tokens for candidate in ordered]),
            max_output_tokens=_limits([candidate.capabilities.max_output_tokens for candidate in ordered]),
            shares_window=np.array([candidate.capabilities.shares_window for candidate in ordered], dtype=np.bool_),
            cluster_names=cluster_map.names,
            novel_below=cluster_map.novel_below,
        )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def profiled(self) -> NDArray[np.bool_]:
        """(M,) whether each model has a profile."""
        return ~np.isnan(self.mean_errors)

    @cached_property
    def all_profiled(self) -> bool:
        return bool(self.profiled.all())

    @cached_property
    def routable_rows(self) -> NDArray[np.int64]:
        """Rows of the models that are profiled and priced."""
        return np.flatnonzero(self.profiled & ~np.isnan(self.prices.input))

    def best_on_average(self, allowed: tuple[str, ...] | None = None) -> str | None:
        """Return the priced model with the lowest mean error, of those that are allowed (None: all); None: no model."""
        if allowed not in self._best:
            rows = self.routable_rows.tolist()
            usable = [row for row in rows if allowed is None or self.names[row] in allowed]
            best = min(usable, key=lambda row: (self.mean_errors[row], row), default=None)
            self._best[allowed] = None if best is None else self.names[best]
        return self._best[allowed]

    @cached_property
    def _best(self) -> dict[tuple[str, ...] | None, str | None]:
        return {}

    @cached_property
    def output_caps(self) -> Doubles:
        """(M,) `max_output_tokens` as float64."""
        return self.max_output_tokens.astype(np.float64)

    @cached_property
    def mean_output_tokens(self) -> Doubles:
        """(M,) mean over the clusters."""
        return np.asarray(self.output_tokens.mean(axis=1))

    @cached_property
    def any_shares_window(self) -> bool:
        return bool(self.shares_window.any())

    @cached_property
    def smallest_limits(self) -> tuple[int, int]:
        """The input and the output limit that every model can take; (0, 0) for an empty pool."""
        if not self.names:
            return 0, 0
        return int(self.max_input_tokens.min()), int(self.max_output_tokens.min())


def _check_map(candidate: Candidate, cluster_map: ClusterMap) -> None:
    profile = candidate.profile
    if profile is None:
        return
    if profile.map_id != cluster_map.id:
        raise MapMismatch(
            f"the profile of {candidate.name} was measured on map {profile.map_id}, but {cluster_map.id} is in use; "
            "profile the model again"
        )
    if profile.labels.size != cluster_map.size:
        raise MapMismatch(
            f"the profile of {candidate.name} has {profile.labels.size} clusters, the map {cluster_map.size}"
        )


def _matrix(rows: Sequence[Doubles], clusters: int) -> Doubles:
    return np.array(rows, dtype=np.float64).reshape(len(rows), clusters)


def _fill_unmeasured(rows: Sequence[Doubles], default: float, blank: Doubles) -> Doubles:
    """Replace NaN rows by the mean of the measured ones, or by `default` where nothing was measured."""
    matrix = _matrix(rows, blank.size)
    measured = ~np.isnan(matrix).any(axis=1)
    matrix[~measured] = matrix[measured].mean(axis=0) if measured.any() else default
    return matrix


def _limits(values: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array([NO_LIMIT if value is None else value for value in values], dtype=np.int64)


def _capability_columns(models: Sequence[Capabilities]) -> Mapping[str, NDArray[np.int8]]:
    def column(name: str) -> NDArray[np.int8]:
        values = [getattr(model, name) for model in models]
        return np.array([UNKNOWN if value is None else int(value) for value in values], dtype=np.int8)

    return MappingProxyType({name: column(name) for name in CAPABILITY_NAMES})
