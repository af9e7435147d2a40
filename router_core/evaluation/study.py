from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from router_core.documents import short_repr
from router_core.errors import InvalidInput
from router_core.evaluation import baselines as single
from router_core.evaluation.baselines import knn, means, ridge
from router_core.evaluation.cluster_methods import Deployment, hiershrink, kmeans_laplace, kmeans_raw, learned_map
from router_core.evaluation.curves import (
    BUDGETS,
    SLACK,
    Baselines,
    Curve,
    CurveMetrics,
    Difference,
    bootstrap_interval,
    figures,
    paired_difference,
    quality_within,
)
from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.parallel import parallel_map, single_threaded
from router_core.evaluation.trials import (
    History,
    LabelledSample,
    Method,
    Plan,
    PromptEstimator,
    Split,
    Trial,
    deferral_curve,
    draw_split,
    draw_trial,
    tested_prompts,
)
from router_core.fitting import Progress, no_progress
from router_core.pool import Pool
from router_core.pricing import CENT_USD
from router_core.types import Doubles, Floats

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Measured:
    """One method in one trial."""

    figures: CurveMetrics
    budgets: Doubles
    """(BUDGETS,) from the best single model's cost down to the cheapest's, relative to the former."""
    qualities: Doubles
    """(BUDGETS,)"""

    @property
    def reached(self) -> bool:
        """Whether it has the best single model's quality, whatever that costs: where it is free, QNC is undefined."""
        return not self.figures.perf_gain < -SLACK  # NaN where that model is always wrong, and anything is as good


def measured(curve: Curve, anchors: Baselines) -> Measured:
    defined = anchors.best > anchors.cheapest
    budgets = np.linspace(anchors.best, anchors.cheapest, BUDGETS) if defined else np.full(BUDGETS, NAN)
    qualities = quality_within(curve, budgets) if defined else budgets
    return Measured(figures(curve, anchors), budgets / anchors.best if defined else budgets, qualities)


def summed_up(trials: Sequence[Measured], *, seed: int) -> MethodMetrics:
    def estimate_of(name: str) -> Estimate:
        return estimate(np.array([getattr(trial.figures, name) for trial in trials]), seed=seed)

    curve = Curve(_mean([trial.budgets for trial in trials]), _mean([trial.qualities for trial in trials]))
    return method_figures(estimate_of, trials, curve)


