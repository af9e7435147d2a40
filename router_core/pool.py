from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_core import kernels
from router_core.clustering import ClusterMap
from router_core.errors import MapMismatch
from router_core.estimators import POOLED, SHRINKAGE, Efforts, Estimator, part_tools
from router_core.kernels import ScoringKernel
from router_core.pricing import PriceColumns
from router_core.profiles import Profile
from router_core.types import CAPABILITY_NAMES, UNKNOWN_CAPABILITIES, Assignment, Capabilities, Doubles, Price

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

    def rates(self, profiles: Sequence[Profile | None], efforts: Efforts = ()) -> Doubles:
        """Return (M, K) rates in [0, 1], read-only, with a NaN row where there is no profile.

        A profile with `stated_rates` is served with these.

        Args:
            efforts: the rows of each model that is asked at several efforts, ascending.
        """
        rates = np.full((len(profiles), self._map.size), np.nan)
        measured = [row for row, profile in enumerate(profiles) if profile and profile.stated_rates is None]
        if measured:
            place = {row: number for number, row in enumerate(measured)}
            among = tuple(tuple(place[row] for row in rows if row in place) for rows in efforts)
            together = tuple(rows for rows in among if len(rows) > 1)
            rates[measured] = self._estimate([profiles[row] for row in measured], together)
        for row, profile in enumerate(profiles):
            if profile and profile.stated_rates is not None:
                rates[row] = profile.stated_rates
        return rates

    def _estimate(self, profiles: Sequence[Profile | None], efforts: Efforts) -> Doubles:
        sums = np.array([profile.error_sums for profile in profiles if profile])
        labels = np.array([profile.labels for profile in profiles if profile])
        digest = hashlib.blake2b(sums.tobytes() + labels.tobytes() + repr(efforts).encode()).digest()
        if self._last is None or self._last[0] != digest:
            self._last = digest, self._estimator.rates(sums, labels, self._map, efforts)
        return self._last[1]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model as routing sees it. Without a profile or a price it is listed and never chosen."""

    name: str
    profile: Profile | None
    price: Price | None
    capabilities: Capabilities = UNKNOWN_CAPABILITIES
    excluded: str | None = None
    """Why it is left out of every choice for now. None: it is not."""
    effort: tuple[str, int] | None = None
    """The model of which it is an effort, and its place among that model's efforts, ascending. None: it is none."""


class RoutingPlan:
    """The columns of a pool as requests read them, laid out once for all requests of a snapshot.

    A last cluster stands for the mean over the others: a prompt whose clusters are not known is wholly in it.
    """

    def __init__(
        self,
        errors: tuple[Doubles, Doubles],
        output_tokens: tuple[Doubles, Doubles],
        seconds: tuple[Doubles, Doubles],
        output_caps: Doubles,
        prices: PriceColumns,
        tool_excess: Doubles,
    ) -> None:
        """
        Args:
            errors, output_tokens, seconds: (M, K), and their (M,) means; errors are NaN without a profile.
            output_caps: (M,)
            tool_excess: (M,) errors that tools add.
        """
        clusters = errors[0].shape[1]
        self.anywhere = Assignment(np.array([[clusters]], dtype=np.int64), np.ones((1, 1), dtype=np.float32))
        self._make_scorer = kernels.current().scorer
        self._prices = prices
        self._output_caps = output_caps
        self._profiled = ~np.isnan(errors[1])
        # Not copied: with a thousand clusters and models each takes megabytes.
        self._errors, self._others = errors, (output_tokens, seconds)
        self._tool_excess = tool_excess
        self._usual = self._make(prices, self._columns(weighs_seconds=False, with_tools=False))
        self._scorers: dict[tuple[PriceColumns, bool, bool], ScoringKernel] = {}

    def scorer(self, prompt_tokens: int, *, weighs_seconds: bool, with_tools: bool) -> ScoringKernel:
        """Return what scores prompts of this length. `with_tools`: the model is to read or to make tool calls."""
        with_tools = with_tools and self._tools_matter
        if not (self._prices.tiers or weighs_seconds or with_tools):
            return self._usual
        key = self._prices.at(prompt_tokens), weighs_seconds, with_tools
        if key not in self._scorers:
            self._scorers[key] = self._make(key[0], self._columns(weighs_seconds=weighs_seconds, with_tools=with_tools))
        return self._scorers[key]

    @cached_property
    def _tools_matter(self) -> bool:
        return bool(self._tool_excess.any())

    def _make(self, prices: PriceColumns, by_cluster: Doubles) -> ScoringKernel:
        return self._make_scorer(
            by_cluster,
            self._output_caps,
            input_price=prices.input,
            output_price=prices.output,
            cached_price=prices.cached,
            profiled=self._profiled,
        )

    def _columns(self, *, weighs_seconds: bool, with_tools: bool) -> Doubles:
        """Return (K + 1, 2M) errors and tokens, or (K + 1, 3M) with seconds too."""
        errors, means = self._errors
        if with_tools:
            errors = np.clip(errors + self._tool_excess[:, None], 0.0, 1.0)
            means = np.clip(means + self._tool_excess, 0.0, 1.0)
        return _by_cluster((errors, means), *(self._others if weighs_seconds else self._others[:1]))


