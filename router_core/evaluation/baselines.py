from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from router_core.evaluation.curves import Curve
from router_core.evaluation.trials import History, LabelledSample, PromptEstimator
from router_core.types import Doubles, Floats, Indices


def cheapest(expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Always the model expected to be cheapest. All arguments are (M,) means; `costs` and `qualities` are the truth."""
    row = int(np.argmin(expected_cents))
    return Curve(costs[[row]], qualities[[row]])


def best_single(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Always the model expected to be best; below its cost always the cheapest, with nothing in between."""
    best, cheap = int(np.argmin(expected_errors)), int(np.argmin(expected_cents))
    return Curve(costs[[best, best, cheap]], qualities[[best, cheap, cheap]])


def random_mix(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Lots drawn between the models on the hull of expected cost and quality (ZeroRouter in the paper)."""
    order = hull(expected_cents, 1.0 - expected_errors)
    return Curve(costs[order], qualities[order])


def hull(costs: Doubles, qualities: Doubles) -> Indices:
    """Rows of the upper left hull of (M,) points, dear to cheap: every other one has a mixture that is better."""
    kept: list[int] = []
    for row in np.lexsort((-qualities, costs)):
        if kept and qualities[row] <= qualities[kept[-1]]:
            continue
        while len(kept) > 1 and not _above(kept[-2], kept[-1], int(row), costs, qualities):
            kept.pop()
        kept.append(int(row))
    return np.array(kept[::-1], dtype=np.int64)


def _above(left: int, middle: int, right: int, costs: Doubles, qualities: Doubles) -> bool:
    """Whether the middle one of three rows lies above the line through the other two."""
    span, rise = costs[right] - costs[left], qualities[right] - qualities[left]
    return bool((qualities[middle] - qualities[left]) * span > rise * (costs[middle] - costs[left]))


NEIGHBOURS = (5, 10, 20, 40, 80)

# Labels that the model's mean counts as: of 0.5, 2, 5 and 10 the best at 100 and 400 labels of llmrouter9.
SMOOTHING = 5.0


def knn(known: History) -> PromptEstimator:
    """k is chosen on the known models; with none, on the asked prompts, each left out once."""

    def estimate(k: int, asked: LabelledSample, vectors: Floats) -> Doubles:
        return neighbour_means(vectors @ known.vectors[asked.rows].T, asked, k)

    tuned = Tuned(known, NEIGHBOURS, estimate, 0)

    def estimator(asked: LabelledSample, vectors: Floats) -> Doubles:
        k = tuned.choice(len(asked.rows)) or best_neighbour_count(known.vectors[asked.rows], asked)
        return estimate(k, asked, vectors)

    return estimator


def neighbour_means(cosines: Floats, asked: LabelledSample, k: int) -> Doubles:
    """(t, M) means over the k labelled prompts of the largest (t, N) cosines, leaning on the model's mean.

    A cosine of -inf is no neighbour, and not in the mean either.
    """
    expected = np.full((len(cosines), asked.scores.shape[1]), 0.5)
    for rows, models in labelled_alike(asked):
        errors, likeness = 1.0 - asked.scores[np.ix_(rows, models)], cosines[:, rows]
        others = np.isfinite(likeness)
        overall = (others @ errors + 0.5) / (others.sum(axis=1, keepdims=True) + 1.0)
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :k]
        counted = np.take_along_axis(others, nearest, axis=1)
        total = np.einsum("tk,tkm->tm", counted, errors[nearest])
        expected[:, models] = (total + SMOOTHING * overall) / (counted.sum(axis=1, keepdims=True) + SMOOTHING)
    return expected


def best_neighbour_count(vectors: Floats, asked: LabelledSample) -> int:
    """The k with the least squared error on each asked prompt, told by the others."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    losses = [squared_error(neighbour_means(cosines, asked, k), 1.0 - asked.scores) for k in NEIGHBOURS]
    return NEIGHBOURS[int(np.argmin(losses))]


STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)

UNTUNED = 0.0


def ridge(known: History) -> PromptEstimator:
    """The penalty is chosen on the known models; with none, on the asked prompts, each left out once."""

    def estimate(strength: float, asked: LabelledSample, vectors: Floats) -> Doubles:
        return linear_errors(known.vectors[asked.rows].astype(np.float64), asked, vectors, strength)

    tuned = Tuned(known, STRENGTHS, estimate, UNTUNED)

    def estimator(asked: LabelledSample, vectors: Floats) -> Doubles:
        strength = tuned.choice(len(asked.rows)) or best_strength(known.vectors[asked.rows].astype(np.float64), asked)
        return estimate(strength, asked, vectors)

    return estimator


def linear_errors(seen: Doubles, asked: LabelledSample, vectors: Floats, strength: float) -> Doubles:
    """(t, M) errors expected of (t, d) vectors, from the (N, d) that were asked; models of the same labels at once."""
    expected = np.tile(means(asked), (len(vectors), 1))
    for rows, models in labelled_alike(asked):
        errors = 1.0 - asked.scores[np.ix_(rows, models)]
        expected[:, models] += _slopes(seen[rows], errors - errors.mean(axis=0), vectors, strength)
    return np.asarray(np.clip(expected, 0.0, 1.0))


def _slopes(seen: Doubles, errors: Doubles, vectors: Floats, strength: float) -> Doubles:
    """(t, m) how far errors are expected from their means; solved among the N prompts or the d dimensions."""
    middle = seen.mean(axis=0)
    centred = seen - middle
    count, dimension = centred.shape
    if count < dimension:
        weights = centred.T @ np.linalg.solve(centred @ centred.T + strength * np.eye(count), errors)
    else:
        weights = np.linalg.solve(centred.T @ centred + strength * np.eye(dimension), centred.T @ errors)
    return np.asarray((vectors - middle) @ weights)


def best_strength(seen: Doubles, asked: LabelledSample) -> float:
    """The strength with the least squared error on each asked prompt, told by the others."""
    losses = np.zeros(len(STRENGTHS))
    for rows, models in labelled_alike(asked):
        if rows.size > 1:
            losses += left_out_losses(seen[rows], 1.0 - asked.scores[np.ix_(rows, models)])
    return STRENGTHS[int(np.argmin(losses))]


def left_out_losses(seen: Doubles, errors: Doubles) -> Doubles:
    """(STRENGTHS,) squared errors of (n, m) labels, each left out once: PRESS (Allen 1974), which fits but once."""
    x, y = seen - seen.mean(axis=0), errors - errors.mean(axis=0)
    basis, singular, _ = np.linalg.svd(x, full_matrices=False)
    losses = []
    for strength in STRENGTHS:
        kept = basis * (singular**2 / (singular**2 + strength))
        leverage = 1.0 / len(seen) + (kept * basis).sum(axis=1)
        losses.append((((y - kept @ (basis.T @ y)) / (1.0 - leverage)[:, None]) ** 2).sum())
    return np.array(losses)


DRAWS = 3

# Prompts that a draw is tested on.
HELD_OUT = 600

Choice = TypeVar("Choice")

Estimate = Callable[[Choice, LabelledSample, Floats], Doubles]


class Tuned(Generic[Choice]):
    """The choice with the least squared error on the known models, found once for each number of labels."""

    def __init__(self, known: History, choices: Sequence[Choice], estimate: Estimate[Choice], default: Choice) -> None:
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
        seen = LabelledSample(asked, scores[asked], np.full((labels, scores.shape[1]), np.nan))
        truth = 1.0 - scores[tested]
        vectors = self._known.vectors[tested]
        return [squared_error(self._estimate(choice, seen, vectors), truth) for choice in self._choices]


def squared_error(expected: Doubles, truth: Doubles) -> float:
    """The mean over what is labelled; 0 where nothing is."""
    labelled = ~np.isnan(truth)
    return float(((expected[labelled] - truth[labelled]) ** 2).sum()) / max(int(labelled.sum()), 1)


def means(asked: LabelledSample) -> Doubles:
    """(M,) smoothed mean errors of the labels, (Σe + ½)/(n + 1): one half without any."""
    labelled = ~np.isnan(asked.scores)
    return np.asarray((np.where(labelled, 1.0 - asked.scores, 0.0).sum(axis=0) + 0.5) / (labelled.sum(axis=0) + 1.0))


def sums(weights: Doubles, asked: LabelledSample) -> tuple[Doubles, Doubles]:
    """(M, K) error sums and labels of the N asked prompts, (N, K) weights."""
    labelled = ~np.isnan(asked.scores)
    errors = np.where(labelled, 1.0 - asked.scores, 0.0)
    return np.asarray(errors.T @ weights), np.asarray(labelled.T.astype(np.float64) @ weights)


def labelled_alike(asked: LabelledSample) -> Iterator[tuple[Indices, Indices]]:
    """Asked prompts, and the models labelled on just these. Models without a label are left out."""
    labelled = ~np.isnan(asked.scores)
    for pattern in np.unique(labelled, axis=1).T:
        if pattern.any():
            yield np.flatnonzero(pattern), np.flatnonzero((labelled == pattern[:, None]).all(axis=0))
