from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from router_core.documents import short_repr
from router_core.errors import InvalidInput
from router_core.evaluation.baselines import best_single, cheapest, knn, means, random_mix, ridge
from router_core.evaluation.cluster_methods import Deployment, hiershrink, kmeans_laplace, kmeans_raw, learned_map
from router_core.evaluation.curves import (
    BUDGETS,
    SLACK,
    Baselines,
    Curve,
    CurveMetrics,
    Difference,
    bootstrap_interval,
    curve_metrics,
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
    count_test_prompts,
    deferral_curve,
    draw_split,
    draw_trial,
)
from router_core.fitting import Progress, no_progress
from router_core.pool import Pool
from router_core.pricing import CENT_USD
from router_core.types import Doubles, Floats

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class TrialMetrics:
    """What one method made of one trial."""

    metrics: CurveMetrics
    budgets: Doubles
    """(BUDGETS,) from the best single model's cost down to the cheapest's, as shares of the former."""
    qualities: Doubles
    """(BUDGETS,)"""

    @property
    def reached(self) -> bool:
        """Whether it reaches the best single model's quality, at any cost: QNC is undefined if that model is free."""
        # NaN if that model is always wrong, and then any other is as good.
        return not self.metrics.perf_gain < -SLACK


def trial_metrics(curve: Curve, baselines: Baselines) -> TrialMetrics:
    """Read a trial's figures off a method's deferral curve."""
    defined = baselines.best > baselines.cheapest
    budgets = np.linspace(baselines.best, baselines.cheapest, BUDGETS) if defined else np.full(BUDGETS, NAN)
    qualities = quality_within(curve, budgets) if defined else budgets
    return TrialMetrics(curve_metrics(curve, baselines), budgets / baselines.best if defined else budgets, qualities)


def summarize(trials: Sequence[TrialMetrics], *, seed: int) -> MethodMetrics:
    """Average one method's trials, with bootstrap intervals."""

    def estimate_of(name: str) -> Estimate:
        return estimate(np.array([getattr(trial.metrics, name) for trial in trials]), seed=seed)

    curve = Curve(_mean([trial.budgets for trial in trials]), _mean([trial.qualities for trial in trials]))
    return method_metrics(estimate_of, trials, curve)


def method_metrics(
    estimate_of: Callable[[str], Estimate], drawn: Sequence[TrialMetrics], curve: Curve
) -> MethodMetrics:
    """Put together one method's figures.

    Args:
        estimate_of: field of CurveMetrics → its estimate.
        drawn: the trials, or bootstrap draws, that reach the best single model's quality or do not.
    """
    return MethodMetrics(
        **{field.name: estimate_of(field.name) for field in fields(CurveMetrics)},
        reached=float(np.mean([each.reached for each in drawn])),
        curve=curve,
    )


def estimate(values: Doubles, *, seed: int) -> Estimate:
    """Estimate the mean of (T,) trials, NaN ones left out."""
    known = values[~np.isnan(values)]
    low, high = bootstrap_interval(known, seed=seed)
    return Estimate(float(known.mean()) if known.size else NAN, low, high, known.size)


def _mean(rows: Sequence[Doubles]) -> Doubles:
    defined = [row for row in rows if not np.isnan(row).any()]
    return np.mean(defined, axis=0) if defined else np.full(BUDGETS, NAN)


@dataclass(frozen=True, slots=True)
class Protocol:
    """What was evaluated and how, so that it can be repeated."""

    outcomes: str
    """The file's name."""
    embedder: str
    """The id of the embedder of the prompts."""
    prompts: int
    models: tuple[str, ...]
    labels: tuple[int, ...]
    """The numbers N of labels that each new model gets; one column of the table each."""
    trials: int
    seed: int
    unseen: float
    """The share of the models that is new in a trial; 0 if all are, and none is known."""
    known_models: int
    new_models: int
    test_prompts: int
    measured_lengths: bool
    """Whether the file has lengths of answers; if not, only the prompts are billed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over trials and its 95 % bootstrap interval; NaN if no trial defines it."""

    mean: float
    low: float
    high: float
    trials: int
    """How many trials define it."""


@dataclass(frozen=True, eq=False)
class MethodMetrics:
    """One method with N labels. Areas and peak are mean scores in [0, 1]; reports multiply them by 100."""

    area: Estimate
    paper_area: Estimate
    paper_area_half: Estimate
    qnc: Estimate
    """Over the trials that reach the best single model's quality."""
    reached: float
    """The share of trials that reach the best single model's quality."""
    peak: Estimate
    perf_gain: Estimate
    cost_save: Estimate
    curve: Curve
    """The mean over the trials that define Area, at BUDGETS budgets from the best single model's cost down to the
    cheapest's; costs are shares of the best single model's. All NaN if there is no such trial."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Ψ of all models, measured with all labels of the file."""

    models: tuple[str, ...]
    clusters: tuple[str, ...]
    """K names."""
    errors: Doubles
    """(M, K) in [0, 1]"""
    labels: Doubles
    """(M, K)"""


@dataclass(frozen=True, eq=False)
class Results:
    """What an evaluation found. Keys are methods' ids, and then N."""

    protocol: Protocol
    methods: Mapping[str, Mapping[int, MethodMetrics]]
    differences: Mapping[str, Mapping[int, Difference]]
    """Area of `ours` minus that of each other method, trial by trial."""
    chosen: Mapping[int, Estimate]
    """Area of `ours` if the N prompts are chosen as `uniroute models add` does."""
    chosen_differences: Mapping[int, Difference]
    """The same minus `ours` on random prompts."""
    heat_map: HeatMap


# The product's ids: on random prompts, and on prompts chosen as `uniroute models add` does.
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

_Found = dict[str, dict[int, list[TrialMetrics]]]


