"""Which of several lines error + λ·cost is chosen, and at which λ each would be. Knows no models and no prompts."""

from __future__ import annotations

import numpy as np

from router_core.types import Doubles, Indices

NUDGE = 1e-9
"""Relative step into an open interval, well above rounding and well below any λ that people write."""
DEAREST_LAMBDA = 1e12
"""Nobody asks for more, and beyond costs that are next to nothing would decide, or overflow."""


def choose(scores: Doubles, costs: Doubles, tie: float) -> int:
    """Row of the cheapest among those within `tie` of the best score; the first of equally cheap ones."""
    return int(np.where(scores <= scores.min() + tie, costs, np.inf).argmin())


def choose_each(scores: Doubles, costs: Doubles, tie: float) -> Indices:
    """(n,) the same for each row of (n, m) scores and costs."""
    near = scores <= scores.min(axis=1, keepdims=True) + tie
    return np.asarray(np.where(near, costs, np.inf).argmin(axis=1))


def flip_lambdas(errors: Doubles, costs: Doubles, lambda_: float, tie: float) -> Doubles:
    """(m,) per row the λ from 0 to DEAREST_LAMBDA nearest to `lambda_` at which `choose` picks it; NaN: there is none.

    A row is near enough to the best on one interval of λ (the best score is concave in λ), and is chosen there wherever
    no cheaper row is near enough too.
    """
    low, high = _near_intervals(errors, costs, tie)
    high = np.minimum(high, DEAREST_LAMBDA)
    flips = np.full(len(costs), np.nan)
    cheaper = np.empty((0, 2))
    for row in np.argsort(costs, kind="stable"):
        if low[row] > high[row]:
            continue
        for point in _open_points(low[row], high[row], cheaper, lambda_):
            if choose(errors + point * costs, costs, tie) == row:
                flips[row] = point
                break
        cheaper = np.vstack((cheaper, (low[row], high[row])))
    return flips


def _near_intervals(errors: Doubles, costs: Doubles, tie: float) -> tuple[Doubles, Doubles]:
    """(m,) bounds of the λ at which each row lies within `tie` of every other: λ(c_m − c_j) ≤ e_j − e_m + tie."""
    slack = errors[None, :] - errors[:, None] + tie
    dearer_by = costs[:, None] - costs[None, :]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        crossing = slack / dearer_by
    high = np.where(dearer_by > 0, crossing, np.inf).min(axis=1)
    low = np.maximum(np.where(dearer_by < 0, crossing, 0.0).max(axis=1), 0.0)
    never = ((dearer_by == 0) & (slack < 0)).any(axis=1)
    return np.where(never, np.inf, low), np.where(never, -np.inf, high)


def _open_points(low: float, high: float, covered: Doubles, target: float) -> Doubles:
    """Points of [low, high] outside the (n, 2) `covered` intervals, the one nearest to `target` first.

    Within a gap the nearest point is the target itself or an end of the gap, so the ends are all that need be tried:
    each as it is, and one step to either side, since ends of covered intervals are closed.
    """
    ends = np.concatenate(([low, high, np.clip(target, low, high)], covered.ravel()))
    ends = ends[np.isfinite(ends)]
    points = np.concatenate((ends, ends * (1 - NUDGE), ends * (1 + NUDGE), ends + NUDGE))
    points = points[(points >= low) & (points <= high)]
    inside = ((points[:, None] >= covered[:, 0]) & (points[:, None] <= covered[:, 1])).any(axis=1)
    points = np.unique(points[~inside])
    return np.asarray(points[np.argsort(np.abs(points - target), kind="stable")])
