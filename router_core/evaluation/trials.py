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
from router_core.types import Doubles, Floats, Indices, Price


@dataclass(frozen=True, eq=False)
class History:
    """The train prompts of one trial and what the known models scored on them."""

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
    """The N train prompts that every new model was asked."""

    rows: Indices
    """(N,) of the known prompts."""
    scores: Doubles
    """(N, M) in [0, 1], NaN where unlabelled."""
    output_tokens: Doubles
    """(N, M) NaN where not measured."""


# The answers of M new models, and (t, d) vectors of other prompts, to (t, M) expected errors.
PromptEstimator = Callable[[LabelledSample, Floats], Doubles]

# Learns from the known models once a trial; its estimator is then used for each number of labels.
Method = Callable[[History], PromptEstimator]

TEST_SHARE = 0.3

LABELS = (25, 50, 100, 200, 400)

TRIALS = 200

UNSEEN = 1 / 3


@dataclass(frozen=True, slots=True)
class Plan:
    """UniRoute's protocol (arXiv 2502.08773, section 6): some models are new, and seen through a few answers only."""

    outcomes_name: str
    embedder_id: str
    labels: tuple[int, ...] = LABELS
    """N, ascending: how many of the train prompts the new models are asked."""
    trials: int = TRIALS
    seed: int = 0
    unseen: float = UNSEEN
    """The share of the models that is new; 0: all are, and none is known."""

    def __post_init__(self) -> None:
        if not self.labels or min(self.labels) < 1 or list(self.labels) != sorted(set(self.labels)):
            raise InvalidInput(f"labels must be ascending whole numbers, 1 or more; got {self.labels}")
        if self.trials < 1:
            raise InvalidInput(f"trials must be 1 or more; got {self.trials}")
        if not 0 <= self.unseen <= 1:
            raise InvalidInput(f"unseen must be from 0 to 1; got {self.unseen}")

    def new_models(self, models: int) -> int:
        """How many of so many models are new in a trial."""
        return new_models(self.unseen, models)

    def check(self, outcomes: Outcomes) -> None:
        """Raises InvalidInput where there is too little to follow the plan."""
        models, new = len(outcomes.models), self.new_models(len(outcomes.models))
        if new < 2:
            raise InvalidInput(
                f"unseen={self.unseen:g} of {models} models leaves {new} new one, and routing needs two to choose from:"
                " give --unseen 0, where all are new, or a larger share"
            )
        prompts = len(outcomes.prompts)
        train = prompts - tested_prompts(prompts)
        if self.labels[-1] > train:
            raise InvalidInput(
                f"{self.labels[-1]} labels are more than the {train} prompts that are left to train on, of {prompts}"
                " that differ: give smaller --labels, or more prompts"
            )


def new_models(unseen: float, models: int) -> int:
    return models if unseen == 0 else max(1, round(unseen * models))


def default_unseen(models: int) -> float:
    """A third; 0 where that leaves nothing to choose from."""
    return UNSEEN if new_models(UNSEEN, models) >= 2 else 0.0


def default_labels(prompts: int) -> tuple[int, ...]:
    """Those of LABELS that the train prompts suffice for, of so many in all; at least the first."""
    train = prompts - tested_prompts(prompts)
    return tuple(labels for labels in LABELS if labels <= train) or LABELS[:1]


def tested_prompts(prompts: int) -> int:
    """How many of so many prompts are test prompts."""
    return max(1, round(TEST_SHARE * prompts))


@dataclass(frozen=True, eq=False)
class HeldOut:
    """t prompts that every one of the M new models has a score on."""

    vectors: Floats
    """(t, d)"""
    scores: Doubles
    """(t, M)"""
    cents: Doubles
    """(t, M) what each answer is billed."""
    prompt_tokens: Doubles
    """(t,)"""

    def anchors(self) -> Baselines:
        """The new models one by one."""
        return Baselines.from_models(self.cents.mean(axis=0), self.scores.mean(axis=0))


