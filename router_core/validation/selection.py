"""Which validation prompts to ask when not all can be: every kind, every cluster, and by lot. No text, no embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_core.types import Assignment, Doubles, Indices

DRAWN = 3
"""Prompts that a question is picked from. A whole family would leave no cluster thin, and give its oddest prompts."""
FIRST = 0.5
"""Label weight that a cluster counts as having beforehand."""


def choose_prompts(assignment: Assignment, count: int, *, families: Sequence[str], seed: int = 0) -> Indices:
    """(min(count, n),) row numbers, in the order to ask them. The first n of a bigger choice are the smaller one.

    Each question goes to the family that is furthest behind its share, and is, of a few of its prompts drawn by lot,
    the one that adds most to Σ_k log(½ + W_k), W_k being the label weight of cluster k so far. By lot, because prompts
    at the centre of a cluster are not like the others.

    A family's share goes with the root of its size: how many prompts of a kind a set has says little of how many there
    will be in traffic, and the small kinds are to be measured too.
    """
    if len(families) != len(assignment):
        raise ValueError(f"{len(assignment)} prompts but {len(families)} families")
    rng = np.random.default_rng(seed)
    weights = assignment.dense(int(assignment.ids.max(initial=-1)) + 1)
    left = _rows_by_family(families)
    shares = np.sqrt([len(rows) for rows in left])
    asked = rng.random(len(left))  # who begins is drawn, too
    covered = np.full(weights.shape[1], FIRST)
    chosen = np.empty(min(count, len(families)), dtype=np.int64)
    for place in range(chosen.size):
        family = int(np.argmin(np.where([bool(rows) for rows in left], asked / shares, np.inf)))
        drawn = rng.permutation(left[family])[:DRAWN]
        row = int(drawn[_widest(weights[drawn], covered)])
        left[family].remove(row)
        chosen[place] = row
        asked[family] += 1
        covered += weights[row]
    return chosen


def _rows_by_family(families: Sequence[str]) -> list[list[int]]:
    family_of = np.asarray(families, dtype=str)
    return [np.flatnonzero(family_of == family).tolist() for family in np.unique(family_of)]


def _widest(weights: Doubles, covered: Doubles) -> int:
    """Which of the (d, K) rows adds most to the (K,) label weights so far."""
    return int(np.argmax(np.log1p(weights / covered).sum(axis=1)))