def _by_cluster(*blocks: tuple[Doubles, Doubles]) -> Doubles:
    """Lay out blocks of (M, K) values and (M,) means side by side, a row for each cluster and one for the mean."""
    models, clusters = blocks[0][0].shape
    made = np.empty((clusters + 1, len(blocks) * models))
    for place, (values, means) in enumerate(blocks):
        columns = slice(place * models, (place + 1) * models)
        made[:clusters, columns], made[clusters, columns] = values.T, means
    return made


@dataclass(frozen=True, eq=False)
class Pool:
    """M candidates laid out as arrays, sorted by name, so that the first of equals is the first by name.

    Build it with `Pool.build`.
    """

    names: tuple[str, ...]
    candidates: Mapping[str, Candidate]
    index: Mapping[str, int]
    errors: Doubles
    """(M, K) error rates without tools; NaN without a profile."""
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
    tool_excess: Doubles
    """(M,) how many more errors each model makes where it is offered tools; 0 without a profile."""
    prices: PriceColumns
    capabilities: Mapping[str, NDArray[np.int8]]
    """Name of a capability → (M,) of 1, 0 or UNKNOWN."""
    max_input_tokens: NDArray[np.int64]
    max_output_tokens: NDArray[np.int64]
    shares_window: NDArray[np.bool_]
    """(M,) whether prompt and answer must fit `max_input_tokens` together."""
    excluded: Mapping[str, str]
    """Model that is left out of every choice for now → why."""
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
        rates = (error_rates or CachedEstimator(cluster_map)).rates(profiles, _efforts(ordered))
        due_to_tools, mean_due_to_tools, tool_excess = _part_tools(profiles, rates)
        tokens = _fill_unmeasured([p.output_tokens() if p else blank for p in profiles], DEFAULT_OUTPUT_TOKENS, blank)
        pool = cls(
            names=names,
            candidates=MappingProxyType({candidate.name: candidate for candidate in ordered}),
            index=MappingProxyType({name: row for row, name in enumerate(names)}),
            errors=np.clip(rates - due_to_tools, 0.0, 1.0),
            mean_errors=np.array([p.mean_error if p else np.nan for p in profiles]) - mean_due_to_tools,
            label_weights=_matrix([p.labels + SHRINKAGE if p else blank for p in profiles], cluster_map.size),
            total_labels=np.array([p.total_labels if p else np.nan for p in profiles]),
            output_tokens=tokens,
            seconds=_fill_unmeasured([p.seconds() if p else blank for p in profiles], 0.0, blank),
            tool_excess=tool_excess,
            prices=PriceColumns.from_prices([candidate.price for candidate in ordered]),
            capabilities=_capability_columns([candidate.capabilities for candidate in ordered]),
            max_input_tokens=_limits([candidate.capabilities.max_input_tokens for candidate in ordered]),
            max_output_tokens=_limits([candidate.capabilities.max_output_tokens for candidate in ordered]),
            shares_window=np.array([candidate.capabilities.shares_window for candidate in ordered], dtype=np.bool_),
            excluded=MappingProxyType({each.name: each.excluded for each in ordered if each.excluded is not None}),
            cluster_names=cluster_map.names,
            novel_below=cluster_map.novel_below,
        )
        _ = pool.plan  # now, and not on the first request
        return pool

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def profiled(self) -> NDArray[np.bool_]:
        """(M,) whether each model has a profile."""
        return ~np.isnan(self.mean_errors)

    @cached_property
    def routable_rows(self) -> NDArray[np.int64]:
        """Rows of the models that are profiled, priced and not excluded."""
        rows = np.flatnonzero(self.profiled & ~np.isnan(self.prices.input))
        return np.array([row for row in rows.tolist() if self.names[row] not in self.excluded], dtype=np.int64)

    def best_on_average(self, allowed: tuple[str, ...] | None = None) -> str | None:
        """Return the routable model with the lowest mean error, of those that are allowed (None: all), or None."""
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
    def mean_output_tokens(self) -> Doubles:
        """(M,) mean over the clusters."""
        return np.asarray(self.output_tokens.mean(axis=1))

    @cached_property
    def plan(self) -> RoutingPlan:
        """The columns as requests read them."""
        return RoutingPlan(
            (self.errors, self.mean_errors),
            (self.output_tokens, self.mean_output_tokens),
            (self.seconds, self.seconds.mean(axis=1)),
            self.max_output_tokens.astype(np.float64),
            self.prices,
            self.tool_excess,
        )

    @cached_property
    def any_shares_window(self) -> bool:
        return bool(self.shares_window.any())

    @cached_property
    def smallest_limits(self) -> tuple[int, int]:
        """The input and the output limit that every model can take; (0, 0) for an empty pool."""
        if not self.names:
            return 0, 0
        return int(self.max_input_tokens.min()), int(self.max_output_tokens.min())


