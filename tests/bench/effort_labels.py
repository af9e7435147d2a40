"""Compare what efforts cost to measure: `python -m tests.bench.effort_labels [OUTCOMES.jsonl.gz PRICES.json]`.

Three efforts of a model are measured beside two other models, by the built-in map and the deployed estimator: each on
60 prompts by itself, as three models are, or on 30, with a prior by which neighbouring efforts are alike. Of the
estimates are told the root mean squared error of a prompt's expected error, that of the difference between
neighbouring efforts, and what the choice among the three by them loses, in the sum of error and cost that routing
minimizes. All are means over trials, with 95 % intervals of the mean; `less` is the paired difference from efforts that
are measured by themselves on all 60 prompts.

Efforts are made up: a prompt is hard or easy for all of them, the model is good or bad at a cluster, and each step of
effort helps by an amount of its own in each cluster, in log odds. With files, models of one family stand in for efforts
of one model, the weakest first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proxy.profiling.runner import is_asked, turns_of
from router_core.embedding import static_embedder
from router_core.estimators import POOLED, Efforts
from router_core.profiles import measure
from router_core.types import Assignment, Doubles, Indices
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.validation_set import choose_prompts
from tests.bench.error_bounds import MAP, outcomes_of
from tests.conftest import CACHE

TRIALS, PROMPTS, TESTED = 200, 60, 1000

# Chosen in all, of which the first are asked; the others by the last plan but one alone.
CHOSEN = 90

# Trials with smaller seeds have chosen the constants of the prior.
FIRST_SEED = 1000

# Rows of the models: three efforts, ascending, then two others.
EFFORTS: Efforts = ((0, 1, 2),)
STAND_INS = ("llama-3.1-8b-instruct", "llama-3.1-nemotron-51b-instruct", "llama-3.3-nemotron-super-49b-v1")
OTHERS = ("gemma-2-9b-it", "qwen2.5-7b-instruct")

# Costs of the efforts, times λ, in units of one error: thinking twice as long costs twice as much.
COSTS = np.array([0.02, 0.04, 0.08])


@dataclass(frozen=True)
class Prompts:
    assignment: Assignment
    weights: Doubles
    """(n, K)"""
    families: list[str]


@dataclass(frozen=True)
class Plan:
    """Which of the chosen prompts each effort is asked, and whether efforts are estimated together."""

    name: str
    joint: bool
    asked: tuple[tuple[int, ...], ...] | str
    """Their places among those that are chosen."""


WHOLE, HALF = tuple(range(PROMPTS)), tuple(range(0, PROMPTS, 2))
DEALT = "as jobs deal prompts out"
OWN = tuple(tuple(range(effort, CHOSEN, 3)) for effort in range(3))

PLANS = (
    Plan("each by itself, 60 prompts", joint=False, asked=(WHOLE,) * 3),
    Plan("each by itself, the same 30 prompts", joint=False, asked=(HALF,) * 3),
    Plan("together, the same 30 prompts", joint=True, asked=(HALF,) * 3),
    Plan("together, 30 of 60 prompts each (what jobs do)", joint=True, asked=DEALT),
    Plan("together, 30 prompts of its own each", joint=True, asked=OWN),
    Plan("together, 60 prompts", joint=True, asked=(WHOLE,) * 3),
)


def placed(texts: list[str], families: list[str]) -> Prompts:
    assignment = MAP.assign(static_embedder(CACHE).embed(texts))
    return Prompts(assignment, assignment.dense(MAP.size), families)


def made_up_errors(rng: np.random.Generator, weights: Doubles) -> Doubles:
    """Return the (n, 5) probabilities of errors of three efforts and of two other models."""
    prompts, clusters = weights.shape
    hardness = weights @ rng.normal(0.0, 1.0, clusters) + rng.normal(0.0, 1.0, prompts)
    own = rng.normal(0.0, 0.6, clusters)
    gains = np.maximum(rng.normal(0.6, 0.6, clusters), 0.0)
    steps = (0.0, 1.0, 1.0 + rng.uniform(0.0, 1.2))  # the second step may help less than the first, or as much
    odds = [hardness + weights @ (own - step * gains + rng.normal(0.0, 0.2, clusters)) for step in steps]
    odds += [hardness + weights @ rng.normal(ability, 0.6, clusters) for ability in (-0.7, 0.3)]
    return np.asarray(1.0 / (1.0 + np.exp(0.5 - np.array(odds).T)))


def rates_of(plan: Plan, prompts: Prompts, chosen: Indices, scores: Doubles) -> Doubles:
    """Return the (3, K) rates of the efforts. `scores`: (n, 5)."""
    turns = turns_of(prompts.families[row] for row in chosen[:PROMPTS])
    dealt = tuple(tuple(place for place in WHOLE if is_asked(effort, turns[place], 3)) for effort in range(3))
    asked_of = dealt if isinstance(plan.asked, str) else plan.asked
    profiles = []
    for model in range(scores.shape[1]):
        rows = chosen[list(asked_of[model] if model < len(asked_of) else WHOLE)]
        asked = Assignment(prompts.assignment.ids[rows], prompts.assignment.weights[rows])
        nothing = np.full(len(rows), np.nan)
        profiles.append(measure(MAP.id, MAP.size, asked, scores[rows, model], output_tokens=nothing, seconds=nothing))
    sums, labels = (np.array([getattr(each, name) for each in profiles]) for name in ("error_sums", "labels"))
    return POOLED.rates(sums, labels, MAP, EFFORTS if plan.joint else ())[:3]


def trial(seed: int, prompts: Prompts, outcomes: Doubles | None) -> Doubles:
    """Return (plans, 3): the errors of the estimates, of their differences, and what the choice loses."""
    rng = np.random.default_rng(seed)
    errors = made_up_errors(rng, prompts.weights) if outcomes is None else outcomes
    drawn = rng.random(errors.shape) < errors
    scores: Doubles = 1.0 - (drawn.astype(np.float64) if outcomes is None else errors)
    chosen = choose_prompts(prompts.assignment, CHOSEN, families=prompts.families, seed=seed)
    tested = rng.permutation(np.setdiff1d(np.arange(len(errors)), chosen))[:TESTED]
    weights = prompts.weights
    truth = weights[tested] @ (weights.T @ errors[:, :3] / np.maximum(weights.sum(axis=0), 1e-9)[:, None])
    found = []
    for plan in PLANS:
        expected = weights[tested] @ rates_of(plan, prompts, chosen, scores).T
        wrong = expected - truth
        best, picked = np.argmin(truth + COSTS, axis=1), np.argmin(expected + COSTS, axis=1)
        row = np.arange(len(tested))
        lost = ((truth + COSTS)[row, picked] - (truth + COSTS)[row, best]).mean()
        found.append([np.sqrt((wrong**2).mean()), np.sqrt((np.diff(wrong, axis=1) ** 2).mean()), lost])
    return np.array(found)


def mean_and_half(values: Doubles) -> str:
    return f"{values.mean():.4f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.4f}"


def main(arguments: list[str]) -> None:
    outcomes = None
    if arguments:
        texts, errors, _ = outcomes_of(Path(arguments[0]), Path(arguments[1]), (*STAND_INS, *OTHERS))
        prompts, outcomes = placed(texts, ["one"] * len(texts)), errors
    else:
        drawn = builtin_validation_set()
        prompts = placed([prompt.text for prompt in drawn], list(drawn.families))
    found = np.array([trial(seed, prompts, outcomes) for seed in range(FIRST_SEED, FIRST_SEED + TRIALS)])
    for number, plan in enumerate(PLANS):
        sys.stdout.write(f"{plan.name}\n")
        for place, name in enumerate(("expected error, RMSE", "difference, RMSE", "lost by the choice")):
            values = found[:, number, place]
            less = mean_and_half(found[:, 0, place] - values)
            sys.stdout.write(f"  {name}: {mean_and_half(values)}; less: {less}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
