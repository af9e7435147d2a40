import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from router_core.clustering import ClusterMap, assign_prompts, kmeans
from router_core.errors import InvalidInput
from router_core.text import MAX_END_CHARS
from router_core.types import Assignment, Floats
from tests.router_core.makers import FirstLetterEmbedder, a_map


def unit_rows(n: int, d: int = 6, seed: int = 0) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_weights_are_the_softmax_of_cosines_over_the_temperature() -> None:
    vector = np.array([[0.8, 0.6, 0.0]], dtype=np.float32)
    assignment = a_map(top=2).assign(vector)
    ratio = np.exp((0.8 - 0.6) / 0.05)
    assert assignment.ids.tolist() == [[0, 1]]
    assert assignment.weights[0] == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)], rel=1e-5)


def test_top_one_is_the_hard_assignment_of_the_paper() -> None:
    vectors = unit_rows(50, 3)
    assignment = a_map(top=1).assign(vectors)
    assert assignment.ids[:, 0].tolist() == vectors.argmax(axis=1).tolist()
    assert (assignment.weights == 1.0).all()


def test_one_by_one_equals_all_at_once() -> None:
    cluster_map = ClusterMap(unit_rows(20, seed=1), embedder_id="e", top=5)
    vectors = unit_rows(40)
    at_once = cluster_map.assign(vectors).dense(20)
    one_by_one = np.vstack([cluster_map.assign(vectors[row : row + 1]).dense(20) for row in range(40)])
    assert one_by_one == pytest.approx(at_once, abs=1e-6)
    assert at_once.sum(axis=1) == pytest.approx(np.ones(40))


def test_fitted_prompts_are_served_in_the_cluster_they_were_fitted_to() -> None:
    centres = np.eye(6, dtype=np.float32)
    noisy = np.repeat(centres, 30, axis=0) + np.random.default_rng(2).normal(0, 0.02, (180, 6))
    vectors = np.asarray(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), dtype=np.float32)
    cluster_map = ClusterMap(kmeans(vectors, 6), embedder_id="e", top=1)
    nearest = cluster_map.assign(vectors).ids[:, 0].reshape(6, 30)
    assert (nearest == nearest[:, :1]).all()
    assert len(set(nearest[:, 0].tolist())) == 6


def test_centroids_lie_on_the_unit_sphere() -> None:
    assert np.linalg.norm(kmeans(unit_rows(200), 8), axis=1) == pytest.approx(np.ones(8), abs=1e-5)


def test_the_same_seed_fits_the_same_map() -> None:
    vectors = unit_rows(300)
    assert np.array_equal(kmeans(vectors, 8, seed=3), kmeans(vectors, 8, seed=3))


def test_the_id_depends_on_all_that_decides_an_assignment_and_nothing_else() -> None:
    centroids = unit_rows(4)
    base = ClusterMap(centroids, embedder_id="e")
    assert ClusterMap(centroids, embedder_id="e", names=list("abcd")).id == base.id
    others = [
        ClusterMap(centroids[::-1].copy(), embedder_id="e"),
        ClusterMap(centroids, embedder_id="f"),
        ClusterMap(centroids, embedder_id="e", top=2),
        ClusterMap(centroids, embedder_id="e", temperature=0.1),
        base.with_hard_assignment(),
    ]
    assert len({base.id, *(other.id for other in others)}) == 6


def test_more_clusters_than_distinct_prompts_are_refused() -> None:
    with pytest.raises(InvalidInput, match="2 distinct"):
        kmeans(np.repeat(unit_rows(2), 5, axis=0), 3)


