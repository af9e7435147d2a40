from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.errors import InvalidInput
from router_core.evaluation.cluster_methods import kmeans_raw, learned_map
from router_core.evaluation.trials import LabelledSample
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from router_core.learned_clusters import (
    MIN_LABELS,
    ErrorClusters,
    LearnedMap,
    TrainingTargets,
    error_rates,
    fit_error_clusters,
    fit_learned_clusters,
    fit_learned_map,
    gradient,
    initial_map,
    log_loss,
    train,
)
from router_core.surface import surface_features
from router_core.types import Doubles, Floats
from tests.router_core.evaluation.toys import a_known


def a_learned_map(top: int = 2) -> LearnedMap:
    """Build a learned map of three clusters, one per axis."""
    return LearnedMap(2.0 * np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32), top)


def test_a_prompt_is_shared_by_its_heaviest_clusters() -> None:
    vectors = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    placed = a_learned_map().assign(vectors)
    assert placed.ids.tolist() == [[0, 1], [2, 0]]
    assert placed.weights[0] == pytest.approx(np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum())
    assert a_learned_map(3).assign(vectors).dense(3) == pytest.approx(a_learned_map().weights(vectors))


def test_a_learned_map_of_unfitting_arrays_is_refused() -> None:
    with pytest.raises(InvalidInput, match="offset"):
        LearnedMap(np.eye(3, dtype=np.float32), np.zeros(2, dtype=np.float32))
    with pytest.raises(InvalidInput, match="top must be"):
        a_learned_map(4)


CLUSTERS = 16


def faint(count: int) -> tuple[Floats, Doubles]:
    """Draw (n, 8) vectors and (n, 3) scores: who is right is the sign of the last axis, the faintest of all."""
    vectors = np.random.default_rng(0).normal(size=(count, 8))
    vectors[:, -1] = np.where(np.arange(count) % 2, 0.5, -0.5)
    first = vectors[:, [-1]] > 0
    scores = np.hstack((first, ~first, first)).astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32), scores


def a_faint_history(count: int = 1200) -> tuple[Floats, Doubles]:
    """Build a history of the first two models."""
    vectors, scores = faint(count)
    return vectors, scores[:, :2]


def trained_and_start(vectors: Floats, scores: Doubles) -> tuple[LearnedMap, LearnedMap]:
    return (
        fit_learned_map(vectors, scores, seed=0, clusters=CLUSTERS),
        initial_map(vectors, CLUSTERS, seed=0),
    )


def test_the_gradient_equals_finite_differences_of_the_log_loss() -> None:
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


def test_the_learned_map_separates_what_kmeans_does_not() -> None:
    vectors, scores = faint(1500)
    known = a_known(vectors[:1200], scores[:1200, :2])
    rows = np.arange(100)
    some = LabelledSample(rows, scores[rows, 2:], np.full((100, 1), np.nan))
    losses = [
        float(((method(known)(some, vectors[1200:]) - (1.0 - scores[1200:, 2:])) ** 2).mean())
        for method in (learned_map, kmeans_raw)
    ]
    assert losses[0] < 0.5 * losses[1]


def test_training_halves_the_loss_if_there_is_something_to_learn() -> None:
    history = a_faint_history()
    answers = TrainingTargets.from_scores(*history)
    trained, start = (log_loss(soft, error_rates(soft, answers), answers) for soft in trained_and_start(*history))
    assert trained < 0.5 * start


def test_training_learns_from_noisy_answers_in_many_dimensions() -> None:
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
def test_training_never_ends_above_its_initial_held_out_loss(contrary: bool) -> None:
    vectors, scores = a_faint_history()
    answers, start = TrainingTargets.from_scores(vectors, scores), initial_map(vectors, CLUSTERS, seed=0)
    fitted, held_out = answers.at(np.arange(1000)), answers.at(np.arange(1000, 1200))
    if contrary:
        held_out = replace(held_out, errors=1.0 - held_out.errors)
    trained = train(start, fitted, held_out, np.random.default_rng(0))
    losses = [log_loss(soft, error_rates(soft, fitted), held_out) for soft in (start, trained)]
    assert losses[1] <= losses[0]


def test_known_models_without_labels_change_nothing() -> None:
    vectors, _ = faint(200)
    trained, start = trained_and_start(vectors, np.full((200, 2), np.nan))
    assert trained.slope.tolist() == start.slope.tolist()


def test_unlabelled_prompts_do_not_change_the_rates() -> None:
    soft = LearnedMap(np.eye(2, dtype=np.float32) * 50, np.zeros(2, dtype=np.float32), 2)
    answers = TrainingTargets.from_scores(
        np.eye(2, dtype=np.float32)[[0, 0, 0, 1]], np.array([[1.0], [0.0], [np.nan], [1.0]])
    )
    assert error_rates(soft, answers)[0] == pytest.approx([0.5, 0.01], abs=0.01)


SPREAD = 20


