"""Evaluate a deployed map and its profiles on recorded outcomes of the same models.

There are no trials: every prompt is a test prompt, and intervals are those of a bootstrap over prompts. They do not
include the luck of the labels that the profiles were made of. On the prompts that profiles were measured on, profiles
look better than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_core.decision import argmin_rows_with_ties
from router_core.errors import InvalidInput
from router_core.evaluation.baselines import best_single, cheapest, random_mix
from router_core.evaluation.curves import Baselines, Curve, Difference, percentile_interval
from router_core.evaluation.outcomes import OutcomeRow, Outcomes, outcomes_from_rows, parse_row, read_rows
from router_core.evaluation.study import (
    Estimate,
    HeatMap,
    MethodMetrics,
    Protocol,
    Results,
    TrialMetrics,
    method_metrics,
    trial_metrics,
)
from router_core.evaluation.trials import cost_weights
from router_core.pool import Pool
from router_core.pricing import CENT_USD
from router_core.scoring import TIE_TOLERANCE
from router_core.types import Assignment, Doubles, Indices


@dataclass(frozen=True, slots=True)
class CommonModels:
    """The models that an outcomes file and a deployment both have, and those of only one. All sorted."""

    models: tuple[str, ...]
    only_scored: tuple[str, ...]
    only_deployed: tuple[str, ...]


def common_models(scored: Collection[str], pool: Pool) -> CommonModels:
    """Compare the scored models with the deployed ones, which have a profile and a price.

    Raises:
        InvalidInput: fewer than two are common; the message names the others.
    """
    deployed = {pool.names[row] for row in pool.routable_rows}
    common = tuple(sorted(deployed & set(scored)))
    found = CommonModels(common, tuple(sorted(set(scored) - deployed)), tuple(sorted(deployed - set(scored))))
    if len(common) < 2:
        raise InvalidInput(
            f"two models or more must be both scored and deployed. Both: {_named(common)}."
            f" Only scored: {_named(found.only_scored)}. Only deployed: {_named(found.only_deployed)}"
        )
    return found


def read_deployed(path: Path, pool: Pool) -> tuple[Outcomes, CommonModels]:
    """Read the outcomes of the models that are deployed too, billed at the deployed prices.

    Raises:
        InvalidOutcomes: as `read_outcomes`.
        InvalidInput: there are fewer than two such models.
    """
    rows = [(where, parse_row(where, row)) for where, row in read_rows(path)]
    common = common_models({model for _, row in rows for model in row.scores}, pool)

    lines = [(where, _line(row, common.models)) for where, row in rows if row.scores.keys() & set(common.models)]
    prices = {name: pool.candidates[name].price for name in common.models}
    return outcomes_from_rows(lines, {name: price for name, price in prices.items() if price}), common


def _line(row: OutcomeRow, models: Collection[str]) -> dict[str, Any]:
    """Return the row with the figures of these models alone."""
    figures = {"scores": row.scores, "output_tokens": row.output_tokens}
    kept = {name: {m: value for m, value in values.items() if m in models} for name, values in figures.items()}
    return {"prompt": row.prompt, "source": row.source, **kept}


def _named(models: Collection[str]) -> str:
    return ", ".join(models) or "none"


OURS = "ours"

BOOTSTRAP_DRAWS = 500

# (n,) weights of the test prompts, which sum to one → the deferral curve on prompts so weighted.
Method = Callable[[Doubles], Curve]


@dataclass(frozen=True, eq=False)
class _Test:
    """The n prompts that every one of the M models has a score on; all arrays are (n, M)."""

    scores: Doubles
    cents: Doubles
    expected_errors: Doubles
    expected_cents: Doubles
    measured_lengths: bool
    """Whether any answer's length is known."""


def evaluate_deployed(
    outcomes: Outcomes,
    pool: Pool,
    assignment: Assignment,
    *,
    outcomes_name: str,
    embedder_id: str,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
) -> Results:
    """Route the file's prompts by the deployed profiles, among the models that both have.

    In the results, `trials` counts bootstrap draws, N is the mean label weight of the profiles, and `chosen` is empty.
    A prompt that one of the models has no score on is left out.

    Args:
        assignment: Φ of the file's prompts, on the map of the pool.

    Raises:
        InvalidInput: there are fewer than two common models, or no prompt that all of them have a score on.
    """
    common = common_models(outcomes.models, pool)
    test = _test(outcomes, pool, assignment, common.models)
    rows = np.array([pool.index[name] for name in common.models])
    methods = _methods(test, pool.mean_errors[rows])
    everywhere = np.full(len(test.scores), 1.0 / len(test.scores))
    seen = _measured(methods, test, everywhere)
    drawn = [_measured(methods, test, weights) for weights in _bootstrap(len(test.scores), draws, seed)]
    labels = round(float(pool.total_labels[rows].mean()))
    return Results(
        protocol=Protocol(
            outcomes=outcomes_name,
            embedder=embedder_id,
            prompts=len(outcomes.prompts),
            models=common.models,
            labels=(labels,),
            trials=draws,
            seed=seed,
            unseen=0.0,
            known_models=0,
            new_models=len(common.models),
            test_prompts=len(test.scores),
            measured_lengths=test.measured_lengths,
        ),
        methods={name: {labels: _metrics(seen[name], [draw[name] for draw in drawn])} for name in methods},
        differences={name: {labels: _difference(seen, drawn, name)} for name in methods if name != OURS},
        chosen={},
        chosen_differences={},
        heat_map=_heat_map(pool, common.models, rows),
    )


