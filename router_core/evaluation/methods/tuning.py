"""Choosing a method's constant on the known models: each is asked as little as the new ones, and tested on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from router_core.evaluation.seen import Asked, Known
from router_core.types import Doubles, Floats, Indices

DRAWS = 3
HELD_OUT = 600
"""Prompts that a draw is tested on."""

Choice = TypeVar("Choice")
Estimate = Callable[[Choice, Asked, Floats], Doubles]


class Tuned(Generic[Choice]):
    """The choice with the least squared error on the known models, found once for each number of labels."""

    def __init__(self, known: Known, choices: Sequence[Choice], estimate: Estimate[Choice], default: Choice) -> None:
        self._known = known
        self._choices = choices
        self._estimate = estimate
        self._default = default
        self._found: dict[int, Choice] = {}

    def choice(self, labels: int) -> Choice:
        """With nothing to test on, or no difference between the choices: the default."""
        if not self._known.models or labels >= len(self._known.vectors):
            return self._default
        if labels not in self._found:
            rng = np.random.default_rng((self._known.seed, labels))
            losses = np.sum(
                [self._losses(rng.permutation(len(self._known.vectors)), labels) for _ in range(DRAWS)], axis=0
            )
            self._found[labels] = self._choices[int(np.argmin(losses))] if np.ptp(losses) > 0 else self._default
        return self._found[labels]

    def _losses(self, order: Indices, labels: int) -> list[float]:
        asked, tested = order[:labels], order[labels : labels + HELD_OUT]
        scores = self._known.scores
        seen = Asked(asked, scores[asked], np.full((labels, scores.shape[1]), np.nan))
        truth = 1.0 - scores[tested]
        vectors = self._known.vectors[tested]
        return [squared_error(self._estimate(choice, seen, vectors), truth) for choice in self._choices]


def squared_error(expected: Doubles, truth: Doubles) -> float:
    """The mean over what is labelled; 0 where nothing is."""
    labelled = ~np.isnan(truth)
    return float(((expected[labelled] - truth[labelled]) ** 2).sum()) / max(int(labelled.sum()), 1)


def means(asked: Asked) -> Doubles:
    """(M,) smoothed mean errors of the labels, (Σe + ½)/(n + 1): one half without any."""
    labelled = ~np.isnan(asked.scores)
    return np.asarray((np.where(labelled, 1.0 - asked.scores, 0.0).sum(axis=0) + 0.5) / (labelled.sum(axis=0) + 1.0))


def sums(weights: Doubles, asked: Asked) -> tuple[Doubles, Doubles]:
    """(M, K) error sums and labels of the N asked prompts, (N, K) weights."""
    labelled = ~np.isnan(asked.scores)
    errors = np.where(labelled, 1.0 - asked.scores, 0.0)
    return np.asarray(errors.T @ weights), np.asarray(labelled.T.astype(np.float64) @ weights)


def labelled_alike(asked: Asked) -> Iterator[tuple[Indices, Indices]]:
    """Asked prompts, and the models labelled on just these. Models without a label are left out."""
    labelled = ~np.isnan(asked.scores)
    for pattern in np.unique(labelled, axis=1).T:
        if pattern.any():
            yield np.flatnonzero(pattern), np.flatnonzero((labelled == pattern[:, None]).all(axis=0))
