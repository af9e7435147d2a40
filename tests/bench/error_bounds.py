"""Compare what a report expects with the truth: `python -m tests.bench.error_bounds OUTCOMES.jsonl.gz PRICES.json`.

Models are measured on a few prompts of an outcomes file, by the built-in map and the deployed estimator, and the other
prompts are routed: what the report says of their errors, and its bounds, stand beside the outcomes. Without files the
models are made up, of the same kind in every cluster, so that all that tells them apart there is luck.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router_core.artifact import builtin_map
from router_core.decision import Z_90, mix_deviations
from router_core.embedding import static_embedder
from router_core.estimators import POOLED, SHRINKAGE
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.kernels import argmin_with_ties
from router_core.profiles import measure
from router_core.scoring import TIE_TOLERANCE
from router_core.selection_bias import GradedPrompts, SelectionBias
from router_core.text import truncate_middle
from router_core.types import Assignment, Doubles
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.validation_set import choose_prompts
from tests.conftest import CACHE

TRIALS, TESTED, TRAINED = 40, 600, 3000

MAP = builtin_map()


@dataclass(frozen=True)
class Truth:
    assignment: Assignment
    errors: Doubles
    """(n, M) of n prompts: outcomes, or the probabilities of errors."""
    costs: Doubles
    """(M,) in units of the most expensive model."""


def made_up() -> Truth:
    prompts = [prompt for seed in (0, 7) for prompt in builtin_validation_set(seed)]
    hardness = np.random.default_rng(0).uniform(-0.1, 0.1, 100)
    families = sorted({prompt.family for prompt in prompts})
    hard = np.array([hardness[families.index(prompt.family)] for prompt in prompts])
    errors = np.clip(np.array([0.2, 0.14, 0.08]) + hard[:, None], 0.01, 0.99)
    return Truth(_placed([prompt.text for prompt in prompts]), errors, np.array([0.033, 0.13, 1.0]))


def of_files(outcomes: Path, prices: Path) -> Truth:
    texts, errors, costs = outcomes_of(outcomes, prices)
    return Truth(_placed(texts), errors, costs)


def outcomes_of(
    outcomes: Path, prices: Path, models: Sequence[str] | None = None
) -> tuple[list[str], Doubles, Doubles]:
    """Return n prompts that each of the models was asked, the (n, M) errors, and the (M,) costs. None: all models."""
    rows = [parse_row(where, line) for where, line in read_rows(outcomes)]
    models = models or sorted({name for row in rows for name in row.scores})
    rows = [row for row in rows if row.scores.keys() >= set(models)]
    listed = json.loads(prices.read_text())
    costs = np.array([listed[name]["output_cost_per_token"] for name in models])
    errors = np.array([[1.0 - row.scores[name] for name in models] for row in rows])
    return [truncate_middle(row.prompt) for row in rows], errors, costs / costs.max()


def _placed(texts: list[str]) -> Assignment:
    return MAP.assign(static_embedder(CACHE).embed(texts))


@dataclass(frozen=True)
class Trial:
    """What is expected of the routed prompts and of the best single model, and the truth."""

    plain: float
    corrected: float
    deviation: float
    truth: float
    difference: float
    difference_corrected: float
    difference_deviation: float
    difference_truth: float


def trial(truth: Truth, labels: int, lambda_: float, seed: int, *, answers_known: bool) -> Trial:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(truth.errors))
    train, test = order[: min(TRAINED, len(order) // 2)], order[-TESTED:]
    placed = Assignment(truth.assignment.ids[train], truth.assignment.weights[train])
    asked = train[choose_prompts(placed, labels, families=[""] * len(train), seed=seed)]
    scores = (rng.random(truth.errors[asked].shape) >= truth.errors[asked]).astype(float)
    models = truth.errors.shape[1]
    part = Assignment(truth.assignment.ids[asked], truth.assignment.weights[asked])
    unknown = np.full(labels, np.nan)
    profiles = {
        f"m{m:02}": measure(MAP.id, MAP.size, part, scores[:, m], output_tokens=unknown, seconds=unknown)
        for m in range(models)
    }
    sums, counts = (np.array([getattr(each, name) for each in profiles.values()]) for name in ("error_sums", "labels"))
    rates = POOLED.rates(sums, counts, MAP)
    graded = GradedPrompts(part.dense(MAP.size), {f"m{m:02}": scores[:, m] for m in range(models)})
    bias = SelectionBias(profiles, MAP, graded=graded if answers_known else None)
    best = int(np.argmin(sums.sum(axis=1)))
    routed, baseline, found = np.zeros_like(rates), np.zeros_like(rates), []
    for row in test:
        ids, weights = truth.assignment.ids[row], truth.assignment.weights[row].astype(float)
        expected = rates[:, ids] @ weights
        chosen = argmin_with_ties(expected + lambda_ * truth.costs, truth.costs, TIE_TOLERANCE)
        clusters = dict(zip(ids.tolist(), weights.tolist(), strict=True))
        more = bias.of(list(profiles), truth.costs.tolist(), lambda_, TIE_TOLERANCE, clusters) or 0.0
        routed[chosen, ids] += weights / len(test)
        baseline[best, ids] += weights / len(test)
        errors = truth.errors[row]
        found.append((expected[chosen], more, errors[chosen], expected[best], errors[best]))
    plain, more, real, other, other_real = np.array(found).mean(axis=0).tolist()
    behind = counts + SHRINKAGE
    return Trial(
        plain,
        plain + more,
        float(mix_deviations(routed, rates, behind).sum()),
        real,
        plain - other,
        plain + more - other,
        float(np.linalg.norm(mix_deviations(routed - baseline, rates, behind))),
        real - other_real,
    )


def lines(truth: Truth, trials: int, *, answers_known: bool) -> Iterator[str]:
    yield f"the graded answers are {'known' if answers_known else 'not known any more'}"
    yield "labels     λ   truth   plain corrected   bounds hold it (and it is above them): plain, corrected, difference"
    for labels in (60, 200, 800):
        for lambda_ in (0.0, 0.1, 0.5):
            columns = np.array(
                [
                    list(trial(truth, labels, lambda_, seed, answers_known=answers_known).__dict__.values())
                    for seed in range(trials)
                ]
            ).T
            plain, corrected, deviation, real, apart, apart_corrected, apart_deviation, apart_real = columns
            held = [
                _held(plain, plain, deviation, real),
                _held(plain, corrected, deviation, real),
                _held(apart, apart_corrected, apart_deviation, apart_real),
            ]
            means = f"{real.mean():7.3f} {plain.mean():7.3f} {corrected.mean():9.3f}"
            yield f"{labels:6} {lambda_:5.1f} {means}   {', '.join(held)}"


def _held(plain: Doubles, corrected: Doubles, deviation: Doubles, real: Doubles) -> str:
    low = np.minimum(plain, corrected) - Z_90 * deviation
    high = np.maximum(plain, corrected) + Z_90 * deviation
    return f"{np.mean((low <= real) & (real <= high)):.0%} ({np.mean(real > high):.0%})"


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:3]]
    truth = of_files(*files) if files else made_up()
    for known in (True, False):
        for line in lines(truth, TRIALS, answers_known=known):
            print(line, flush=True)  # noqa: T201