def run_study(
    outcomes: Outcomes, vectors: Floats, plan: Plan, progress: Progress = no_progress, *, workers: int = 1
) -> Results:
    """Run the plan's trials over `workers` processes. Their number does not change the figures.

    Args:
        vectors: (n, d) of the prompts, as the product embeds them.

    Raises:
        InvalidInput: there are too few models, prompts or scores for the plan; raised before any trial is run.
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


def _measured_trial(outcomes: Outcomes, vectors: Floats, plan: Plan, number: int) -> dict[int, dict[str, TrialMetrics]]:
    """Run the trial of this number; returns N → method → its figures."""
    trial = draw_trial(outcomes, vectors, plan, number)
    baselines = trial.test.baselines()
    return {
        labels: {method: trial_metrics(curve, baselines) for method, curve in curves.items()}
        for labels, curves in _curves(trial, plan).items()
    }


def _check_split(outcomes: Outcomes, split: Split) -> None:
    """Raise InvalidInput if the new models have no test prompt in common."""
    if split.test.size:
        return
    scored = {outcomes.models[column]: int((~np.isnan(outcomes.scores[:, column])).sum()) for column in split.new}
    fewest = min(scored, key=scored.__getitem__)
    raise InvalidInput(
        f"no test prompt is scored for all of {', '.join(scored)}; score them on more, or leave out"
        f" {short_repr(fewest)}, which is scored on {scored[fewest]} of {len(outcomes.prompts)} prompts only"
    )


def _curves(trial: Trial, plan: Plan) -> dict[int, dict[str, Curve]]:
    """Return N → method → its deferral curve in this trial."""
    served = ServedTrial(trial)
    estimators = {name: method(trial.history) for name, method in ESTIMATED.items()}
    oracle = deferral_curve(1.0 - trial.test.scores, trial.test.cents, trial.test)
    chosen = served.deployment.choose(plan.labels[-1])
    found = {}
    for labels in plan.labels:
        curves = _curves_with(trial, served, estimators, trial.sample(trial.order[:labels]))
        curves |= {"oracle": oracle, CHOSEN: served.curve(served.pool(trial.sample(chosen[:labels])))}
        found[labels] = curves
    return found


class ServedTrial:
    """The product in one trial."""

    def __init__(self, trial: Trial) -> None:
        self.deployment = Deployment(trial.history)
        self._trial = trial
        cluster_map = self.deployment.cluster_map
        self._assignment = cluster_map.assign(trial.test.vectors, cluster_map.surface_of(trial.test.texts))

    def pool(self, sample: LabelledSample) -> Pool:
        return self.deployment.pool(sample, self._trial.prices)

    def curve(self, pool: Pool) -> Curve:
        return deferral_curve(self._assignment.expected(pool.errors), self.expected_cents(pool), self._trial.test)

    def expected_cents(self, pool: Pool) -> Doubles:
        """Return the (t, M) costs expected from the lengths seen. Every method routes by these."""
        tokens = self._assignment.expected(pool.output_tokens) * self._trial.lengths_known
        return pool.prices.expected_usd(self._trial.test.prompt_tokens[:, None], tokens) / CENT_USD


def _curves_with(
    trial: Trial, served: ServedTrial, estimators: Mapping[str, PromptEstimator], sample: LabelledSample
) -> dict[str, Curve]:
    pool = served.pool(sample)
    cents, test = served.expected_cents(pool), trial.test
    errors, mean_cents = means(sample), cents.mean(axis=0)
    truth = test.cents.mean(axis=0), test.scores.mean(axis=0)
    return {
        "cheapest": cheapest(mean_cents, *truth),
        "best_single": best_single(errors, mean_cents, *truth),
        "random_mix": random_mix(errors, mean_cents, *truth),
        **{
            name: deferral_curve(estimator(sample, test.vectors), cents, test) for name, estimator in estimators.items()
        },
        OURS: served.curve(pool),
    }


def _results(outcomes: Outcomes, vectors: Floats, plan: Plan, found: _Found) -> Results:
    areas = {
        method: {labels: _areas(trials) for labels, trials in by_labels.items()} for method, by_labels in found.items()
    }
    return Results(
        protocol=_protocol(outcomes, plan),
        methods={
            method: {labels: summarize(trials, seed=plan.seed) for labels, trials in found[method].items()}
            for method in METHODS
        },
        differences={method: _differences(areas[OURS], areas[method], plan) for method in METHODS if method != OURS},
        chosen={labels: estimate(values, seed=plan.seed) for labels, values in areas[CHOSEN].items()},
        chosen_differences=_differences(areas[CHOSEN], areas[OURS], plan),
        heat_map=_heat_map(outcomes, vectors, plan),
    )


def _areas(measured_trials: Sequence[TrialMetrics]) -> Doubles:
    return np.array([trial.metrics.area for trial in measured_trials])


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
        test_prompts=count_test_prompts(len(outcomes.prompts)),
        measured_lengths=not np.isnan(outcomes.output_tokens).all(),
    )


def _heat_map(outcomes: Outcomes, vectors: Floats, plan: Plan) -> HeatMap:
    """Profile all models on a map of all prompts, fitted without known models so that every cluster has a name."""
    no_scores = np.empty((len(vectors), 0))
    everything = Deployment(History(outcomes.prompts, vectors, no_scores, (), plan.embedder_id, plan.seed))
    sample = LabelledSample(np.arange(len(vectors)), outcomes.scores, outcomes.output_tokens)
    pool = everything.pool(sample, outcomes.prices)
    labels = np.array([candidate.profile.labels for candidate in pool.candidates.values() if candidate.profile])
    return HeatMap(outcomes.models, everything.cluster_map.names, pool.errors, labels)
