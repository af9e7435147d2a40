"""One trial: which prompts are test, which models are new, in which order prompts are asked. Routes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.evaluation.curves import Anchors
from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.plan import Plan, tested_prompts
from router_core.evaluation.seen import Asked, Known
from router_core.pricing import CENT_USD
from router_core.types import Doubles, Floats, Indices, Price


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

    def anchors(self) -> Anchors:
        """The new models one by one."""
        return Anchors.of(self.cents.mean(axis=0), self.scores.mean(axis=0))


@dataclass(frozen=True, eq=False)
class Trial:
    known: Known
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

    def asked(self, rows: Indices) -> Asked:
        """What the new models answered to these of the known prompts."""
        return Asked(rows, self.scores[rows], self.output_tokens[rows])


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
        known=Known(
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