def prompts(n: int = 600) -> tuple[Floats, Doubles]:
    """Draw n unit vectors and the scores of three models: two are right if the last, faint axis is positive."""
    rng = np.random.default_rng(0)
    faint = rng.choice([-0.3, 0.3], n)
    vectors = np.column_stack([rng.normal(size=(n, 4)), faint])
    scores = np.column_stack([faint > 0, faint > 0, faint < 0]).astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32), scores


def test_prompts_are_clustered_by_which_models_are_right() -> None:
    vectors, scores = prompts()
    response = fit_error_clusters(vectors, scores, seed=0)
    nearest = response.assign(vectors).ids[:, 0]
    shares = np.array([scores[nearest == k, 0].mean() for k in np.unique(nearest)])
    assert np.abs(shares - 0.5).mean() > 0.4


def test_weights_sum_to_one_and_one_by_one_equals_all_at_once() -> None:
    vectors, scores = prompts()
    response = fit_error_clusters(vectors, scores, seed=0)
    at_once = response.assign(vectors[:SPREAD]).dense(response.size)
    one_by_one = [response.assign(vectors[row : row + 1]).dense(response.size)[0] for row in range(SPREAD)]
    assert at_once.sum(axis=1) == pytest.approx(np.ones(SPREAD), abs=1e-6)
    assert np.array(one_by_one) == pytest.approx(at_once, abs=1e-3)


def test_too_few_models_or_labels_give_no_learned_clusters() -> None:
    vectors, scores = prompts()
    surface = surface_features([""] * len(vectors))
    assert len(fit_learned_clusters(vectors, surface, scores, seed=0)) == 2
    assert fit_learned_clusters(vectors, surface, scores[:, :2], seed=0) == ()
    scores[MIN_LABELS - 1 :, 0] = np.nan
    assert fit_learned_clusters(vectors, surface, scores, seed=0) == ()


def test_a_model_that_is_always_right_breaks_nothing() -> None:
    vectors, scores = prompts()
    scores[:, 1] = 1.0
    response = fit_error_clusters(vectors, scores, seed=0)
    assert np.isfinite(response.assign(vectors).weights).all()


def test_a_prompt_belongs_to_the_clusters_of_every_kind_in_equal_shares_heaviest_first() -> None:
    vectors, scores = prompts()
    fitted = fit_with_outcomes(EmbeddedPrompts(["alpha beta"] * 600, vectors, "e"), scores, ("x", "y", "z"), 6)
    placed = fitted.assign(vectors, fitted.surface_of(["alpha beta"] * 600))
    dense, weights = placed.dense(fitted.size), placed.weights
    assert fitted.size == 6 + sum(clusters.size for clusters in fitted.learned_clusters) == len(fitted.names)
    assert len(fitted.groups) == 3
    for view in fitted.groups:
        assert dense[:, view.columns].sum(axis=1) == pytest.approx(np.full(600, 1 / 3), abs=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


def test_a_fitted_map_has_reference_models_and_its_hard_version_has_none() -> None:
    vectors, scores = prompts()
    fitted = fit_with_outcomes(EmbeddedPrompts(["alpha beta"] * 600, vectors, "e"), scores, ("x", "y", "z"), 6)
    assert fitted.reference_models is not None
    assert fitted.reference_models.models == ("x", "y", "z")
    assert fitted.reference_models.labels.sum(axis=1) == pytest.approx([600.0] * 3, abs=1e-3)
    hard = fitted.with_hard_assignment()
    assert (hard.size, hard.reference_models, hard.learned_clusters) == (6, None, ())


def test_the_ids_of_maps_never_change() -> None:
    """Maps on disk and stored profiles refer to them."""
    eye, zero = np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    learned = (ErrorClusters(eye, zero, eye, top=1), LearnedMap(eye, zero, 2))
    assert ClusterMap(eye, embedder_id="e").id == "977dc008fda3a5d9"
    assert ClusterMap(eye, embedder_id="e", learned_clusters=learned).id == "802b197a9ac1caeb"


def test_learned_clusters_are_part_of_a_maps_id_and_reference_models_are_not() -> None:
    vectors, scores = prompts()
    embedded = EmbeddedPrompts(["alpha beta"] * 600, vectors, "e")
    with_history = fit_with_outcomes(embedded, scores, ("x", "y", "z"), 6)
    plain = fit_with_outcomes(embedded, scores[:, :1], ("x",), 6)
    assert plain.reference_models is not None
    assert plain.id == ClusterMap(plain.centroids, embedder_id="e").id != with_history.id


def test_error_clusters_of_unfitting_arrays_are_refused() -> None:
    two, three = np.zeros(2, dtype=np.float32), np.zeros((4, 3), dtype=np.float32)
    with pytest.raises(InvalidInput, match="offsets"):
        ErrorClusters(three, two, np.zeros((5, 2), dtype=np.float32), top=1)
    with pytest.raises(InvalidInput, match="top must be"):
        ErrorClusters(three, np.zeros(3, dtype=np.float32), three, top=9)
    response = ErrorClusters(three, np.zeros(3, dtype=np.float32), three, top=1)
    with pytest.raises(InvalidInput, match="dimensions"):
        ClusterMap(np.eye(3, dtype=np.float32), embedder_id="e", learned_clusters=[response])
