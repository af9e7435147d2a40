"""Clusters of prompts that known models find alike."""

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.errors import InvalidInput
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from router_core.learned_clusters import MIN_LABELS, ErrorClusters, LearnedMap, fit_error_clusters, fit_learned_clusters
from router_core.types import Doubles, Floats

SPREAD = 20


def prompts(n: int = 600) -> tuple[Floats, Doubles]:
    """n unit vectors, and three models' scores: two are right where the last, faint axis is positive, one elsewhere."""
    rng = np.random.default_rng(0)
    faint = rng.choice([-0.3, 0.3], n)
    vectors = np.column_stack([rng.normal(size=(n, 4)), faint])
    scores = np.column_stack([faint > 0, faint > 0, faint < 0]).astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32), scores


def test_prompts_are_put_together_by_who_is_right_on_them() -> None:
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


def test_few_models_or_few_labels_teach_nothing() -> None:
    vectors, scores = prompts()
    assert len(fit_learned_clusters(vectors, scores, seed=0)) == 2
    assert fit_learned_clusters(vectors, scores[:, :2], seed=0) == ()
    scores[MIN_LABELS - 1 :, 0] = np.nan
    assert fit_learned_clusters(vectors, scores, seed=0) == ()


def test_a_model_that_is_always_right_tells_nothing_and_breaks_nothing() -> None:
    vectors, scores = prompts()
    scores[:, 1] = 1.0
    response = fit_error_clusters(vectors, scores, seed=0)
    assert np.isfinite(response.assign(vectors).weights).all()


def test_a_prompt_belongs_to_the_clusters_of_every_kind_in_equal_shares_heaviest_first() -> None:
    vectors, scores = prompts()
    fitted = fit_with_outcomes(EmbeddedPrompts(["alpha beta"] * 600, vectors, "e"), scores, ("x", "y", "z"), 6)
    dense = fitted.assign(vectors).dense(fitted.size)
    weights = fitted.assign(vectors).weights
    assert fitted.size == 6 + sum(clusters.size for clusters in fitted.learned_clusters) == len(fitted.names)
    assert len(fitted.groups) == 3
    for view in fitted.groups:
        assert dense[:, view.columns].sum(axis=1) == pytest.approx(np.full(600, 1 / 3), abs=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


def test_the_map_of_a_history_remembers_it_and_hardened_forgets() -> None:
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


def test_taught_clusters_are_part_of_a_maps_id_and_history_is_not() -> None:
    vectors, scores = prompts()
    embedded = EmbeddedPrompts(["alpha beta"] * 600, vectors, "e")
    with_history = fit_with_outcomes(embedded, scores, ("x", "y", "z"), 6)
    plain = fit_with_outcomes(embedded, scores[:, :1], ("x",), 6)
    assert plain.reference_models is not None
    assert plain.id == ClusterMap(plain.centroids, embedder_id="e").id != with_history.id


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    two, three = np.zeros(2, dtype=np.float32), np.zeros((4, 3), dtype=np.float32)
    with pytest.raises(InvalidInput, match="offsets"):
        ErrorClusters(three, two, np.zeros((5, 2), dtype=np.float32), top=1)
    with pytest.raises(InvalidInput, match="top must be"):
        ErrorClusters(three, np.zeros(3, dtype=np.float32), three, top=9)
    response = ErrorClusters(three, np.zeros(3, dtype=np.float32), three, top=1)
    with pytest.raises(InvalidInput, match="dimensions"):
        ClusterMap(np.eye(3, dtype=np.float32), embedder_id="e", learned_clusters=[response])
