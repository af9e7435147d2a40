from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from router_core.evaluation.curves import Curve
from router_core.evaluation.trials import History, LabelledSample, PromptEstimator
from router_core.types import Doubles, Floats, Indices


def cheapest(expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Send all prompts to the model expected to be cheapest.

    All arguments are (M,) means; `costs` and `qualities` are the true ones.
    """
    row = int(np.argmin(expected_cents))
    return Curve(costs[[row]], qualities[[row]])


def best_single(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Send all prompts to the model expected to be best; below its cost all to the cheapest, with nothing between."""
    best, cheap = int(np.argmin(expected_errors)), int(np.argmin(expected_cents))
    return Curve(costs[[best, best, cheap]], qualities[[best, cheap, cheap]])


def random_mix(expected_errors: Doubles, expected_cents: Doubles, costs: Doubles, qualities: Doubles) -> Curve:
    """Draw a model at random, between those on the hull of expected cost and quality (ZeroRouter in the paper)."""
    order = hull(expected_cents, 1.0 - expected_errors)
    return Curve(costs[order], qualities[order])


def hull(costs: Doubles, qualities: Doubles) -> Indices:
    """Return the rows of the upper left convex hull of (M,) points, from expensive to cheap (monotone chain).

    For every other point some mixture of two on the hull is better.
    """
    kept: list[int] = []
    for row in np.lexsort((-qualities, costs)):
        if kept and qualities[row] <= qualities[kept[-1]]:
            continue
        while len(kept) > 1 and not _above(kept[-2], kept[-1], int(row), costs, qualities):
            kept.pop()
        kept.append(int(row))
    return np.array(kept[::-1], dtype=np.int64)


def _above(left: int, middle: int, right: int, costs: Doubles, qualities: Doubles) -> bool:
    """Return whether the middle one of three rows lies above the line through the other two."""
    span, rise = costs[right] - costs[left], qualities[right] - qualities[left]
    return bool((qualities[middle] - qualities[left]) * span > rise * (costs[middle] - costs[left]))


NEIGHBOURS = (5, 10, 20, 40, 80)

# Labels that the model's mean counts as. Of 0.5, 2, 5 and 10 the best with 100 and 400 labels on a public file.
SMOOTHING = 5.0


def knn(history: History) -> PromptEstimator:
    """Expect the mean error of the k nearest labelled prompts.

    k is chosen on the known models; with none, on the labelled prompts by leaving each out once.
    """

    def estimate(k: int, sample: LabelledSample, vectors: Floats) -> Doubles:
        return neighbour_means(vectors @ history.vectors[sample.rows].T, sample, k)

    tuned = Tuned(history, NEIGHBOURS, estimate, 0)

    def estimator(sample: LabelledSample, vectors: Floats) -> Doubles:
        k = tuned.choice(len(sample.rows)) or best_neighbour_count(history.vectors[sample.rows], sample)
        return estimate(k, sample, vectors)

    return estimator


def neighbour_means(cosines: Floats, sample: LabelledSample, k: int) -> Doubles:
    """Return (t, M) mean errors over the k labelled prompts of the largest (t, N) cosines, shrunk to the model's mean.

    A prompt with a cosine of -inf is neither a neighbour nor part of the mean.
    """
    expected = np.full((len(cosines), sample.scores.shape[1]), 0.5)
    for rows, models in labelled_alike(sample):
        errors, similarity = 1.0 - sample.scores[np.ix_(rows, models)], cosines[:, rows]
        others = np.isfinite(similarity)
        overall = (others @ errors + 0.5) / (others.sum(axis=1, keepdims=True) + 1.0)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        counted = np.take_along_axis(others, nearest, axis=1)
        total = np.einsum("tk,tkm->tm", counted, errors[nearest])
        expected[:, models] = (total + SMOOTHING * overall) / (counted.sum(axis=1, keepdims=True) + SMOOTHING)
    return expected


def best_neighbour_count(vectors: Floats, sample: LabelledSample) -> int:
    """Return the k with the least squared error on each labelled prompt, estimated from the others."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    losses = [squared_error(neighbour_means(cosines, sample, k), 1.0 - sample.scores) for k in NEIGHBOURS]
    return NEIGHBOURS[int(np.argmin(losses))]


# Ridge penalties tried.
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)

# In place of a penalty where no known model can tell.
UNTUNED = 0.0


def ridge(history: History) -> PromptEstimator:
    """Expect errors by ridge regression on the embedding.

    The penalty is chosen on the known models; with none, on the labelled prompts by leaving each out once.
    """

    def estimate(strength: float, sample: LabelledSample, vectors: Floats) -> Doubles:
        return linear_errors(history.vectors[sample.rows].astype(np.float64), sample, vectors, strength)

    tuned = Tuned(history, STRENGTHS, estimate, UNTUNED)

    def estimator(sample: LabelledSample, vectors: Floats) -> Doubles:
        seen = history.vectors[sample.rows].astype(np.float64)
        strength = tuned.choice(len(sample.rows)) or best_strength(seen, sample)
        return estimate(strength, sample, vectors)

    return estimator


def linear_errors(seen: Doubles, sample: LabelledSample, vectors: Floats, strength: float) -> Doubles:
    """Return the (t, M) errors expected of (t, d) `vectors`, fitted to the (N, d) labelled ones.

    Models with the same labelled prompts are solved at once.
    """
    expected = np.tile(means(sample), (len(vectors), 1))
    for rows, models in labelled_alike(sample):
        errors = 1.0 - sample.scores[np.ix_(rows, models)]
        expected[:, models] += _slopes(seen[rows], errors - errors.mean(axis=0), vectors, strength)
    return np.asarray(np.clip(expected, 0.0, 1.0))


def _slopes(seen: Doubles, errors: Doubles, vectors: Floats, strength: float) -> Doubles:
    """Return (t, m) how far errors are expected from their means.

    The equations are solved in N or in d dimensions, whichever is smaller.
    """
    mean = seen.mean(axis=0)
    centred = seen - mean
    count, dimension = centred.shape
    if count < dimension:
        weights = centred.T @ np.linalg.solve(centred @ centred.T + strength * np.eye(count), errors)
    else:
        weights = np.linalg.solve(centred.T @ centred + strength * np.eye(dimension), centred.T @ errors)
    return np.asarray((vectors - mean) @ weights)


def best_strength(seen: Doubles, sample: LabelledSample) -> float:
    """Return the penalty with the least squared error on each labelled prompt, estimated from the others."""
    losses = np.zeros(len(STRENGTHS))
    for rows, models in labelled_alike(sample):
        if rows.size > 1:
            losses += left_out_losses(seen[rows], 1.0 - sample.scores[np.ix_(rows, models)])
    return STRENGTHS[int(np.argmin(losses))]


def left_out_losses(seen: Doubles, errors: Doubles) -> Doubles:
    """Return the squared error at each of STRENGTHS over (n, m) labels, each left out once.

    This is PRESS (Allen 1974), which needs one fit in place of n.
    """
    x, y = seen - seen.mean(axis=0), errors - errors.mean(axis=0)
    basis, singular, _ = np.linalg.svd(x, full_matrices=False)
    losses = []
    for strength in STRENGTHS:
        kept = basis * (singular**2 / (singular**2 + strength))
        leverage = 1.0 / len(seen) + (kept * basis).sum(axis=1)
        losses.append((((y - kept @ (basis.T @ y)) / (1.0 - leverage)[:, None]) ** 2).sum())
    return np.array(losses)


# Random samples of labelled prompts that a choice is made on.
TUNING_DRAWS = 3

# Prompts that each of them is tested on.
MAX_TESTED = 600

Choice = TypeVar("Choice")

Estimate = Callable[[Choice, LabelledSample, Floats], Doubles]


class Tuned(Generic[Choice]):
    """Choose a parameter by the least squared error on the known models, once for each number of labels."""

    def __init__(
        self, history: History, choices: Sequence[Choice], estimate: Estimate[Choice], default: Choice
    ) -> None:
        self._history = history
        self._choices = choices
        self._estimate = estimate
        self._default = default
        self._found: dict[int, Choice] = {}

    def choice(self, labels: int) -> Choice:
        """Return the best choice; the default if there is nothing to test on or all choices are equally good."""
        if not self._history.models or labels >= len(self._history.vectors):
            return self._default
        if labels not in self._found:
            rng = np.random.default_rng((self._history.seed, labels))
            losses = np.sum(
                [self._losses(rng.permutation(len(self._history.vectors)), labels) for _ in range(TUNING_DRAWS)], axis=0
            )
            self._found[labels] = self._choices[int(np.argmin(losses))] if np.ptp(losses) > 0 else self._default
        return self._found[labels]

    def _losses(self, order: Indices, labels: int) -> list[float]:
        labelled, tested = order[:labels], order[labels : labels + MAX_TESTED]
        scores = self._history.scores
        sample = LabelledSample(labelled, scores[labelled], np.full((labels, scores.shape[1]), np.nan))
        truth = 1.0 - scores[tested]
        vectors = self._history.vectors[tested]
        return [squared_error(self._estimate(choice, sample, vectors), truth) for choice in self._choices]


def squared_error(expected: Doubles, truth: Doubles) -> float:
    """Return the mean squared error over what is labelled; 0 if nothing is."""
    labelled = ~np.isnan(truth)
    return float(((expected[labelled] - truth[labelled]) ** 2).sum()) / max(int(labelled.sum()), 1)


def means(sample: LabelledSample) -> Doubles:
    """Return (M,) smoothed mean errors (Σe + ½)/(n + 1), one half without any label."""
    labelled = ~np.isnan(sample.scores)
    return np.asarray((np.where(labelled, 1.0 - sample.scores, 0.0).sum(axis=0) + 0.5) / (labelled.sum(axis=0) + 1.0))


def sums(weights: Doubles, sample: LabelledSample) -> tuple[Doubles, Doubles]:
    """Return (M, K) error sums and labels of the N labelled prompts with (N, K) cluster weights."""
    labelled = ~np.isnan(sample.scores)
    errors = np.where(labelled, 1.0 - sample.scores, 0.0)
    return np.asarray(errors.T @ weights), np.asarray(labelled.T.astype(np.float64) @ weights)


def labelled_alike(sample: LabelledSample) -> Iterator[tuple[Indices, Indices]]:
    """Yield sets of labelled prompts, and the models labelled on just these. Models without labels are left out."""
    labelled = ~np.isnan(sample.scores)
    for pattern in np.unique(labelled, axis=1).T:
        if pattern.any():
            yield np.flatnonzero(pattern), np.flatnonzero((labelled == pattern[:, None]).all(axis=0))
