"""Which validation prompts to ask when not all can be: a fair sample of the whole set. No text, no embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_core.types import Assignment, Indices

GOLDEN = (5**0.5 - 1) / 2


def choose_prompts(assignment: Assignment, count: int, *, families: Sequence[str], seed: int = 0) -> Indices:
    """(min(count, n),) row numbers, in the order to ask them.

    The prompts are lined up by family, within a family by cluster, and within a cluster by lot; then every so-manyth is
    asked. So each cluster of a family gets its share of the family's questions, and which of its prompts are asked is
    left to chance: those at the centre of a cluster are not like the others. The steps are golden sections, so that any
    number of questions is spread evenly and the first n of a bigger choice are the smaller one.

    A family's share goes with the root of its size: how many prompts of a kind a set has says little of how many there
    will be in traffic, and the small kinds are to be measured too.
    """
    if len(families) != len(assignment):
        raise ValueError(f"{len(assignment)} prompts but {len(families)} families")
    rng = np.random.default_rng(seed)
    family_of = np.unique(np.asarray(families, dtype=str), return_inverse=True)[1].reshape(-1)
    lined_up = np.lexsort((rng.random(len(families)), assignment.ids[:, 0], family_of))
    crowd = np.bincount(family_of)[family_of[lined_up]]
    turns = (np.arange(len(families)) * GOLDEN + rng.random()) % 1.0 * np.sqrt(crowd)
    return np.asarray(lined_up[np.argsort(turns, kind="stable")][:count])
