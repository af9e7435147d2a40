"""Trials to means, intervals and mean curves. Runs no trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    return MethodFigures(
        area=estimate_of("area"),
        paper_area=estimate_of("paper_area"),
        paper_area_half=estimate_of("paper_area_half"),
        qnc=estimate_of("qnc"),
        reached=float(np.mean([trial.reached for trial in trials])),
        peak=estimate_of("peak"),
        perf_gain=estimate_of("perf_gain"),
        cost_save=estimate_of("cost_save"),
        curve=Curve(_mean([trial.budgets for trial in trials]), _mean([trial.qualities for trial in trials])),
    )


def estimate(values: Doubles, *, seed: int) -> Estimate:
    """Of (T,) trials; NaN ones are left out."""
    known = values[~np.isnan(values)]
    low, high = bootstrap_interval(known, seed=seed)
    return Estimate(float(known.mean()) if known.size else NAN, low, high, known.size)


def _mean(rows: Sequence[Doubles]) -> Doubles:
    defined = [row for row in rows if not np.isnan(row).any()]
    return np.mean(defined, axis=0) if defined else np.full(BUDGETS, NAN)