def method_figures(estimate_of: Callable[[str], Estimate], drawn: Sequence[Measured], curve: Curve) -> MethodMetrics:
    """`estimate_of` each of the fields of Figures; `drawn`: the trials, or draws, that reach the best model or not."""
    return MethodMetrics(
        **{field.name: estimate_of(field.name) for field in fields(CurveMetrics)},
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
class MethodMetrics:
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
    methods: Mapping[str, Mapping[int, MethodMetrics]]
    differences: Mapping[str, Mapping[int, Difference]]
    """Area of `ours` less that of each other method, trial by trial."""
    chosen: Mapping[int, Estimate]
    """Area of `ours` where the N prompts are chosen as `uniroute models add` chooses them."""
    chosen_differences: Mapping[int, Difference]
    """The same less `ours` on random prompts."""
    heat_map: HeatMap


OURS, CHOSEN = "ours", "chosen"

ESTIMATED: Mapping[str, Method] = {
    "knn": knn,
    "kmeans_raw": kmeans_raw,
    "kmeans_laplace": kmeans_laplace,
    "learned_map": learned_map,
    "hiershrink": hiershrink,
    "ridge": ridge,
}

# In the order in which they are shown.
METHODS = ("cheapest", "best_single", "random_mix", *ESTIMATED, OURS, "oracle")

_Found = dict[str, dict[int, list[Measured]]]


def run_study(
    outcomes: Outcomes, vectors: Floats, plan: Plan, progress: Progress = no_progress, *, workers: int = 1
) -> Results:
    """The plan's trials, spread over so many processes; the figures are the same for any number of them.

    Args:
        vectors: (n, d) of the prompts, as the product embeds them.

    Raises:
        InvalidInput: too few models, prompts or scores for the plan; before anything is run.
    """
    plan.check(outcomes)
    for number in range(plan.trials):
        _check_split(outcomes, draw_split(outcomes, plan, number))
    found: _Found = defaultdict(lambda: defaultdict(list))
    progress("trials", 0, plan.trials)
    trials = parallel_map(
        partial(_measured_trial, outcomes, vectors, plan), range(plan.trials), min(workers, plan.trials)
    )
    for number, trial in enumerate(trials, 1):
        progress("trials", number, plan.trials)
        for labels, methods in trial.items():
            for method, seen in methods.items():
                found[method][labels].append(seen)
    with single_threaded():
        return _results(outcomes, vectors, plan, found)


def _measured_trial(outcomes: Outcomes, vectors: Floats, plan: Plan, number: int) -> dict[int, dict[str, Measured]]:
    """N → method → what it makes of the trial of this number."""
    trial = draw_trial(outcomes, vectors, plan, number)
    anchors = trial.test.anchors()
    return {
        labels: {method: measured(curve, anchors) for method, curve in curves.items()}
        for labels, curves in _curves(trial, plan).items()
    }


def _check_split(outcomes: Outcomes, split: Split) -> None:
    """Raises InvalidInput where new models have no test prompt in common."""
    if split.test.size:
        return
    scored = {outcomes.models[column]: int((~np.isnan(outcomes.scores[:, column])).sum()) for column in split.new}
    fewest = min(scored, key=scored.__getitem__)
    raise InvalidInput(
        f"no test prompt is scored for all of {', '.join(scored)}; score them on more, or leave out"
        f" {short_repr(fewest)}, which is scored on {scored[fewest]} of {len(outcomes.prompts)} prompts only"
    )


def _curves(trial: Trial, plan: Plan) -> dict[int, dict[str, Curve]]:
    """N → method → what it makes of this trial."""
    served = Served(trial)
    estimators = {name: method(trial.known) for name, method in ESTIMATED.items()}
    oracle = deferral_curve(1.0 - trial.test.scores, trial.test.cents, trial.test)
    chosen = served.deployment.choose(plan.labels[-1])
    found = {}
    for labels in plan.labels:
        curves = _side_by_side(trial, served, estimators, trial.asked(trial.order[:labels]))
        curves |= {"oracle": oracle, CHOSEN: served.curve(served.pool(trial.asked(chosen[:labels])))}
        found[labels] = curves
    return found


class Served:
    """The product in one trial."""

    def __init__(self, trial: Trial) -> None:
        self.deployment = Deployment(trial.known)
        self._trial = trial
        self._placed = self.deployment.cluster_map.assign(trial.test.vectors)

    def pool(self, asked: LabelledSample) -> Pool:
        return self.deployment.pool(asked, self._trial.prices)

    def curve(self, pool: Pool) -> Curve:
        return deferral_curve(self._placed.expected(pool.errors), self.expected_cents(pool), self._trial.test)

    def expected_cents(self, pool: Pool) -> Doubles:
        """(t, M) by the lengths that were seen; what routing goes by, whatever the method."""
        tokens = self._placed.expected(pool.output_tokens) * self._trial.lengths_known
        return pool.prices.expected_usd(self._trial.test.prompt_tokens[:, None], tokens) / CENT_USD


def _side_by_side(
    trial: Trial, served: Served, estimators: Mapping[str, PromptEstimator], asked: LabelledSample
) -> dict[str, Curve]:
    pool = served.pool(asked)
    cents, test = served.expected_cents(pool), trial.test
    errors, mean_cents = means(asked), cents.mean(axis=0)
    truth = test.cents.mean(axis=0), test.scores.mean(axis=0)
    return {
        "cheapest": single.cheapest(mean_cents, *truth),
        "best_single": single.best_single(errors, mean_cents, *truth),
        "random_mix": single.random_mix(errors, mean_cents, *truth),
        **{name: deferral_curve(estimator(asked, test.vectors), cents, test) for name, estimator in estimators.items()},
        OURS: served.curve(pool),
    }


def _results(outcomes: Outcomes, vectors: Floats, plan: Plan, found: _Found) -> Results:
    areas = {
        method: {labels: _areas(trials) for labels, trials in by_labels.items()} for method, by_labels in found.items()
    }
    return Results(
        protocol=_protocol(outcomes, plan),
        methods={
            method: {labels: summed_up(trials, seed=plan.seed) for labels, trials in found[method].items()}
            for method in METHODS
        },
        differences={method: _differences(areas[OURS], areas[method], plan) for method in METHODS if method != OURS},
        chosen={labels: estimate(values, seed=plan.seed) for labels, values in areas[CHOSEN].items()},
        chosen_differences=_differences(areas[CHOSEN], areas[OURS], plan),
        heat_map=_heat_map(outcomes, vectors, plan),
    )


def _areas(measured_trials: Sequence[Measured]) -> Doubles:
    return np.array([trial.figures.area for trial in measured_trials])


def _differences(ours: Mapping[int, Doubles], theirs: Mapping[int, Doubles], plan: Plan) -> dict[int, Difference]:
    return {labels: paired_difference(ours[labels], theirs[labels], seed=plan.seed) for labels in ours}


def _protocol(outcomes: Outcomes, plan: Plan) -> Protocol:
    new = plan.new_models(len(outcomes.models))
    return Protocol(
        outcomes=plan.outcomes_name,
        embedder=plan.embedder_id,
        prompts=len(outcomes.prompts),
        models=outcomes.models,
        labels=plan.labels,
        trials=plan.trials,
        seed=plan.seed,
        unseen=plan.unseen,
        known_models=len(outcomes.models) - new,
        new_models=new,
        test_prompts=tested_prompts(len(outcomes.prompts)),
        measured_lengths=not np.isnan(outcomes.output_tokens).all(),
    )


def _heat_map(outcomes: Outcomes, vectors: Floats, plan: Plan) -> HeatMap:
    """On a map of all prompts and no history, so that its clusters have names of their own."""
    nobody = np.empty((len(vectors), 0))
    everything = Deployment(History(outcomes.prompts, vectors, nobody, (), plan.embedder_id, plan.seed))
    asked = LabelledSample(np.arange(len(vectors)), outcomes.scores, outcomes.output_tokens)
    pool = everything.pool(asked, outcomes.prices)
    labels = np.array([candidate.profile.labels for candidate in pool.candidates.values() if candidate.profile])
    return HeatMap(outcomes.models, everything.cluster_map.names, pool.errors, labels)