def _test(outcomes: Outcomes, pool: Pool, assignment: Assignment, models: Sequence[str]) -> _Test:
    """Select the prompts that all models have a score on.

    The whole file is billed before rows are selected. Where a model's lengths are not known, only the prompt is billed,
    and only the prompt is expected.
    """
    columns = np.array([outcomes.models.index(name) for name in models])
    rows = np.array([pool.index[name] for name in models])
    scored = np.flatnonzero(~np.isnan(outcomes.scores[:, columns]).any(axis=1))
    if not scored.size:
        raise InvalidInput(
            f"no prompt of the outcomes is scored for all of {', '.join(models)}; score them on the same"
        )
    lengths_known = (~np.isnan(outcomes.output_tokens[:, columns])).any(axis=0)
    tokens = assignment.expected(pool.output_tokens[rows]) * lengths_known
    prices = pool.prices.select(rows)
    return _Test(
        scores=outcomes.scores[np.ix_(scored, columns)],
        cents=outcomes.usd()[np.ix_(scored, columns)] / CENT_USD,
        expected_errors=assignment.expected(pool.errors[rows])[scored],
        expected_cents=prices.expected_usd(outcomes.prompt_tokens[:, None], tokens)[scored] / CENT_USD,
        measured_lengths=bool(lengths_known.any()),
    )


def _methods(test: _Test, mean_errors: Doubles) -> dict[str, Method]:
    mean_cents = test.expected_cents.mean(axis=0)

    def truth(weights: Doubles) -> tuple[Doubles, Doubles]:
        return weights @ test.cents, weights @ test.scores

    return {
        "cheapest": lambda weights: cheapest(mean_cents, *truth(weights)),
        "best_single": lambda weights: best_single(mean_errors, mean_cents, *truth(weights)),
        "random_mix": lambda weights: random_mix(mean_errors, mean_cents, *truth(weights)),
        OURS: _routed(test, test.expected_errors, test.expected_cents),
        "oracle": _routed(test, 1.0 - test.scores, test.cents),
    }


def _routed(test: _Test, errors: Doubles, cents: Doubles) -> Method:
    """Route by the served rule at many λ, which are the same however the prompts are weighted."""
    choices = [
        argmin_rows_with_ties(errors + weight * cents, cents, TIE_TOLERANCE) for weight in cost_weights(errors, cents)
    ]
    chosen: Indices = np.array([*choices, cents.argmin(axis=1)])
    prompts = np.arange(len(test.scores))
    costs, qualities = test.cents[prompts, chosen], test.scores[prompts, chosen]
    return lambda weights: Curve(costs @ weights, qualities @ weights)


def _measured(methods: Mapping[str, Method], test: _Test, weights: Doubles) -> dict[str, TrialMetrics]:
    baselines = Baselines.from_models(weights @ test.cents, weights @ test.scores)
    return {name: trial_metrics(method(weights), baselines) for name, method in methods.items()}


def _bootstrap(prompts: int, draws: int, seed: int) -> Iterator[Doubles]:
    """Yield (n,) weights of prompts drawn with replacement."""
    rng, even = np.random.default_rng(seed), np.full(prompts, 1.0 / prompts)
    return (rng.multinomial(prompts, even) / prompts for _ in range(draws))


def _metrics(seen: TrialMetrics, draws: Sequence[TrialMetrics]) -> MethodMetrics:
    def estimate(name: str) -> Estimate:
        values = np.array([getattr(draw.metrics, name) for draw in draws])
        return Estimate(getattr(seen.metrics, name), *percentile_interval(values), int((~np.isnan(values)).sum()))

    return method_metrics(estimate, draws, Curve(seen.budgets, seen.qualities))


def _difference(
    seen: Mapping[str, TrialMetrics], draws: Sequence[Mapping[str, TrialMetrics]], other: str
) -> Difference:
    def gap(drawn: Mapping[str, TrialMetrics]) -> float:
        return drawn[OURS].metrics.area - drawn[other].metrics.area

    return Difference(gap(seen), *percentile_interval(np.array([gap(draw) for draw in draws])))


def _heat_map(pool: Pool, models: Sequence[str], rows: Indices) -> HeatMap:
    profiles = [pool.candidates[name].profile for name in models]
    labels = np.array([profile.labels for profile in profiles if profile])
    return HeatMap(tuple(models), pool.cluster_names, pool.errors[rows], labels)
