from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from router_core.decision import argmin_rows_with_ties
from router_core.errors import InvalidInput
from router_core.evaluation.curves import Baselines, Curve
from router_core.evaluation.outcomes import Outcomes
from router_core.pricing import CENT_USD
from router_core.scoring import TIE_TOLERANCE
from router_core.text import truncate_middle
from router_core.types import Doubles, Floats, Indices, Price


@dataclass(frozen=True, eq=False)
class History:
    """The train prompts of one trial, and what the known models scored on them."""

    texts: Sequence[str]
    """n prompts."""
    vectors: Floats
    """(n, d), rows of unit length, or zero where a text has no token."""
    scores: Doubles
    """(n, R) in [0, 1], NaN where unlabelled; R is 0 where no model is known."""
    models: tuple[str, ...]
    """R names."""
    embedder_id: str
    seed: int


@dataclass(frozen=True, eq=False)
class LabelledSample:
    """The N train prompts that every new model was asked, and their scores."""

    rows: Indices
    """(N,) rows of the train prompts."""
    scores: Doubles
    """(N, M) in [0, 1], NaN where unlabelled."""
    output_tokens: Doubles
    """(N, M) NaN where not measured."""


# M new models' labelled sample and (t, d) vectors of other prompts → (t, M) expected errors.
PromptEstimator = Callable[[LabelledSample, Floats], Doubles]

# Learns from the known models once per trial; its estimator is then used for each number of labels.
Method = Callable[[History], PromptEstimator]

TEST_SHARE = 0.3

DEFAULT_LABELS = (25, 50, 100, 200, 400)

DEFAULT_TRIALS = 200

DEFAULT_UNSEEN = 1 / 3


@dataclass(frozen=True, slots=True)
class Plan:
    """UniRoute's protocol (arXiv 2502.08773, section 6): some models are new, and known by a few answers only."""

    outcomes_name: str
    embedder_id: str
    labels: tuple[int, ...] = DEFAULT_LABELS
    """N, ascending: how many of the train prompts the new models are asked."""
    trials: int = DEFAULT_TRIALS
    seed: int = 0
    unseen: float = DEFAULT_UNSEEN
    """The share of the models that is new; 0: all are, and none is known."""

    def __post_init__(self) -> None:
        if not self.labels or min(self.labels) < 1 or list(self.labels) != sorted(set(self.labels)):
            raise InvalidInput(f"labels must be ascending whole numbers, 1 or more; got {self.labels}")
        if self.trials < 1:
            raise InvalidInput(f"trials must be 1 or more; got {self.trials}")
        if not 0 <= self.unseen <= 1:
            raise InvalidInput(f"unseen must be from 0 to 1; got {self.unseen}")

    def new_models(self, models: int) -> int:
        """Return how many of so many models are new in a trial."""
        return count_new_models(self.unseen, models)

    def check(self, outcomes: Outcomes) -> None:
        """Raise InvalidInput if there are too few models or prompts for the plan."""
        models, new = len(outcomes.models), self.new_models(len(outcomes.models))
        if new < 2:
            raise InvalidInput(
                f"unseen={self.unseen:g} of {models} models leaves {new} new one, and routing needs two to choose from:"
                " give --unseen 0, where all are new, or a larger share"
            )
        prompts = len(outcomes.prompts)
        train = prompts - count_test_prompts(prompts)
        if self.labels[-1] > train:
            raise InvalidInput(
                f"{self.labels[-1]} labels are more than the {train} prompts that are left to train on, of {prompts}"
                " that differ: give smaller --labels, or more prompts"
            )


def count_new_models(unseen: float, models: int) -> int:
    return models if unseen == 0 else max(1, round(unseen * models))


def default_unseen(models: int) -> float:
    """Return a third; 0 if that leaves nothing to choose from."""
    return DEFAULT_UNSEEN if count_new_models(DEFAULT_UNSEEN, models) >= 2 else 0.0


def default_labels(prompts: int) -> tuple[int, ...]:
    """Those of DEFAULT_LABELS that the train prompts suffice for, of so many in all; at least the first."""
    train = prompts - count_test_prompts(prompts)
    return tuple(labels for labels in DEFAULT_LABELS if labels <= train) or DEFAULT_LABELS[:1]


def count_test_prompts(prompts: int) -> int:
    """Return how many of so many prompts are test prompts."""
    return max(1, round(TEST_SHARE * prompts))


@dataclass(frozen=True, eq=False)
class HeldOut:
    """t prompts that every one of the M new models has a score on."""

    texts: Sequence[str]
    """t, as they are embedded."""
    vectors: Floats
    """(t, d)"""
    scores: Doubles
    """(t, M)"""
    cents: Doubles
    """(t, M) what each answer is billed."""
    prompt_tokens: Doubles
    """(t,)"""

    def baselines(self) -> Baselines:
        """Return the new models' means, which curves are compared with."""
        return Baselines.from_models(self.cents.mean(axis=0), self.scores.mean(axis=0))


