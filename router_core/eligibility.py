from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import attrgetter
from typing import overload
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from router_core.pool import Pool
from router_core.types import CAPABILITY_NAMES, Doubles, Indices, Requirements

Mask = NDArray[np.bool_]

COOLING_DOWN = "resting after failures"

NOT_READY = "what it takes to call this model is still being loaded"

BEYOND_EFFORT = "thinks more than the effort that the request states"

# Pairs of the models that may not be called now, and the reason.
Excluded = Sequence[tuple[Collection[str], str]]

# A limit stated per million tokens and a price stated per token may differ in their last bit and mean the same.
_ROUNDING = 1 + 1e-9

# Tokens that a model's chat template may add to a prompt.
TEMPLATE_TOKENS = 256


class LazyNames(Sequence[str]):
    """A tuple of names that is built when it is first read. It equals that tuple."""

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        return self._build()

    @abstractmethod
    def _build(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _name_at(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self.all_names[place] if isinstance(place, slice) else self._name_at(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_names)

    def __contains__(self, name: object) -> bool:
        return name in self.all_names

    def __eq__(self, other: object) -> bool:
        return self.all_names == tuple(other) if isinstance(other, tuple | LazyNames) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.all_names)

    def __repr__(self) -> str:
        return repr(self.all_names)


class RowNames(LazyNames):
    """The names at `rows`, in the order of the rows."""

    def __init__(self, names: tuple[str, ...], rows: Indices) -> None:
        self._names = names
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _name_at(self, place: int) -> str:
        return self._names[int(self._rows[place])]

    def _build(self) -> tuple[str, ...]:
        return tuple(map(self._names.__getitem__, self._rows.tolist()))


class LazyRanking(LazyNames):
    """A ranking whose first name is known; the others are sorted when one of them is read."""

    def __init__(self, first: str, length: int, sort: Callable[[], tuple[str, ...]]) -> None:
        self._first = first
        self._length = length
        self._sort = sort

    def __len__(self) -> int:
        return self._length

    def _name_at(self, place: int) -> str:
        return self._first if place == 0 else self.all_names[place]

    def __iter__(self) -> Iterator[str]:
        yield self._first
        if self._length > 1:
            yield from self.all_names[1:]

    def _build(self) -> tuple[str, ...]:
        return self._sort()


class FilterStage(IntEnum):
    """The order of the filters.

    A model's reasons are all those of the first stage that it fails, and none of later stages.
    """

    ALLOWED = 0
    # The model's state: excluded, cooling down, not ready, not profiled, not priced.
    STATE = 1
    # The request asks for what the model is known to lack.
    REQUIREMENTS = 2
    # The request asks for what is not known of this model and is known of another one.
    UNKNOWN = 3
    COST = 4


@dataclass(frozen=True, eq=False, slots=True)
class Filter:
    stage: FilterStage
    passed: Mask
    """(M,)"""
    reason: str
    """Shown for the models that did not pass."""


class Eligibility:
    """The rows of a pool that are left. Why the others are not is computed when it is first read."""

    def __init__(self, pool: Pool, rows: NDArray[np.int64], compute_filters: Callable[[], Sequence[Filter]]) -> None:
        """
        Args:
            compute_filters: returns every filter, also those that were skipped because all models pass them.
        """
        self.pool = pool
        self.rows = rows
        self.compute_filters = compute_filters

    @property
    def names(self) -> Sequence[str]:
        return self.pool.names if len(self.rows) == len(self.pool) else RowNames(self.pool.names, self.rows)

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Ruled-out model → its reasons, separated by commas. Models that passed the most stages come first."""
        failed: dict[int, tuple[FilterStage, list[str]]] = {}
        for each in sorted(self.compute_filters(), key=lambda each: each.stage):
            for row in np.flatnonzero(~each.passed).tolist():
                stage, reasons = failed.setdefault(row, (each.stage, []))
                if stage == each.stage:
                    reasons.append(each.reason)
        rows = sorted(failed, key=lambda row: (-failed[row][0], row))
        return {self.pool.names[row]: ", ".join(failed[row][1]) for row in rows}

    def why_ruled_out(self, limit: int) -> Mapping[str, str]:
        """Return what `reasons` does of the first `limit` models, in order of name, without those not allowed.

        It is cheap enough to be kept of every request.
        """
        if len(self.rows) == len(self.pool):
            return {}
        if self.rows is self.pool.routable_rows:
            return _unroutable(self, limit)
        return self._why_ruled_out(limit)

    def _why_ruled_out(self, limit: int) -> dict[str, str]:
        filters = sorted(self.compute_filters(), key=lambda each: each.stage)
        shown = np.ones(len(self.pool), dtype=np.bool_)
        shown[self.rows] = False
        for each in filters:
            if each.stage == FilterStage.ALLOWED:
                shown &= each.passed
        rows = np.flatnonzero(shown)[:limit]
        if not rows.size:
            return {}
        why: dict[str, str] = {}
        passed = np.array([each.passed[rows] for each in filters])
        for place, row in enumerate(rows.tolist()):
            failed = [filters[number] for number in np.flatnonzero(~passed[:, place]).tolist()]
            why[self.pool.names[row]] = ", ".join(each.reason for each in failed if each.stage == failed[0].stage)
        return why

    def filtered(self, passed: Mask, reason: str) -> Eligibility:
        """Apply one more filter, once the costs are known. `passed`: (M,)."""
        earlier = self.compute_filters
        rows = self.rows[passed[self.rows]]
        return Eligibility(self.pool, rows, lambda: (*earlier(), Filter(FilterStage.COST, passed, reason)))


# A request that every model fits rules out the same ones as the request before.
_UNROUTABLE: WeakKeyDictionary[Pool, dict[int, Mapping[str, str]]] = WeakKeyDictionary()


def _unroutable(eligibility: Eligibility, limit: int) -> Mapping[str, str]:
    """Return why models of this pool can be asked by no request, worked out once per pool."""
    known = _UNROUTABLE.setdefault(eligibility.pool, {})
    if limit not in known:
        known[limit] = eligibility._why_ruled_out(limit)
    return known[limit]


def eligible(
    pool: Pool,
    requirements: Requirements,
    allowed: Collection[str] | None = None,
    *,
    require_profile: bool = True,
    cooling_down: Collection[str] = (),
    not_ready: Collection[str] = (),
    beyond_effort: Collection[str] = (),
) -> Eligibility:
    """Rule models out before any is scored.

    Models that are known not to fit go first. Then, capability by capability, go those of which it is not known, as
    long as one of the models left is known to have it. So nothing is left only if every model is known not to fit.

    Args:
        allowed: the only names that this request or its key may use; None is no restriction.
        require_profile: whether a model needs a profile. One without can be called, but not compared.
        cooling_down: names that failed too often lately to be called now.
        not_ready: names that this process cannot call yet.
        beyond_effort: names of efforts above what the request allows.
    """
    all_may_be_called = not (cooling_down or not_ready or beyond_effort)
    if allowed is None and require_profile and all_may_be_called and _all_fit(pool, requirements):
        return Eligibility(
            pool, pool.routable_rows, lambda: _apply_filters(pool, requirements, None, (), require_profile=True)[1]
        )
    left_out = ((cooling_down, COOLING_DOWN), (not_ready, NOT_READY), (beyond_effort, BEYOND_EFFORT))
    excluded = [(names, reason) for names, reason in left_out if names]
    passed, filters = _apply_filters(pool, requirements, allowed, excluded, require_profile=require_profile)
    return Eligibility(pool, np.flatnonzero(passed), lambda: filters)


def output_limit(pool: Pool, row: int, requirements: Requirements) -> int | None:
    """Return the output limit to send to the model in `row`; None if the request states none.

    A limit that is only a cap is lowered to what the model can do.
    """
    limit = requirements.max_output_tokens
    if limit is None or not requirements.limit_is_cap:
        return limit
    window, output = pool.smallest_limits
    if limit <= output and requirements.prompt_tokens + limit <= window:
        return limit
    rows = slice(row, row + 1)
    return int(min(_room_for_output(pool, requirements, limit, rows)[0], pool.max_output_tokens[row]))


def _room_for_output(pool: Pool, requirements: Requirements, limit: int, rows: slice = slice(None)) -> Indices:
    """Return the (M,) tokens, at most `limit`, that the prompt leaves for an answer where the two share a window.

    Where `limit` does not fit, a margin is kept in case the prompt is up to twice as long as estimated: a model refuses
    a limit that is one token too large. At least half of what is left goes to the answer.
    """
    room = pool.max_input_tokens[rows] - requirements.prompt_tokens
    margin = np.minimum(np.maximum(room, 0) // 2, requirements.prompt_tokens + TEMPLATE_TOKENS)
    return np.where(~pool.shares_window[rows] | (room >= limit), limit, room - margin)


# The same as `Requirements.capabilities`, in one call.
_asked_capabilities = attrgetter(*CAPABILITY_NAMES)


def _all_fit(pool: Pool, requirements: Requirements) -> bool:
    """Return whether no model can fail a filter of FilterStage.REQUIREMENTS or UNKNOWN."""
    window, output = pool.smallest_limits
    limit = requirements.max_output_tokens or 0
    if requirements.limit_is_cap:
        output = limit
        limit = limit if pool.any_shares_window else 0
    return (
        requirements.prompt_tokens + limit <= window
        and limit <= output
        and requirements.max_input_cost_per_token is None
        and requirements.max_output_cost_per_token is None
        and True not in _asked_capabilities(requirements)
    )


def _apply_filters(
    pool: Pool,
    requirements: Requirements,
    allowed: Collection[str] | None,
    excluded: Excluded,
    *,
    require_profile: bool,
) -> tuple[Mask, Sequence[Filter]]:
    """Return (M,) which models passed all filters, and the filters."""
    passed = np.ones(len(pool), dtype=np.bool_)
    filters = []
    state_filters = _state_filters(pool, allowed, excluded, require_profile=require_profile)
    for each in (*state_filters, *_requirement_filters(pool, requirements)):
        passed &= each.passed
        filters.append(each)
    for name in requirements.capabilities:
        known = pool.capabilities[name] == 1
        if (passed & known).any():
            passed &= known
            filters.append(Filter(FilterStage.UNKNOWN, known, f"not known to {CAPABILITY_NAMES[name]}"))
    return passed, filters


def _state_filters(
    pool: Pool, allowed: Collection[str] | None, excluded: Excluded, *, require_profile: bool
) -> Iterator[Filter]:
    """Yield the filters that do not depend on what the request asks for."""
    if allowed is not None:
        reason = "not among the models that this request may use"
        yield Filter(FilterStage.ALLOWED, _is_named(pool, allowed), reason)
    for name, reason in pool.excluded.items():
        yield Filter(FilterStage.STATE, ~_is_named(pool, (name,)), reason)
    for names, reason in excluded:
        yield Filter(FilterStage.STATE, ~_is_named(pool, names), reason)
    if require_profile:
        yield Filter(FilterStage.STATE, ~np.isnan(pool.mean_errors), "not profiled on this cluster map")
    yield Filter(FilterStage.STATE, ~np.isnan(pool.prices.input), "no price is known; state one, or free: true")


def _requirement_filters(pool: Pool, requirements: Requirements) -> Iterator[Filter]:
    """Yield the filters for what the request asks. What is not known of a model passes."""
    stage, prompt_tokens = FilterStage.REQUIREMENTS, requirements.prompt_tokens
    too_long = f"context window below about {prompt_tokens} prompt tokens"
    yield Filter(stage, pool.max_input_tokens >= prompt_tokens, too_long)
    limit = requirements.max_output_tokens
    if limit is not None and requirements.limit_is_cap:
        usual = np.minimum(np.minimum(pool.mean_output_tokens, pool.max_output_tokens), limit)
        fits = (pool.max_input_tokens < prompt_tokens) | (_room_for_output(pool, requirements, limit) >= usual)
        yield Filter(stage, fits, f"{too_long} and an answer")
    elif limit is not None:
        yield Filter(stage, pool.max_output_tokens >= limit, f"cannot answer with {limit} tokens")
        # Written so that nothing is added to NO_LIMIT, and a prompt that is too long by itself gets one reason only.
        room = pool.max_input_tokens - prompt_tokens
        fits = ~pool.shares_window | (room < 0) | (room >= limit)
        yield Filter(stage, fits, f"{too_long} and {limit} of an answer")
    prices = pool.prices.at(prompt_tokens)
    yield from _price_filter(prices.input, requirements.max_input_cost_per_token, "input")
    yield from _price_filter(prices.output, requirements.max_output_cost_per_token, "output")
    for name in requirements.capabilities:
        yield Filter(stage, pool.capabilities[name] != 0, f"cannot {CAPABILITY_NAMES[name]}")


def _price_filter(prices: Doubles, limit: float | None, side: str) -> Iterator[Filter]:
    if limit is not None:
        reason = f"{side} price above {limit * 1e6:g} USD per million tokens"
        yield Filter(FilterStage.REQUIREMENTS, ~(prices > limit * _ROUNDING), reason)


def _is_named(pool: Pool, names: Collection[str]) -> Mask:
    """Return (M,) whether each model is among `names`; names that the pool does not have are ignored."""
    mask = np.zeros(len(pool), dtype=np.bool_)
    mask[[pool.index[name] for name in names if name in pool.index]] = True
    return mask
