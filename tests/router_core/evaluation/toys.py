"""Outcomes whose best routing is plain: each model is right on one kind of prompt and wrong on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.trials import History, LabelledSample, Plan, Trial, draw_trial
from router_core.types import Doubles, Floats, Price

CHEAP, EXPENSIVE = Price(1e-6, 0.0), Price(4e-6, 0.0)
# Model → the kind that it is right about, and its price.
TWO: Mapping[str, tuple[str, Price]] = {"left": ("a", CHEAP), "right": ("b", EXPENSIVE)}
SIX: Mapping[str, tuple[str, Price]] = {f"{kind}{number}": TWO[kind] for number in range(3) for kind in TWO}


def kinds_of(prompts: int) -> list[str]:
    """Return kinds. Two of three are "b", the expensive model's: so the best single model is not the cheapest."""
    return ["a" if number % 3 == 0 else "b" for number in range(prompts)]


def two_kinds(prompts: int = 90, models: Mapping[str, tuple[str, Price]] = TWO) -> Outcomes:
    """Return prompts of ten tokens each, without lengths of answers."""
    kinds = kinds_of(prompts)
    names = tuple(sorted(models))
    return Outcomes(
        prompts=tuple(f"{kind} {number}" for number, kind in enumerate(kinds)),
        models=names,
        scores=np.array([[float(models[name][0] == kind) for name in names] for kind in kinds]),
        prompt_tokens=np.full(prompts, 10.0),
        output_tokens=np.full((prompts, len(names)), np.nan),
        prices=tuple(models[name][1] for name in names),
        sources=("",) * prompts,
    )


def vectors_of(outcomes: Outcomes, *, noise: float = 0.05) -> Floats:
    """Draw (n, 8) unit vectors: "a" about the first axis, "b" about the second."""
    vectors = np.random.default_rng(0).normal(0.0, noise, (len(outcomes.prompts), 8))
    vectors[np.arange(len(vectors)), ["ab".index(prompt[0]) for prompt in outcomes.prompts]] += 1.0
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def a_plan(*, labels: tuple[int, ...] = (20, 40), trials: int = 2, seed: int = 0, unseen: float = 0.0) -> Plan:
    return Plan("toy.jsonl", "toy", labels=labels, trials=trials, seed=seed, unseen=unseen)


def trials_of(outcomes: Outcomes, plan: Plan) -> list[Trial]:
    return [draw_trial(outcomes, vectors_of(outcomes), plan, number) for number in range(plan.trials)]


def a_known(vectors: Floats, scores: Doubles | None = None) -> History:
    """Return prompts of which no model is known, unless there are (n, R) `scores`."""
    texts = [f"prompt {number}" for number in range(len(vectors))]
    scores = np.empty((len(vectors), 0)) if scores is None else scores
    return History(texts, vectors, scores, tuple(f"known {number}" for number in range(scores.shape[1])), "toy", 0)


def a_sample(rows: Sequence[int], scores: Sequence[Sequence[float]], tokens: float = np.nan) -> LabelledSample:
    """Build a labelled sample. `scores`: of each row, by each model."""
    table = np.array(scores, dtype=np.float64)
    return LabelledSample(np.array(rows, dtype=np.int64), table, np.full(table.shape, tokens))
