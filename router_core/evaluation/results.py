"""What a study found, ready to be shown: figures with their intervals, curves, differences. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router_core.evaluation.curves import Curve
from router_core.evaluation.intervals import Difference
from router_core.types import Doubles


@dataclass(frozen=True, slots=True)
class Protocol:
    """What was run, so that it can be run again."""

    outcomes: str
    """The file's name."""
    embedder: str
    """The id of what embedded the prompts."""
    prompts: int
    models: tuple[str, ...]
    labels: tuple[int, ...]
    """N, the prompts that each new model was seen through: one column of the table each."""
    trials: int
    seed: int
    unseen: float
    """Share of the models that is new in a trial; 0: all are, and none is known."""
    known_models: int
    new_models: int
    test_prompts: int
    measured_lengths: bool
    """Whether the file has the lengths of answers; else the prompt alone is billed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over trials and its 95 % bootstrap interval; NaN where no trial defines it."""

    mean: float
    low: float
    high: float
    trials: int
    """How many of the trials define it."""


@dataclass(frozen=True, eq=False)
class MethodFigures:
    """One method with N labels. Areas and peak are mean scores in [0, 1]; whoever shows them multiplies by 100."""

    area: Estimate
    paper_area: Estimate
    paper_area_half: Estimate
    qnc: Estimate
    """Over the trials that reach the best single model's quality."""
    reached: float
    """The share of trials that do."""
    peak: Estimate
    perf_gain: Estimate
    cost_save: Estimate
    curve: Curve
    """The mean over trials at BUDGETS budgets from the cheapest to the best single model; costs are relative to the
    best single model's, dear to cheap. Of the trials in which Area is defined; all NaN where there is none."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Ψ of all models with all labels of the file."""

    models: tuple[str, ...]
    clusters: tuple[str, ...]
    """K names."""
    errors: Doubles
    """(M, K) in [0, 1]"""
    labels: Doubles
    """(M, K)"""


@dataclass(frozen=True, eq=False)
class Results:
    """Methods by id, and within each by N."""

    protocol: Protocol
    methods: Mapping[str, Mapping[int, MethodFigures]]
    differences: Mapping[str, Mapping[int, Difference]]
    """Area of `ours` less that of each other method, trial by trial."""
    chosen: Mapping[int, Estimate]
    """Area of `ours` where the N prompts are chosen as `uniroute models add` chooses them."""
    chosen_differences: Mapping[int, Difference]
    """The same less `ours` on random prompts."""
    heat_map: HeatMap
