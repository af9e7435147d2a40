"""Which models may answer a request at all: measured, priced, healthy, allowed, able. Scores are scoring.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_core.pool import UNKNOWN, Pool
from router_core.types import Needs

Mask = NDArray[np.bool_]

ABILITIES: Mapping[str, str] = MappingProxyType(
    {"tools": "call tools", "vision": "read images", "audio": "hear audio", "json_schema": "keep to a JSON schema"}
)
"""need → what a model that lacks it cannot do."""


@dataclass(frozen=True, eq=False)
class Eligibility:
    """The rows of a pool that are left. Why the others are not is worked out only when somebody asks."""

    pool: Pool
    rows: NDArray[np.int64]
    checks: tuple[tuple[Mask, str], ...] = field(repr=False)
    """(M,) of who passed, and what the others are told; the first failed check counts."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.pool.names[row] for row in self.rows)

    @cached_property
    def why(self) -> dict[str, str]:
        """Ruled-out model → one sentence."""
        reasons: dict[str, str] = {}
        for passed, reason in self.checks:
            for row in np.flatnonzero(~passed):
                reasons.setdefault(self.pool.names[row], reason)
        return reasons

    def narrowed(self, passed: Mask, reason: str) -> Eligibility:
        """What is left after one more check, (M,) of who passed."""
        return Eligibility(self.pool, self.rows[passed[self.rows]], (*self.checks, (passed, reason)))


def eligible(pool: Pool, needs: Needs, allowed: Collection[str] | None = None, *, measured: bool = True) -> Eligibility:
    """Rule models out before any is scored.

    Args:
        pool: the snapshot's models.
        needs: what this request asks for.
        allowed: names that this request or its key is restricted to; None is no restriction.
        measured: whether a model needs a profile; one without can be called, but not compared.
    """
    left = np.ones(len(pool), dtype=np.bool_)
    checks = []
    for passed, reason in _fixed_checks(pool, needs, allowed, measured=measured):
        left &= passed
        checks.append((passed, reason))
    for need, ability in ABILITIES.items():
        if getattr(needs, need):
            passed = _able(pool.able[need], left)
            left &= passed
            checks.append((passed, f"not known to {ability}"))
    return Eligibility(pool=pool, rows=np.flatnonzero(left), checks=tuple(checks))


def _fixed_checks(
    pool: Pool, needs: Needs, allowed: Collection[str] | None, *, measured: bool
) -> Iterator[tuple[Mask, str]]:
    if allowed is not None:
        yield _listed(pool, allowed), "not among the models that this request may use"
    yield pool.healthy, "unhealthy"
    if measured:
        yield ~np.isnan(pool.mean_errors), "not profiled on this cluster map"
    yield ~np.isnan(pool.prices.input), "no price is known; state one, or free: true"
    yield (
        pool.max_input_tokens >= needs.prompt_tokens,
        f"context window below about {needs.prompt_tokens} prompt tokens",
    )
    if needs.max_output_tokens is not None:
        reason = f"cannot answer with {needs.max_output_tokens} tokens"
        yield pool.max_output_tokens >= needs.max_output_tokens, reason


def _listed(pool: Pool, allowed: Collection[str]) -> Mask:
    mask = np.zeros(len(pool), dtype=np.bool_)
    mask[[pool.index[name] for name in allowed if name in pool.index]] = True
    return mask


def _able(column: NDArray[np.int8], left: Mask) -> Mask:
    """Known ability first: a model of unknown ability passes only where none of those left is known to be able."""
    able = column == 1
    return able if (able & left).any() else np.equal(column, UNKNOWN)
