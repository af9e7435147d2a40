"""Curves of routers that do not look at the prompt: one model for all, or one by lot."""

from __future__ import annotations

import numpy as np

from router_core.evaluation.curves import Curve
from router_core.types import Doubles, Indices


def cheapest(expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Always the model expected to be cheapest. All arguments are (M,) means; `costs` and `qualities` are the truth."""
    row = int(np.argmin(expected_cents))
    return Curve(costs[[row]], qualities[[row]])


def best_single(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Always the model expected to be best; below its cost always the cheapest, with nothing in between."""
    best, cheap = int(np.argmin(expected_errors)), int(np.argmin(expected_cents))
    return Curve(costs[[best, best, cheap]], qualities[[best, cheap, cheap]])


def random_mix(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Lots drawn between the models on the hull of expected cost and quality (ZeroRouter in the paper)."""
    order = hull(expected_cents, 1.0 - expected_errors)
    return Curve(costs[order], qualities[order])


def hull(costs: Doubles, qualities: Doubles) -> Indices:
    """Rows of the upper left hull of (M,) points, dear to cheap: every other one has a mixture that is better."""
    kept: list[int] = []
    for row in np.lexsort((-qualities, costs)):
        if kept and qualities[row] <= qualities[kept[-1]]:
            continue
        while len(kept) > 1 and not _above(kept[-2], kept[-1], int(row), costs, qualities):
            kept.pop()
        kept.append(int(row))
    return np.array(kept[::-1], dtype=np.int64)


def _above(left: int, middle: int, right: int, costs: Doubles, qualities: Doubles) -> bool:
    """Whether the middle one of three rows lies above the line through the other two."""
    span, rise = costs[right] - costs[left], qualities[right] - qualities[left]
    return bool((qualities[middle] - qualities[left]) * span > rise * (costs[middle] - costs[left]))
