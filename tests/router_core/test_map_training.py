"""Training of the learned map: that it goes downhill, sees what K-means does not, and never ends above its start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.evaluation.cluster_methods import kmeans_raw, learned_map
from router_core.evaluation.trials import LabelledSample
from router_core.learned_clusters import (
    LearnedMap,
    TrainingTargets,
    error_rates,
    fit_learned_map,
    gradient,
    initial_map,
    log_loss,
    train,
)
from router_core.types import Doubles, Floats
from tests.router_core.evaluation.toys import a_known

CLUSTERS = 16


def faint(count: int) -> tuple[Floats, Doubles]:
    """(n, 8) vectors and (n, 3) scores: who is right is the sign of the last axis, the faintest of all."""
    vectors = np.random.default_rng(0).normal(size=(count, 8))
    vectors[:, -1] = np.where(np.arange(count) % 2, 0.5, -0.5)
    first = vectors[:, [-1]] > 0
    scores = np.hstack((first, ~first, first)).astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32), scores


def a_faint_history(count: int = 1200) -> tuple[Floats, Doubles]:
    """Of the first two models."""
    vectors, scores = faint(count)
    return vectors, scores[:, :2]


def trained_and_start(vectors: Floats, scores: Doubles) -> tuple[LearnedMap, LearnedMap]:
    return (
        fit_learned_map(vectors, scores, seed=0, clusters=CLUSTERS),
        initial_map(vectors, CLUSTERS, seed=0),
    )


def test_the_gradient_is_the_slope_of_the_log_loss() -> None:
    rng = np.random.default_rng(0)
    soft = LearnedMap(rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32), 4)
    vectors = rng.normal(size=(20, 3)).astype(np.float32)
    labelled = (rng.random((20, 2)) < 0.8).astype(np.float32)
    answers = TrainingTargets(vectors, labelled * (rng.random((20, 2)) < 0.5).astype(np.float32), labelled)
    rates = rng.uniform(0.1, 0.9, (2, 4)).astype(np.float32)
    slope, offset = gradient(soft, rates, answers)

    def rise(by: LearnedMap, back: LearnedMap) -> float:
        return (log_loss(by, rates, answers) - log_loss(back, rates, answers)) / 0.02

    for at in np.ndindex(3, 4):
        step = np.zeros((3, 4), dtype=np.float32)
        step[at] = 0.01
        above, below = replace(soft, slope=soft.slope + step), replace(soft, slope=soft.slope - step)
        assert slope[at] == pytest.approx(rise(above, below), abs=2e-4)
    for cluster in range(4):
        move = (0.01 * np.eye(4)[cluster]).astype(np.float32)
        above, below = replace(soft, offset=soft.offset + move), replace(soft, offset=soft.offset - move)
        assert offset[cluster] == pytest.approx(rise(above, below), abs=2e-4)


def test_it_sees_what_kmeans_does_not() -> None:
    vectors, scores = faint(1500)
    known = a_known(vectors[:1200], scores[:1200, :2])
    rows = np.arange(100)
    some = LabelledSample(rows, scores[rows, 2:], np.full((100, 1), np.nan))
    losses = [
        float(((method(known)(some, vectors[1200:]) - (1.0 - scores[1200:, 2:])) ** 2).mean())
        for method in (learned_map, kmeans_raw)
    ]
    assert losses[0] < 0.5 * losses[1]


def test_training_leaves_the_start_behind_where_there_is_something_to_learn() -> None:
    history = a_faint_history()
    answers = TrainingTargets.from_scores(*history)
    trained, start = (log_loss(soft, error_rates(soft, answers), answers) for soft in trained_and_start(*history))
    assert trained < 0.5 * start


def test_noisy_answers_in_many_dimensions_still_teach_it() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2800, 128))
    vectors[:, -1] = 1.5 * np.sign(vectors[:, -1])
    first = vectors[:, [-1]] > 0
    noisy = np.hstack((first, ~first)) ^ (rng.random((2800, 2)) < 0.3)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, scores = vectors.astype(np.float32), noisy.astype(np.float64)
    answers, fresh = (
        TrainingTargets.from_scores(vectors[:2400], scores[:2400]),
        TrainingTargets.from_scores(vectors[2400:], scores[2400:]),
    )
    trained, start = (
        log_loss(soft, error_rates(soft, answers), fresh) for soft in trained_and_start(vectors[:2400], scores[:2400])
    )
    assert trained < start - 0.004


@pytest.mark.parametrize("contrary", [False, True])
def test_it_never_ends_above_its_start_on_what_is_held_out(contrary: bool) -> None:
    vectors, scores = a_faint_history()
    answers, start = TrainingTargets.from_scores(vectors, scores), initial_map(vectors, CLUSTERS, seed=0)
    fitted, held_out = answers.at(np.arange(1000)), answers.at(np.arange(1000, 1200))
    if contrary:
        held_out = replace(held_out, errors=1.0 - held_out.errors)
    trained = train(start, fitted, held_out, np.random.default_rng(0))
    losses = [log_loss(soft, error_rates(soft, fitted), held_out) for soft in (start, trained)]
    assert losses[1] <= losses[0]


def test_known_models_without_a_label_teach_nothing() -> None:
    vectors, _ = faint(200)
    trained, start = trained_and_start(vectors, np.full((200, 2), np.nan))
    assert trained.slope.tolist() == start.slope.tolist()


def test_unlabelled_known_prompts_do_not_move_the_rates() -> None:
    soft = LearnedMap(np.eye(2, dtype=np.float32) * 50, np.zeros(2, dtype=np.float32), 2)
    answers = TrainingTargets.from_scores(
        np.eye(2, dtype=np.float32)[[0, 0, 0, 1]], np.array([[1.0], [0.0], [np.nan], [1.0]])
    )
    assert error_rates(soft, answers)[0] == pytest.approx([0.5, 0.01], abs=0.01)
