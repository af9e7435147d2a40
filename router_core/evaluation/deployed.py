"""How good a deployed map and its profiles are on outcomes of the same models. Fits nothing, measures no profile.

There are no trials: every prompt is a test prompt, and what is uncertain is which prompts those were. So intervals are
those of a bootstrap over prompts. They say nothing of how lucky the labels were that the profiles were made of; and on
the very prompts that the profiles were measured on, these look better than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_core.decision import argmin_rows_with_ties
from router_core.errors import InvalidInput
from router_core.evaluation import baselines as single
from router_core.evaluation.curves import Baselines, Curve, Difference, percentile_interval
from router_core.evaluation.outcomes import OutcomeRow, Outcomes, outcomes_from_rows, parse_row, read_rows
from router_core.evaluation.study import (
    Estimate,
    HeatMap,
    Measured,
    MethodMetrics,
    Protocol,
    Results,
    measured,
    method_figures,
)
from router_core.evaluation.trials import cost_weights
from router_core.pool import Pool
from router_core.pricing import CENT_USD
from router_core.scoring import TIE_TOLERANCE
from router_core.types import Assignment, Doubles, Indices


@dataclass(frozen=True, slots=True)
class CommonModels:
    """Which models a file and a deployment both have, and which only one of them. All sorted."""

    models: tuple[str, ...]
    only_scored: tuple[str, ...]
    only_deployed: tuple[str, ...]


def common_models(scored: Collection[str], pool: Pool) -> CommonModels:
    """Deployed is what has a profile and a price. Raises InvalidInput, naming the others, where two are not common."""
    routable = ~np.isnan(pool.mean_errors) & ~np.isnan(pool.prices.input)
    deployed = {name for name, able in zip(pool.names, routable, strict=True) if able}
    common = tuple(sorted(deployed & set(scored)))
    found = CommonModels(common, tuple(sorted(set(scored) - deployed)), tuple(sorted(deployed - set(scored))))
    if len(common) < 2:
        raise InvalidInput(
            f"two models or more must be both scored and deployed. Both: {_named(common)}."
            f" Only scored: {_named(found.only_scored)}. Only deployed: {_named(found.only_deployed)}"
        )
    return found


def read_deployed(path: Path, pool: Pool) -> tuple[Outcomes, CommonModels]:
    """The outcomes file's models that are deployed too, billed at the deployed prices.

    Raises:
        InvalidOutcomes: as `read_outcomes`.
        InvalidInput: fewer than two such models.
    """
    rows = [(where, parse_row(where, row)) for where, row in read_rows(path)]
    common = common_models({model for _, row in rows for model in row.scores}, pool)

    lines = [(where, _line(row, common.models)) for where, row in rows if row.scores.keys() & set(common.models)]
    prices = {name: pool.candidates[name].price for name in common.models}
    return outcomes_from_rows(lines, {name: price for name, price in prices.items() if price}), common


def _line(row: OutcomeRow, models: Collection[str]) -> dict[str, Any]:
    """The row with the figures of these models alone."""
    figures = {"scores": row.scores, "output_tokens": row.output_tokens}
    kept = {name: {m: value for m, value in values.items() if m in models} for name, values in figures.items()}
    return {"prompt": row.prompt, "source": row.source, **kept}


def _named(models: Collection[str]) -> str:
    return ", ".join(models) or "none"


OURS = "ours"

# Of the bootstrap.
DRAWS = 500

# (n,) weights of the test prompts, which sum to one, to the curve on prompts so weighted.
Method = Callable[[Doubles], Curve]


@dataclass(frozen=True, eq=False)
class _Test:
    """n prompts that every one of the M models has a score on; all are (n, M)."""

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
    draws: int = DRAWS,
) -> Results:
    """Route the file's prompts by the deployed profiles, among the models that both have.

    `trials` of what is returned counts draws of the bootstrap; N is the mean label weight of the profiles; nothing is
    `chosen`. A prompt that not all of the models have a score on is left out.

    Args:
        assignment: Φ of the file's prompts, on the map of the pool.

    Raises:
        InvalidInput: fewer than two common models, or no prompt that all of them have a score on.
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
        methods={name: {labels: _figures(seen[name], [draw[name] for draw in drawn])} for name in methods},
        differences={name: {labels: _difference(seen, drawn, name)} for name in methods if name != OURS},
        chosen={},
        chosen_differences={},
        heat_map=_heat_map(pool, common.models, rows),
    )


def _test(outcomes: Outcomes, pool: Pool, assignment: Assignment, models: Sequence[str]) -> _Test:
    """Billed as a whole file, then rows: and expected as it is billed, by the prompt alone without known lengths."""
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
        "cheapest": lambda weights: single.cheapest(mean_cents, *truth(weights)),
        "best_single": lambda weights: single.best_single(mean_errors, mean_cents, *truth(weights)),
        "random_mix": lambda weights: single.random_mix(mean_errors, mean_cents, *truth(weights)),
        OURS: _routed(test, test.expected_errors, test.expected_cents),
        "oracle": _routed(test, 1.0 - test.scores, test.cents),
    }


def _routed(test: _Test, errors: Doubles, cents: Doubles) -> Method:
    """By the served rule at many λ, which are those of all prompts, however these are weighted."""
    choices = [
        argmin_rows_with_ties(errors + weight * cents, cents, TIE_TOLERANCE) for weight in cost_weights(errors, cents)
    ]
    chosen: Indices = np.array([*choices, cents.argmin(axis=1)])
    prompts = np.arange(len(test.scores))
    costs, qualities = test.cents[prompts, chosen], test.scores[prompts, chosen]
    return lambda weights: Curve(costs @ weights, qualities @ weights)


def _measured(methods: Mapping[str, Method], test: _Test, weights: Doubles) -> dict[str, Measured]:
    anchors = Baselines.from_models(weights @ test.cents, weights @ test.scores)
    return {name: measured(method(weights), anchors) for name, method in methods.items()}


def _bootstrap(prompts: int, draws: int, seed: int) -> Iterator[Doubles]:
    """(n,) weights of the prompts, drawn with replacement."""
    rng, even = np.random.default_rng(seed), np.full(prompts, 1.0 / prompts)
    return (rng.multinomial(prompts, even) / prompts for _ in range(draws))


def _figures(seen: Measured, draws: Sequence[Measured]) -> MethodMetrics:
    def estimate(name: str) -> Estimate:
        values = np.array([getattr(draw.figures, name) for draw in draws])
        return Estimate(getattr(seen.figures, name), *percentile_interval(values), int((~np.isnan(values)).sum()))

    return method_figures(estimate, draws, Curve(seen.budgets, seen.qualities))


def _difference(seen: Mapping[str, Measured], draws: Sequence[Mapping[str, Measured]], other: str) -> Difference:
    def gap(drawn: Mapping[str, Measured]) -> float:
        return drawn[OURS].figures.area - drawn[other].figures.area

    return Difference(gap(seen), *percentile_interval(np.array([gap(draw) for draw in draws])))


def _heat_map(pool: Pool, models: Sequence[str], rows: Indices) -> HeatMap:
    profiles = [pool.candidates[name].profile for name in models]
    labels = np.array([profile.labels for profile in profiles if profile])
    return HeatMap(tuple(models), pool.cluster_names, pool.errors[rows], labels)
