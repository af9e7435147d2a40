"""From expected errors and costs to a deferral curve, by the rule that is served. Estimates nothing."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from router_core.evaluation.curves import Curve
from router_core.evaluation.trials import HeldOut
from router_core.flips import choose_each
from router_core.scoring import TIE
from router_core.types import Doubles, Indices

POINTS = 256
"""Cost weights λ between 0 and infinity."""


def deferral_curve(errors: Doubles, cents: Doubles, test: HeldOut) -> Curve:
    """Route the t test prompts at many λ by (t, M) expected errors and (t, M) expected costs; bill what is true."""
    errors, cents = np.asfortranarray(errors), np.asfortranarray(cents)  # few columns: reduced faster so
    choices = [choose_each(errors + weight * cents, cents, TIE) for weight in cost_weights(errors, cents)]
    return curve_of([*choices, cents.argmin(axis=1)], test)


def curve_of(choices: list[Indices], test: HeldOut) -> Curve:
    """One point for each (t,) choice of models."""
    rows = np.arange(len(test.scores))
    return Curve(
        costs=np.array([test.cents[rows, choice].mean() for choice in choices]),
        qualities=np.array([test.scores[rows, choice].mean() for choice in choices]),
    )


def cost_weights(errors: Doubles, cents: Doubles) -> Doubles:
    """Zero, and quantiles of the λ at which one model overtakes another on some prompt: there the choices change."""
    crossings = []
    for cheap, dear in permutations(range(errors.shape[1]), 2):
        dearer_by = cents[:, dear] - cents[:, cheap]
        worth = errors[:, cheap] - errors[:, dear]
        overtaken = (dearer_by > 0) & (worth > 0)
        with np.errstate(over="ignore"):  # prices next to nothing are overtaken at no λ that can be written down
            crossings.append(worth[overtaken] / dearer_by[overtaken])
    found = np.concatenate(crossings)
    found = found[np.isfinite(found)]
    if not found.size:
        return np.zeros(1)
    return np.concatenate(([0.0], np.quantile(found, np.linspace(0.0, 1.0, POINTS))))