@dataclass(frozen=True, eq=False)
class Trial:
    """One draw of test prompts and new models."""

    history: History
    new_models: tuple[str, ...]
    prices: tuple[Price, ...]
    """(M,) of the new models."""
    lengths_known: NDArray[np.bool_]
    """(M,) whether the file has lengths of a new model's answers; if not, only the prompt is billed."""
    test: HeldOut
    order: Indices
    """(n,) the train prompts in the random order in which they are asked: more labels add to the same first ones."""
    scores: Doubles
    """(n, M) of the new models on the train prompts."""
    output_tokens: Doubles
    """(n, M)"""

    def sample(self, rows: Indices) -> LabelledSample:
        """Return what the new models answered to these of the train prompts."""
        return LabelledSample(rows, self.scores[rows], self.output_tokens[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """Rows and columns of the outcomes, ascending."""

    test: Indices
    """The test prompts that every new model has a score on."""
    train: Indices
    new: Indices
    known: Indices
    seed: int
    """Seed of all else that is random in the trial."""
    order: Indices
    """Places in `train`, in the order in which they are asked."""


def draw_split(outcomes: Outcomes, plan: Plan, number: int) -> Split:
    """Draw the split of the plan's trial of this number, from 0."""
    rng = np.random.default_rng((plan.seed, number))
    prompts, models = rng.permutation(len(outcomes.prompts)), rng.permutation(len(outcomes.models))
    tested, count = count_test_prompts(prompts.size), plan.new_models(models.size)
    test, new = np.sort(prompts[:tested]), np.sort(models[:count])
    return Split(
        test=test[~np.isnan(outcomes.scores[np.ix_(test, new)]).any(axis=1)],
        train=np.sort(prompts[tested:]),
        new=new,
        known=np.sort(models[count:]),
        seed=int(rng.integers(2**31)),
        order=rng.permutation(prompts.size - tested),
    )


def draw_trial(outcomes: Outcomes, vectors: Floats, plan: Plan, number: int) -> Trial:
    """Draw the plan's trial of this number, from 0. `vectors`: (n, d) of all prompts."""
    cents, split = outcomes.usd() / CENT_USD, draw_split(outcomes, plan, number)
    test, train, new, known = split.test, split.train, split.new, split.known
    return Trial(
        history=History(
            texts=[truncate_middle(outcomes.prompts[row]) for row in train],
            vectors=vectors[train],
            scores=outcomes.scores[np.ix_(train, known)],
            models=tuple(outcomes.models[column] for column in known),
            embedder_id=plan.embedder_id,
            seed=split.seed,
        ),
        new_models=tuple(outcomes.models[column] for column in new),
        prices=tuple(outcomes.prices[column] for column in new),
        lengths_known=np.asarray((~np.isnan(outcomes.output_tokens[:, new])).any(axis=0)),
        test=HeldOut(
            [truncate_middle(outcomes.prompts[row]) for row in test],
            vectors[test],
            outcomes.scores[np.ix_(test, new)],
            cents[np.ix_(test, new)],
            outcomes.prompt_tokens[test],
        ),
        order=split.order,
        scores=outcomes.scores[np.ix_(train, new)],
        output_tokens=outcomes.output_tokens[np.ix_(train, new)],
    )


# Cost weights λ of a deferral curve, between 0 and infinity.
POINTS = 256


def deferral_curve(errors: Doubles, cents: Doubles, test: HeldOut) -> Curve:
    """Route the t test prompts at many λ by (t, M) expected errors and costs, and bill the true costs."""
    # Columns are few: reducing over them is faster in this order.
    errors, cents = np.asfortranarray(errors), np.asfortranarray(cents)
    choices = [
        argmin_rows_with_ties(errors + weight * cents, cents, TIE_TOLERANCE) for weight in cost_weights(errors, cents)
    ]
    return curve_of([*choices, cents.argmin(axis=1)], test)


def curve_of(choices: list[Indices], test: HeldOut) -> Curve:
    """Return a curve with one point for each (t,) choice of models."""
    rows = np.arange(len(test.scores))
    return Curve(
        costs=np.array([test.cents[rows, choice].mean() for choice in choices]),
        qualities=np.array([test.scores[rows, choice].mean() for choice in choices]),
    )


def cost_weights(errors: Doubles, cents: Doubles) -> Doubles:
    """Return 0 and quantiles of the λ at which one model overtakes another on some prompt, where choices change.

    Args:
        errors, cents: (t, M) expected of the models on t prompts.
    """
    crossings = []
    for cheap, expensive in permutations(range(errors.shape[1]), 2):
        extra_cost = cents[:, expensive] - cents[:, cheap]
        fewer_errors = errors[:, cheap] - errors[:, expensive]
        overtakes = (extra_cost > 0) & (fewer_errors > 0)
        with np.errstate(over="ignore"):  # differences next to nothing give an infinite λ, which is dropped
            crossings.append(fewer_errors[overtakes] / extra_cost[overtakes])
    lambdas = np.concatenate(crossings)
    lambdas = lambdas[np.isfinite(lambdas)]
    if not lambdas.size:
        return np.zeros(1)
    return np.concatenate(([0.0], np.quantile(lambdas, np.linspace(0.0, 1.0, POINTS))))
