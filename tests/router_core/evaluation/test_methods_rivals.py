from __future__ import annotations

import numpy as np
import pytest

from router_core.evaluation.baselines import (
    STRENGTHS,
    best_strength,
    knn,
    left_out_losses,
    linear_errors,
    neighbour_means,
    ridge,
)
from router_core.evaluation.cluster_methods import hiershrink, kmeans_raw, learned_map, nested_rates
from router_core.evaluation.trials import LabelledSample, Method
from router_core.types import Doubles, Floats
from tests.router_core.evaluation.toys import a_known, a_sample

RIVALS = (knn, ridge, hiershrink, learned_map)
NAN = float("nan")


def clumps(each: int, noise: float = 0.05) -> Floats:
    """Draw (2·each, 4) unit vectors: the first half about one axis, the second about another."""
    vectors = np.random.default_rng(0).normal(0.0, noise, (2 * each, 4))
    vectors[:each, 0] += 1.0
    vectors[each:, 1] += 1.0
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def right_on_the_first(each: int) -> Doubles:
    """Return (2·each, 1) scores."""
    return np.repeat([[1.0], [0.0]], each, axis=0)


def every_tenth(vectors: Floats, scores: Doubles) -> LabelledSample:
    rows = np.arange(0, len(vectors), 10)
    return LabelledSample(rows, scores[rows], np.full((rows.size, scores.shape[1]), np.nan))


def circle(count: int) -> Floats:
    angles = np.linspace(0.0, 2 * np.pi, count, endpoint=False)
    return np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


def test_knn_averages_five_neighbours_and_the_mean_with_the_weight_of_five_labels() -> None:
    vectors = clumps(10)
    answers = a_sample(range(20), right_on_the_first(10).tolist())
    expected = neighbour_means(vectors[[0, 19]] @ vectors.T, answers, 5)
    assert expected[:, 0].tolist() == pytest.approx([(0 + 5 * 0.5) / 10, (5 + 5 * 0.5) / 10])


def test_neighbours_without_a_label_are_replaced_by_the_next() -> None:
    cosines = np.array([[0.9, 0.8, 0.1]], dtype=np.float32)
    expected = neighbour_means(cosines, a_sample(range(3), [[NAN], [1.0], [0.0]]), 1)
    assert expected.item() == pytest.approx((0 + 5 * 0.5) / 6)


def test_a_left_out_prompt_is_neither_its_own_neighbour_nor_in_the_mean() -> None:
    cosines = np.array([[-np.inf, 0.9], [0.9, -np.inf]], dtype=np.float32)
    expected = neighbour_means(cosines, a_sample(range(2), [[1.0], [0.0]]), 5)
    assert expected[:, 0].tolist() == pytest.approx([(1 + 5 * 0.75) / 6, (0 + 5 * 0.25) / 6])


def test_known_models_decide_the_number_of_neighbours() -> None:
    vectors, scores = clumps(100), right_on_the_first(100)
    lots = np.random.default_rng(0).permuted(np.tile(scores, 9), axis=0)
    few, many = (
        knn(a_known(vectors, history))(every_tenth(vectors, scores), vectors[[5, 195]])[:, 0]
        for history in (scores, lots)
    )
    assert few[0] < 0.35
    assert few[1] > 0.65
    assert many == pytest.approx(0.5)


def test_ridge_adds_a_shrunk_slope_to_the_mean() -> None:
    seen = np.array([[1.0], [-1.0]])
    expected = linear_errors(seen, a_sample(range(2), [[0.0], [1.0]]), np.array([[1.0]], dtype=np.float32), 1.0)
    assert expected.item() == pytest.approx(0.5 + 1 / (2 + 1))


def test_ridge_is_the_same_solved_over_prompts_or_dimensions() -> None:
    seen, labels = np.array([[1.0], [-1.0], [0.6]]), a_sample(range(3), [[0.0], [1.0], [0.0]])
    padded = np.pad(seen, ((0, 0), (0, 4)))
    narrow = linear_errors(seen, labels, seen.astype(np.float32), 3.0)
    assert linear_errors(padded, labels, padded.astype(np.float32), 3.0) == pytest.approx(narrow)


@pytest.mark.parametrize("history", [False, True])
def test_ridge_finds_a_linear_relation(history: bool) -> None:
    vectors = circle(500)
    scores = 1.0 - (0.5 + 0.3 * vectors[:, [0]].astype(np.float64))
    known = a_known(vectors, scores) if history else a_known(vectors)
    expected = ridge(known)(every_tenth(vectors, scores), vectors)
    assert expected == pytest.approx(1.0 - scores, abs=0.02)