def _efforts(candidates: Sequence[Candidate]) -> Efforts:
    """Return the rows of the efforts of each model that has any, ascending."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for row, candidate in enumerate(candidates):
        if candidate.effort is not None:
            model, place = candidate.effort
            rows.setdefault(model, []).append((place, row))
    return tuple(tuple(row for _, row in sorted(places)) for places in rows.values())


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


def _part_tools(profiles: Sequence[Profile | None], rates: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Return (M, K) what of the rates is due to tools, (M,) the mean of it over the labels, and (M,) what tools add.

    All are 0 for models without a profile.
    """
    due, mean, excess = np.zeros_like(rates), np.zeros(len(profiles)), np.zeros(len(profiles))
    measured = [p for p in profiles if p is not None]
    if any(p.tool_labels is not None for p in measured):
        zeros = np.zeros(rates.shape[1])
        known = np.array([p is not None for p in profiles])
        labels = np.array([p.labels for p in measured])
        due[known], excess[known] = part_tools(
            rates[known],
            labels,
            np.array([zeros if p.tool_error_sums is None else p.tool_error_sums for p in measured]),
            np.array([zeros if p.tool_labels is None else p.tool_labels for p in measured]),
        )
        mean[known] = (labels * due[known]).sum(axis=1) / (labels.sum(axis=1) + 1.0)
    return due, mean, excess


def _limits(values: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array([NO_LIMIT if value is None else value for value in values], dtype=np.int64)


def _capability_columns(models: Sequence[Capabilities]) -> Mapping[str, NDArray[np.int8]]:
    def column(name: str) -> NDArray[np.int8]:
        values = [getattr(model, name) for model in models]
        return np.array([UNKNOWN if value is None else int(value) for value in values], dtype=np.int8)

    return MappingProxyType({name: column(name) for name in CAPABILITY_NAMES})