def by_the_wrapper(cluster_map: ClusterMap, vector: Floats) -> Assignment:
    """Assign one vector through FAISS's Python wrapper, as is done for many at once."""
    index = faiss.IndexFlatIP(cluster_map.dimension)
    index.add(cluster_map.centroids)
    cosines, ids = index.search(vector, cluster_map.top)
    weights = np.exp((cosines.astype(np.float64) - cosines[:, :1]) / cluster_map.temperature)
    return Assignment(ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


@pytest.mark.parametrize(("clusters", "dimension", "top"), [(64, 384, 8), (20, 6, 5), (3, 6, 3), (40, 7, 1)])
def test_one_vector_is_assigned_as_faiss_wrapper_assigns_it_and_as_many_are(
    clusters: int, dimension: int, top: int
) -> None:
    cluster_map = ClusterMap(unit_rows(clusters, dimension, seed=1), embedder_id="e", top=top)
    for vector in np.vstack((unit_rows(300, dimension), np.zeros((1, dimension), dtype=np.float32)))[:, None, :]:
        direct, wrapped = cluster_map.assign(vector), by_the_wrapper(cluster_map, vector)
        among_many = cluster_map.assign(np.concatenate((vector, vector)))
        for other in (wrapped, Assignment(among_many.ids[:1], among_many.weights[:1])):
            assert direct.ids.tobytes() == other.ids.tobytes()
            # NumPy's exponents and the C library's differ in their last bit, which rounding to float32 hides.
            np.testing.assert_array_max_ulp(direct.weights, other.weights, 1)


def test_what_one_vector_is_assigned_cannot_be_changed() -> None:
    assignment = a_map(top=2).assign(unit_rows(1, 3))
    for array in (assignment.ids, assignment.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_a_vector_may_be_written_where_it_is_read() -> None:
    cluster_map, vector = a_map(top=2), unit_rows(1, 3)
    cluster_map.query[:] = vector
    assert cluster_map.assign(cluster_map.query).weights.tolist() == cluster_map.assign(vector).weights.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 2])
def test_a_vector_that_is_not_finite_is_refused(value: float, count: int) -> None:
    with pytest.raises(InvalidInput, match="not finite"):
        a_map(top=2).assign(np.full((count, 3), value, dtype=np.float32))


def test_an_assignment_stays_as_it_is_while_others_are_made() -> None:
    cluster_map = ClusterMap(unit_rows(20, seed=1), embedder_id="e", top=5)
    first, second = unit_rows(2)[:, None, :]
    kept = cluster_map.assign(first)
    before = kept.ids.tolist(), kept.weights.tolist()
    cluster_map.assign(second)
    assert (kept.ids.tolist(), kept.weights.tolist()) == before
    assert kept.ids.dtype == np.int64
    assert kept.weights.dtype == np.float32


def test_threads_assign_at_once_without_disturbing_each_other() -> None:
    cluster_map = ClusterMap(unit_rows(64, 64, seed=1), embedder_id="e", top=8)
    vectors = unit_rows(2000, 64)[:, None, :]

    def assign_all(_: int) -> list[bytes]:
        return [
            assignment.ids.tobytes() + assignment.weights.tobytes() for assignment in map(cluster_map.assign, vectors)
        ]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(assign_all, range(4)))
    assert found == [assign_all(0)] * 4


def test_assigning_leaves_the_threads_of_fitting_as_they_are() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        a_map(top=2).assign(unit_rows(1, 3))
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_a_map_that_was_used_can_be_sent_to_another_process() -> None:
    cluster_map, vector = a_map(top=2), unit_rows(1, 3)
    used = cluster_map.assign(vector)
    sent = pickle.loads(pickle.dumps(cluster_map))
    assert sent.id == cluster_map.id
    assert sent.assign(vector).weights.tolist() == used.weights.tolist()


@pytest.mark.parametrize("shape", [(1, 4), (1, 2)])
def test_a_vector_of_another_dimension_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shape"):
        a_map().assign(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("count", [1, 3])
def test_an_assignment_says_how_near_each_prompt_is_to_its_nearest_centroid(count: int) -> None:
    vectors = unit_rows(count, 3)
    cosines = a_map(top=2).assign(vectors).cosines
    assert cosines is not None
    assert cosines == pytest.approx(vectors.max(axis=1), abs=1e-6)


class LengthEmbedder(FirstLetterEmbedder):
    """Embed as FirstLetterEmbedder, and keep how long the texts were."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def embed(self, texts: Sequence[str]) -> Floats:
        self.lengths += map(len, texts)
        return super().embed(texts)


def test_a_long_prompt_is_assigned_by_its_two_ends_as_a_server_assigns_it() -> None:
    embedder = LengthEmbedder()
    assign_prompts(["a" * 100_000, "b"], embedder, a_map())
    assert embedder.lengths == [2 * MAX_END_CHARS + 1, 1]