def test_left_out_losses_equal_those_of_refitting_without_each_prompt() -> None:
    rng = np.random.default_rng(0)
    seen, errors = rng.normal(size=(6, 3)), rng.random((6, 2))
    by_hand = np.zeros(len(STRENGTHS))
    for at, strength in enumerate(STRENGTHS):
        for out in range(6):
            x, y = np.delete(seen, out, axis=0), np.delete(errors, out, axis=0)
            # The penalty is on the slope about the mean of all six: the intercept is free, and takes up the rest.
            design = np.hstack((np.ones((5, 1)), x - seen.mean(axis=0)))
            line = np.linalg.solve(design.T @ design + strength * np.diag([0.0, 1, 1, 1]), design.T @ y)
            by_hand[at] += ((line[0] + (seen[out] - seen.mean(axis=0)) @ line[1:] - errors[out]) ** 2).sum()
    assert left_out_losses(seen, errors) == pytest.approx(by_hand)


def test_without_known_models_ridge_fits_a_relation_and_not_noise() -> None:
    vectors = circle(40).astype(np.float64)
    line, lot = 0.5 + 0.4 * vectors[:, [0]], np.random.default_rng(3).random((40, 1)).round()
    assert best_strength(vectors, a_sample(range(40), line.tolist())) == min(STRENGTHS)
    assert best_strength(vectors, a_sample(range(40), lot.tolist())) == max(STRENGTHS)


def test_fine_rates_are_shrunk_to_the_coarse_rate_and_that_to_the_mean() -> None:
    errors, labels = np.array([[24.0, 0.0, 0.0]]), np.array([[24.0, 0.0, 0.0]])
    rates = nested_rates(errors, labels, np.array([0, 0, 1]), np.array([0.5]))
    coarse = (24 + 24 * 0.5) / 48
    assert rates.tolist() == [pytest.approx([(24 + 24 * coarse) / 48, coarse, 0.5])]


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("history", [False, True])
def test_a_model_without_labels_has_an_expected_error_of_one_half(method: Method, history: bool) -> None:
    vectors, scores = clumps(60), right_on_the_first(60)
    known = a_known(vectors, scores) if history else a_known(vectors)
    both = np.hstack((scores, np.full_like(scores, np.nan)))
    expected = method(known)(every_tenth(vectors, both), vectors)
    assert expected[:, 1] == pytest.approx(0.5)
    assert expected[:60, 0].mean() < 0.5 < expected[60:, 0].mean()


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("history", [False, True])
def test_a_sample_without_scores_is_not_an_error(method: Method, history: bool) -> None:
    vectors = clumps(60)
    known = a_known(vectors, right_on_the_first(60)) if history else a_known(vectors)
    assert method(known)(every_tenth(vectors, np.full((120, 2), np.nan)), vectors) == pytest.approx(0.5)


@pytest.mark.parametrize("method", RIVALS)
def test_unlabelled_prompts_are_left_out_and_not_counted_as_wrong(method: Method) -> None:
    vectors, scores = clumps(60), right_on_the_first(60)
    estimator = method(a_known(vectors))
    some = every_tenth(vectors, scores)
    more = np.arange(1, 120, 10)
    mixed = LabelledSample(
        np.concatenate((more, some.rows)),
        np.concatenate((np.full((more.size, 1), np.nan), some.scores)),
        np.full((more.size + some.rows.size, 1), np.nan),
    )
    assert estimator(mixed, vectors) == pytest.approx(estimator(some, vectors))


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("known_models", [0, 2])
def test_six_prompts_are_enough_for_every_method(method: Method, known_models: int) -> None:
    vectors = clumps(3)
    known = a_known(vectors, np.tile(right_on_the_first(3), known_models))
    expected = method(known)(a_sample([0, 5], [[1.0], [0.0]]), vectors)
    assert ((expected >= 0) & (expected <= 1)).all()


@pytest.mark.parametrize("method", RIVALS)
def test_the_same_seed_gives_the_same_estimates(method: Method) -> None:
    vectors, scores = clumps(60), right_on_the_first(60)
    once, again = (method(a_known(vectors, scores))(every_tenth(vectors, scores), vectors) for _ in range(2))
    assert once.tolist() == again.tolist()


def test_without_known_models_the_learned_map_is_kmeans_with_raw_rates() -> None:
    vectors, scores = clumps(60), right_on_the_first(60)
    known, some = a_known(vectors), every_tenth(vectors, scores)
    assert learned_map(known)(some, vectors).tolist() == kmeans_raw(known)(some, vectors).tolist()