@dataclass(frozen=True, eq=False)
class Trial:
    known: History
    new_models: tuple[str, ...]
    prices: tuple[Price, ...]
    """(M,) of the new models."""
    lengths_known: NDArray[np.bool_]
    """(M,) whether the file measures how long a new model's answers are; if not, the prompt alone is billed."""
    test: HeldOut
    order: Indices
    """(n,) the known prompts by chance, as they are asked: with more labels, the same ones first."""
    scores: Doubles
    """(n, M) of the new models on the known prompts."""
    output_tokens: Doubles
    """(n, M)"""

    def asked(self, rows: Indices) -> LabelledSample:
        """What the new models answered to these of the known prompts."""
        return LabelledSample(rows, self.scores[rows], self.output_tokens[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """Rows and columns of the outcomes, ascending."""

    test: Indices
    """Only the prompts that every new model has a score on."""
    train: Indices
    new: Indices
    known: Indices
    seed: int
    """Of whatever else is drawn by chance in the trial."""
    order: Indices
    """Places in `train`, as they are asked."""


def draw_split(outcomes: Outcomes, plan: Plan, number: int) -> Split:
    """Of the plan's trial of this number, from 0."""
    rng = np.random.default_rng((plan.seed, number))
    prompts, models = rng.permutation(len(outcomes.prompts)), rng.permutation(len(outcomes.models))
    tested, count = tested_prompts(prompts.size), plan.new_models(models.size)
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
    """The plan's trial of this number, from 0. `vectors` are of the prompts, (n, d)."""
    cents, split = outcomes.usd() / CENT_USD, draw_split(outcomes, plan, number)
    test, train, new, known = split.test, split.train, split.new, split.known
    return Trial(
        known=History(
            texts=[outcomes.prompts[row] for row in train],
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
            vectors[test],
            outcomes.scores[np.ix_(test, new)],
            cents[np.ix_(test, new)],
            outcomes.prompt_tokens[test],
        ),
        order=split.order,
        scores=outcomes.scores[np.ix_(train, new)],
        output_tokens=outcomes.output_tokens[np.ix_(train, new)],
    )


# Cost weights λ between 0 and infinity.
POINTS = 256


def deferral_curve(errors: Doubles, cents: Doubles, test: HeldOut) -> Curve:
    """Route the t test prompts at many λ by (t, M) expected errors and (t, M) expected costs; bill what is true."""
    errors, cents = np.asfortranarray(errors), np.asfortranarray(cents)  # few columns: reduced faster so
    choices = [
        argmin_rows_with_ties(errors + weight * cents, cents, TIE_TOLERANCE) for weight in cost_weights(errors, cents)
    ]
    return curve_of([*choices, cents.argmin(axis=1)], test)


def curve_of(choices: list[Indices], test: HeldOut) -> Curve:
    """One point for each (t,) choice of models."""
    rows = np.arange(len(test.scores))
    return Curve(
        costs=np.array([test.cents[rows, choice].mean() for choice in choices]),
        qualities=np.array([test.scores[rows, choice].mean() for choice in choices]),
    )


def cost_weights(errors: Doubles, cents: Doubles) -> Doubles:
    """Zero, and quantiles of the λ at which one model overtakes another on some prompt: there the choices change."""
    crossings = []
    for cheap, dear in permutations(range(errors.shape[1]), 2):
        dearer_by = cents[:, dear] - cents[:, cheap]
        worth = errors[:, cheap] - errors[:, dear]
        overtaken = (dearer_by > 0) & (worth > 0)
        with np.errstate(over="ignore"):  # prices next to nothing are overtaken at no λ that can be written down
            crossings.append(worth[overtaken] / dearer_by[overtaken])
    found = np.concatenate(crossings)
    found = found[np.isfinite(found)]
    if not found.size:
        return np.zeros(1)
    return np.concatenate(([0.0], np.quantile(found, np.linspace(0.0, 1.0, POINTS))))
