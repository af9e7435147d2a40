"""How far what is expected of a λ may be off, for want of labels. Where else it may be wrong, it does not know."""

from __future__ import annotations

import numpy as np

from router_core.calibration import Expectations, Point
from router_core.pool import Pool
from router_core.types import Assignment, Doubles

NINETY_PERCENT = 1.645
"""Standard deviations to either side."""


def relative_interval(
    expected: Expectations, point: Point, pool: Pool, assignment: Assignment
) -> tuple[float, float] | None:
    """Bounds, with 90 % confidence, of a point's quality relative to the best single model's; None where that has none.

    Each rate is off by itself, by e(1 − e) ÷ (labels + 1), as a beta distribution would have it. The λ and the best
    model were chosen by the same rates, so the truth is in the lower half rather than in the upper one.

    Args:
        pool, assignment: what `expected` was made of.
    """
    best = expected.best_single()
    if best.quality <= 0:
        return None
    rows = [pool.index[name] for name in expected.models]
    errors, labels = pool.errors[rows], pool.label_weights[rows]
    routed, everywhere = _weights(expected, point, assignment.dense(errors.shape[1]))
    slopes = -routed / best.quality
    slopes[expected.models.index(best.model)] += point.quality / best.quality**2 * everywhere
    deviation = float(np.sqrt((slopes**2 * errors * (1.0 - errors) / (labels + 1.0)).sum()))
    relative = point.quality / best.quality
    return max(relative - NINETY_PERCENT * deviation, 0.0), relative + NINETY_PERCENT * deviation


def _weights(expected: Expectations, point: Point, clusters: Doubles) -> tuple[Doubles, Doubles]:
    """(M, K) how much each rate counts in the quality of the routed prompts, and (K,) in that of a model for all."""
    chosen = expected.chosen(point.lambda_)
    routed = np.zeros((len(expected.models), clusters.shape[1]))
    np.add.at(routed, chosen, clusters)
    return routed / len(clusters), np.asarray(clusters.mean(axis=0))
