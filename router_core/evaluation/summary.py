"""Trials to means, intervals and mean curves. Runs no trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from router_core.evaluation.curves import BUDGETS, SLACK, Anchors, Curve, Figures, figures, quality_within
from router_core.evaluation.intervals import bootstrap_interval
from router_core.evaluation.results import Estimate, MethodFigures
from router_core.types import Doubles

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Measured:
    """One method in one trial."""

    figures: Figures
    budgets: Doubles
    """(BUDGETS,) from the best single model's cost down to the cheapest's, relative to the former."""
    qualities: Doubles
    """(BUDGETS,)"""

    @property
    def reached(self) -> bool:
        """Whether it has the best single model's quality, whatever that costs: where it is free, QNC is undefined."""
        return not self.figures.perf_gain < -SLACK  # NaN where that model is always wrong, and anything is as good


def measured(curve: Curve, anchors: Anchors) -> Measured:
    defined = anchors.best > anchors.cheapest
    budgets = np.linspace(anchors.best, anchors.cheapest, BUDGETS) if defined else np.full(BUDGETS, NAN)
    qualities = quality_within(curve, budgets) if defined else budgets
    return Measured(figures(curve, anchors), budgets / anchors.best if defined else budgets, qualities)


def summed_up(trials: Sequence[Measured], *, seed: int) -> MethodFigures:
    def estimate_of(name: str) -> Estimate:
        return estimate(np.array([getattr(trial.figures, name) for trial in trials]), seed=seed)

    curve = Curve(_mean([trial.budgets for trial in trials]), _mean([trial.qualities for trial in trials]))
    return method_figures(estimate_of, trials, curve)


def method_figures(estimate_of: Callable[[str], Estimate], drawn: Sequence[Measured], curve: Curve) -> MethodFigures:
    """`estimate_of` each of the fields of Figures; `drawn`: the trials, or draws, that reach the best model or not."""
    return MethodFigures(
        **{field.name: estimate_of(field.name) for field in fields(Figures)},
        reached=float(np.mean([each.reached for each in drawn])),
        curve=curve,
    )


def estimate(values: Doubles, *, seed: int) -> Estimate:
    """Of (T,) trials; NaN ones are left out."""
    known = values[~np.isnan(values)]
    low, high = bootstrap_interval(known, seed=seed)
    return Estimate(float(known.mean()) if known.size else NAN, low, high, known.size)


def _mean(rows: Sequence[Doubles]) -> Doubles:
    defined = [row for row in rows if not np.isnan(row).any()]
    return np.mean(defined, axis=0) if defined else np.full(BUDGETS, NAN)
