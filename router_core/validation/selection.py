"""Which validation prompts to ask when not all can be: spread over clusters and families. No text, no embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_core.types import Assignment, Doubles, Indices

_FAMILY_WEIGHT = 0.25
"""How much a family's first prompts count beside a cluster's first label weight."""


def choose_prompts(
    assignment: Assignment, clusters: int, count: int, *, families: Sequence[str], seed: int = 0
) -> Indices:
    """(min(count, n),) row numbers, in the order to ask them.

    Greedy: the next prompt is the one that adds most to Σ_k log(½ + W_k) + ¼ Σ_f log(½ + n_f), with W_k the label
    weight of cluster k so far and n_f the prompts of family f so far. The order does not depend on `count`: the first
    n of a bigger choice are the smaller choice. `seed` settles ties only.
    """
    if len(families) != len(assignment):
        raise ValueError(f"{len(assignment)} prompts but {len(families)} families")
    weights = assignment.dense(clusters)
    family_of = np.unique(np.asarray(families, dtype=str), return_inverse=True)[1].reshape(-1)
    tie_break = np.random.default_rng(seed).random(len(weights)) * 1e-9
    return _greedy(weights, family_of, tie_break, min(count, len(weights)))


def _greedy(weights: Doubles, family_of: Indices, tie_break: Doubles, count: int) -> Indices:
    chosen = np.empty(count, dtype=np.int64)
    left = np.ones(len(weights), dtype=bool)
    covered = np.full(weights.shape[1], 0.5)
    asked = np.full(int(family_of.max(initial=-1)) + 1, 0.5)
    for position in range(count):
        by_cluster = np.log1p(weights / covered).sum(axis=1)
        by_family = np.log1p(1 / asked)[family_of]
        gain = np.where(left, by_cluster + _FAMILY_WEIGHT * by_family + tie_break, -np.inf)
        best = int(np.argmax(gain))
        chosen[position] = best
        left[best] = False
        covered += weights[best]
        asked[family_of[best]] += 1
    return chosen
