from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from router_core.pool import Pool
from router_core.types import CAPABILITY_NAMES, Doubles, Indices, Requirements


class LazyNames(Sequence[str]):
    """A tuple of names that is not there yet. It equals that tuple."""

    @cached_property
    def whole(self) -> tuple[str, ...]:
        return self._made()

    @abstractmethod
    def _made(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _one(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self.whole[place] if isinstance(place, slice) else self._one(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __eq__(self, other: object) -> bool:
        return self.whole == tuple(other) if isinstance(other, tuple | LazyNames) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.whole)

    def __repr__(self) -> str:
        return repr(self.whole)


class RowNames(LazyNames):
    """Those of `rows`, in their order."""

    def __init__(self, names: tuple[str, ...], rows: Indices) -> None:
        self._names = names
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _one(self, place: int) -> str:
        return self._names[int(self._rows[place])]

    def _made(self) -> tuple[str, ...]:
        return tuple(map(self._names.__getitem__, self._rows.tolist()))


class LazyRanking(LazyNames):
    """The first is known; the others are put in order when one of them is wanted."""

    def __init__(self, first: str, length: int, ordered: Callable[[], tuple[str, ...]]) -> None:
        self._first = first
        self._length = length
        self._ordered = ordered

    def __len__(self) -> int:
        return self._length

    def _one(self, place: int) -> str:
        return self._first if place == 0 else self.whole[place]

    def __iter__(self) -> Iterator[str]:
        yield self._first
        if self._length > 1:
            yield from self.whole[1:]

    def _made(self) -> tuple[str, ...]:
        return self._ordered()


Mask = NDArray[np.bool_]

RESTING = "resting after failures"

LOADING = "what it takes to call this model is still being loaded"

Excluded = Sequence[tuple[Collection[str], str]]
"""Models that may not be asked now, and why."""

_ROUNDING = 1 + 1e-9
"""A cap stated per million tokens and a price stated per token may differ in their last bit and be the same."""

TEMPLATE_TOKENS = 256
"""What a model's chat template may add to a prompt."""


class FilterStage(IntEnum):
    """Of the first stage that a model fails it is told every reason, and none of the later ones."""

    LISTED = 0
    STANDING = 1
    NEEDS = 2
    """What the request asks, and is known not to fit."""
    UNKNOWN = 3
    """What nobody knows of this model, while another is known to be able."""
    COST = 4


@dataclass(frozen=True, eq=False, slots=True)
class Filter:
    stage: FilterStage
    passed: Mask
    """(M,)"""
    reason: str
    """What the others are told."""


@dataclass(frozen=True, eq=False)
class Eligibility:
    """The rows of a pool that are left. Why the others are not is worked out only when somebody asks."""

    pool: Pool
    rows: NDArray[np.int64]
    checked: Callable[[], Sequence[Filter]] = field(repr=False)
    """Every check that was made, or need not be made because all pass it."""

    @property
    def names(self) -> Sequence[str]:
        return self.pool.names if len(self.rows) == len(self.pool) else RowNames(self.pool.names, self.rows)

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Ruled-out model → its reasons, separated by commas. Those that were nearest to be left come first."""
        failed: dict[int, tuple[FilterStage, list[str]]] = {}
        for check in sorted(self.checked(), key=lambda check: check.stage):
            for row in np.flatnonzero(~check.passed).tolist():
                stage, reasons = failed.setdefault(row, (check.stage, []))
                if stage == check.stage:
                    reasons.append(check.reason)
        rows = sorted(failed, key=lambda row: (-failed[row][0], row))
        return {self.pool.names[row]: ", ".join(failed[row][1]) for row in rows}

    def filtered(self, passed: Mask, reason: str) -> Eligibility:
        """What is left after the costs are known, (M,) of who passed."""
        checked = self.checked
        rows = self.rows[passed[self.rows]]
        return Eligibility(self.pool, rows, lambda: (*checked(), Filter(FilterStage.COST, passed, reason)))


def eligible(
    pool: Pool,
    needs: Requirements,
    allowed: Collection[str] | None = None,
    *,
    require_profile: bool = True,
    cooling_down: Collection[str] = (),
    not_ready: Collection[str] = (),
) -> Eligibility:
    """Rule models out before any is scored.

    First go those that are known not to fit. Then, need by need, those of unknown ability, as long as one of the models
    left is known to be able: so nothing is left only where every model is known not to fit.

    Args:
        pool: the snapshot's models.
        needs: what this request asks for.
        allowed: names that this request or its key is restricted to; None is no restriction.
        require_profile: whether a model needs a profile; one without can be called, but not compared.
        cooling_down: names that failed too often lately to be asked now.
        not_ready: names that this process cannot call yet.
    """
    absent = [(names, why) for names, why in ((cooling_down, RESTING), (not_ready, LOADING)) if names]
    if allowed is None and require_profile and not absent and _all_can(pool, needs):
        return Eligibility(pool, pool.routable_rows, lambda: _checks(pool, needs, None, (), require_profile=True)[1])
    left, checks = _checks(pool, needs, allowed, absent, require_profile=require_profile)
    return Eligibility(pool, np.flatnonzero(left), lambda: checks)


def output_limit(pool: Pool, row: int, needs: Requirements) -> int | None:
    """Tokens of an answer that the request allows this model, as it is told; None: the request states no limit.

    A limit that is a cap is lowered to what the model can do.
    """
    limit = needs.max_output_tokens
    if limit is None or not needs.limit_is_cap:
        return limit
    window, output = pool.least
    if limit <= output and needs.prompt_tokens + limit <= window:
        return limit
    rows = slice(row, row + 1)
    return int(min(_left_of_window(pool, needs, limit, rows)[0], pool.max_output_tokens[row]))


def _left_of_window(pool: Pool, needs: Requirements, limit: int, rows: slice = slice(None)) -> NDArray[np.int64]:
    """(M,) tokens that the prompt leaves for an answer, `limit` at most, where the two share a window.

    Where the limit does not fit, the prompt may be twice as long as estimated: the model would refuse a limit that is a
    token too large. But half of what is left is for the answer.
    """
    room = pool.max_input_tokens[rows] - needs.prompt_tokens
    margin = np.minimum(np.maximum(room, 0) // 2, needs.prompt_tokens + TEMPLATE_TOKENS)
    return np.where(~pool.shares_window[rows] | (room >= limit), limit, room - margin)


def _all_can(pool: Pool, needs: Requirements) -> bool:
    """Whether every model is known to take what is asked: then only what holds for every request rules any out."""
    window, output = pool.least
    limit = needs.max_output_tokens or 0
    if needs.limit_is_cap:
        output = limit
        limit = limit if pool.any_shares_window else 0
    return (
        needs.prompt_tokens + limit <= window
        and limit <= output
        and needs.max_input_cost_per_token is None
        and needs.max_output_cost_per_token is None
        and not needs.capabilities
    )


def _checks(
    pool: Pool, needs: Requirements, allowed: Collection[str] | None, absent: Excluded, *, require_profile: bool
) -> tuple[Mask, Sequence[Filter]]:
    """(M,) who passed all, and each check."""
    left = np.ones(len(pool), dtype=np.bool_)
    checks = []
    for check in (*_standing(pool, allowed, absent, require_profile=require_profile), *_known(pool, needs)):
        left &= check.passed
        checks.append(check)
    for ability in needs.capabilities:
        able = pool.capabilities[ability] == 1
        if (left & able).any():
            left &= able
            checks.append(Filter(FilterStage.UNKNOWN, able, f"not known to {CAPABILITY_NAMES[ability]}"))
    return left, checks


def _standing(
    pool: Pool, allowed: Collection[str] | None, absent: Excluded, *, require_profile: bool
) -> Iterator[Filter]:
    """What holds for every request of this caller now."""
    if allowed is not None:
        yield Filter(FilterStage.LISTED, _listed(pool, allowed), "not among the models that this request may use")
    for names, why in absent:
        yield Filter(FilterStage.STANDING, ~_listed(pool, names), why)
    if require_profile:
        yield Filter(FilterStage.STANDING, ~np.isnan(pool.mean_errors), "not profiled on this cluster map")
    yield Filter(FilterStage.STANDING, ~np.isnan(pool.prices.input), "no price is known; state one, or free: true")


def _known(pool: Pool, needs: Requirements) -> Iterator[Filter]:
    """What this request asks, against what is known of each model. What is not known passes."""
    yield Filter(FilterStage.NEEDS, pool.max_input_tokens >= needs.prompt_tokens, _too_long(needs.prompt_tokens))
    limit = needs.max_output_tokens
    if limit is not None and needs.limit_is_cap:
        usual = np.minimum(np.minimum(pool.mean_output_tokens, pool.max_output_tokens), limit)
        fits = (pool.max_input_tokens < needs.prompt_tokens) | (_left_of_window(pool, needs, limit) >= usual)
        yield Filter(FilterStage.NEEDS, fits, f"{_too_long(needs.prompt_tokens)} and an answer")
    elif limit is not None:
        yield Filter(FilterStage.NEEDS, pool.max_output_tokens >= limit, f"cannot answer with {limit} tokens")
        # written so that nothing is added to NO_LIMIT, and a prompt that is too long by itself is told so once
        room = pool.max_input_tokens - needs.prompt_tokens
        fits = ~pool.shares_window | (room < 0) | (room >= limit)
        yield Filter(FilterStage.NEEDS, fits, f"{_too_long(needs.prompt_tokens)} and {limit} of an answer")
    prices = pool.prices.at(needs.prompt_tokens)
    yield from _within(prices.input, needs.max_input_cost_per_token, "input")
    yield from _within(prices.output, needs.max_output_cost_per_token, "output")
    for ability in needs.capabilities:
        yield Filter(FilterStage.NEEDS, pool.capabilities[ability] != 0, f"cannot {CAPABILITY_NAMES[ability]}")


def _within(prices: Doubles, cap: float | None, side: str) -> Iterator[Filter]:
    if cap is not None:
        reason = f"{side} price above {cap * 1e6:g} USD per million tokens"
        yield Filter(FilterStage.NEEDS, ~(prices > cap * _ROUNDING), reason)


def _too_long(prompt_tokens: int) -> str:
    return f"context window below about {prompt_tokens} prompt tokens"


def _listed(pool: Pool, names: Collection[str]) -> Mask:
    mask = np.zeros(len(pool), dtype=np.bool_)
    mask[[pool.index[name] for name in names if name in pool.index]] = True
    return mask
