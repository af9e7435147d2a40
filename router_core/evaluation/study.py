"""All methods on the same trials: what each makes of N labels, how far apart they are, and how sure that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from router_core.errors import InvalidInput
from router_core.evaluation.curves import Curve
from router_core.evaluation.intervals import Difference, paired_difference
from router_core.evaluation.methods import single
from router_core.evaluation.methods.hiershrink import hiershrink
from router_core.evaluation.methods.kmeans import kmeans_laplace, kmeans_raw
from router_core.evaluation.methods.knn import knn
from router_core.evaluation.methods.learned_map import learned_map
from router_core.evaluation.methods.ours import Deployment
from router_core.evaluation.methods.ridge import ridge
from router_core.evaluation.methods.tuning import means
from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.plan import Plan, tested_prompts
from router_core.evaluation.results import HeatMap, Protocol, Results
from router_core.evaluation.seen import Asked, Estimator, Known, Method
from router_core.evaluation.spreading import one_thread, spread
from router_core.evaluation.summary import Measured, estimate, measured, summed_up
from router_core.evaluation.sweep import deferral_curve
from router_core.evaluation.trials import Split, Trial, draw_split, draw_trial
from router_core.fitting import Progress, no_progress
from router_core.pool import Pool
from router_core.pricing import CENT_USD
from router_core.types import Doubles, Floats
from router_core.validation.fields import shown

OURS, CHOSEN = "ours", "chosen"
ESTIMATED: Mapping[str, Method] = {
    "knn": knn,
    "kmeans_raw": kmeans_raw,
    "kmeans_laplace": kmeans_laplace,
    "learned_map": learned_map,
    "hiershrink": hiershrink,
    "ridge": ridge,
}
METHODS = ("cheapest", "best_single", "random_mix", *ESTIMATED, OURS, "oracle")
"""In the order in which they are shown."""

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
    trials = spread(partial(_measured_trial, outcomes, vectors, plan), range(plan.trials), min(workers, plan.trials))
    for number, trial in enumerate(trials, 1):
        progress("trials", number, plan.trials)
        for labels, methods in trial.items():
            for method, seen in methods.items():
                found[method][labels].append(seen)
    with one_thread():
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
        f"no test prompt is scored for all of {', '.join(scored)}; score them on more, or leave out {shown(fewest)},"
        f" which is scored on {scored[fewest]} of {len(outcomes.prompts)} prompts only"
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

    def pool(self, asked: Asked) -> Pool:
        return self.deployment.pool(asked, self._trial.prices)

    def curve(self, pool: Pool) -> Curve:
        return deferral_curve(self._placed.expected(pool.errors), self.expected_cents(pool), self._trial.test)

    def expected_cents(self, pool: Pool) -> Doubles:
        """(t, M) by the lengths that were seen; what routing goes by, whatever the method."""
        tokens = self._placed.expected(pool.output_tokens) * self._trial.lengths_known
        return pool.prices.expected_usd(self._trial.test.prompt_tokens[:, None], tokens) / CENT_USD


def _side_by_side(trial: Trial, served: Served, estimators: Mapping[str, Estimator], asked: Asked) -> dict[str, Curve]:
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
    everything = Deployment(Known(outcomes.prompts, vectors, nobody, (), plan.embedder_id, plan.seed))
    asked = Asked(np.arange(len(vectors)), outcomes.scores, outcomes.output_tokens)
    pool = everything.pool(asked, outcomes.prices)
    labels = np.array([candidate.profile.labels for candidate in pool.candidates.values() if candidate.profile])
    return HeatMap(outcomes.models, everything.cluster_map.names, pool.errors, labels)
