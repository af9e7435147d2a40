from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from router_core.clustering import MAX_CLUSTERS_FOR_OVERLAP, NOVEL_SHARE, ClusterMap, kmeans
from router_core.errors import InvalidInput
from router_core.fitting import (
    BATCH_SIZE,
    MIN_SAMPLE_SIZE,
    PROMPTS_PER_CLUSTER,
    PromptSample,
    batches,
    cluster_names,
    count_nearest,
    embed_prompts,
    empty_sample,
    fit_map,
    sample_prompts,
)
from router_core.types import Floats
from tests.router_core.makers import FirstLetterEmbedder

PROMPTS = ["apple pie", "apple cake", "banana bread", "banana split", "cherry tart", "cherry jam"]


def test_each_kind_of_prompt_gets_a_cluster_named_after_its_words() -> None:
    cluster_map = fit_map(PROMPTS, FirstLetterEmbedder(), 3)
    assert {name.split(",")[0] for name in cluster_map.names} == {"apple", "banana", "cherry"}
    assert cluster_map.embedder_id == "first-letter"


def test_progress_is_reported_to_the_end() -> None:
    progress: list[tuple[str, int, int]] = []
    fit_map(PROMPTS, FirstLetterEmbedder(), 3, progress=lambda *step: progress.append(step))
    assert progress[0][0] == "embedding"
    assert progress[-1] == ("clustering", 1, 1)


def test_repeated_and_blank_prompts_do_not_count() -> None:
    with pytest.raises(InvalidInput, match="there are 2"):
        fit_map(["a", "a", " ", "b"], FirstLetterEmbedder(), 3)


class NumberEmbedder:
    """Embed a number at that many degrees, and record the batch sizes."""

    id = "number"
    dimension = 2

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def embed(self, texts: Sequence[str]) -> Floats:
        self.batch_sizes.append(len(texts))
        angles = np.radians([float(text) for text in texts])
        return np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def numbers(count: int) -> Iterator[str]:
    """Yield numbers once, never as a list."""
    return (str(n % 90 + n / count) for n in range(count))


def test_few_prompts_are_all_clustered_in_their_order() -> None:
    embedder = NumberEmbedder()
    prompts = [*numbers(3_000)]
    cluster_map = fit_map(numbers(3_000), embedder, 5, seed=3)
    assert np.array_equal(cluster_map.centroids, kmeans(embedder.embed(prompts), 5, seed=3))


def test_only_a_sample_of_many_prompts_is_embedded_in_batches() -> None:
    embedder = NumberEmbedder()
    fit_map(numbers(MIN_SAMPLE_SIZE + 500), embedder, 5)
    assert sum(embedder.batch_sizes) == MIN_SAMPLE_SIZE
    assert max(embedder.batch_sizes) == BATCH_SIZE


def test_the_same_seed_draws_and_fits_the_same() -> None:
    one, two, other = (fit_map(numbers(MIN_SAMPLE_SIZE + 500), NumberEmbedder(), 5, seed=seed) for seed in (1, 1, 2))
    assert one.id == two.id != other.id


def test_embedding_in_batches_is_embedding_at_once() -> None:
    prompts = [*numbers(2 * BATCH_SIZE + 1)]
    assert np.array_equal(embed_prompts(prompts, NumberEmbedder()), NumberEmbedder().embed(prompts))


def test_every_prompt_is_counted_in_its_nearest_cluster() -> None:
    hard = fit_map(PROMPTS, FirstLetterEmbedder(), 3).with_hard_assignment()
    counts = sum(count_nearest(batch, FirstLetterEmbedder(), hard) for batch in batches(["apple", " ", *PROMPTS]))
    named = {name.split(",")[0]: count for name, count in zip(hard.names, np.asarray(counts).tolist(), strict=True)}
    assert named == {"apple": 3, "banana": 2, "cherry": 2}


# 400 distinct ones.
MANY = [f"prompt {n % 400}" for n in range(1_000)]


def a_sample(texts: list[str], size: int = 50, *, seed: int = 0, part: int = 0) -> PromptSample:
    sample = PromptSample(size, seed=seed, part=part)
    for text in texts:
        sample.add(text)
    return sample


def test_a_small_set_is_kept_whole_in_order_of_first_appearance() -> None:
    sample = a_sample(["b", "a", "b", " ", "c", "a", ""])
    assert sample.texts() == ["b", "a", "c"]
    assert (len(sample), sample.read) == (3, 5)


def test_a_sample_of_many_prompts_is_bounded_and_distinct() -> None:
    sample = a_sample(MANY)
    texts = sample.texts()
    assert (len(texts), len(set(texts)), sample.read) == (50, 50, 1_000)
    assert [MANY.index(text) for text in texts] == sorted(MANY.index(text) for text in texts)


def test_the_order_of_the_prompts_does_not_change_the_sample() -> None:
    shuffled = random.Random(1).sample(MANY, len(MANY))
    assert set(a_sample(shuffled).texts()) == set(a_sample(MANY).texts())


def test_another_seed_draws_another_sample() -> None:
    assert set(a_sample(MANY, seed=1).texts()) != set(a_sample(MANY).texts())


@pytest.mark.parametrize("size", [50, 1_000])
def test_samples_of_parts_merge_into_the_sample_of_the_whole_in_any_order(size: int) -> None:
    parts = [a_sample(MANY[start : start + 100], size, part=start) for start in range(0, 1_000, 100)]
    merged = PromptSample(size)
    for part in random.Random(2).sample(parts, len(parts)):
        merged.merge(part)
    assert merged.texts() == a_sample(MANY, size).texts()
    assert merged.read == 1_000


def test_a_prompt_is_as_likely_to_be_drawn_however_often_it_is_repeated() -> None:
    often = ["often"] * 1_000 + [f"once {n}" for n in range(99)]
    drawn = sum("often" in a_sample(often, 10, seed=seed).texts() for seed in range(300))
    assert 10 <= drawn <= 55  # 30 expected of 10 in 100; five standard deviations to either side


def test_lone_surrogates_are_prompts_like_others() -> None:
    assert a_sample(["\ud800", "\ud801", "\ud800"]).texts() == ["\ud800", "\ud801"]


@pytest.mark.parametrize(
    ("clusters", "room"), [(2, MIN_SAMPLE_SIZE), (64, MIN_SAMPLE_SIZE), (100, 100 * PROMPTS_PER_CLUSTER)]
)
def test_the_sample_is_as_large_as_k_means_needs(clusters: int, room: int) -> None:
    texts = [str(n) for n in range(room)]
    assert len(sample_prompts([*texts, "one more"], clusters, seed=0)) == room
    assert sample_prompts(texts, clusters, seed=0).texts() == texts
    assert len(empty_sample(clusters, seed=0)) == 0


def test_a_word_of_every_cluster_names_none() -> None:
    prompts = ["answer the sum", "answer the sum", "answer the poem", "answer the poem"]
    names = cluster_names(prompts, np.array([0, 0, 1, 1]), 2)
    assert [name.split(",")[0] for name in names] == ["sum", "poem"]


def test_a_fitted_map_knows_how_its_prompts_spread_and_what_is_far_from_them() -> None:
    cluster_map = fit_map((str(n * 0.01) for n in range(9_000)), NumberEmbedder(), 6)
    known = cluster_map.fitted_prompts
    assert known is not None
    seen = cluster_map.assign(NumberEmbedder().embed([str(n * 0.01) for n in range(9_000)]))

    assert known.count == 9_000
    assert known.shares == pytest.approx(seen.dense(6).mean(axis=0))
    assert seen.cosines is not None
    assert np.mean(seen.cosines < known.novel_below) == pytest.approx(NOVEL_SHARE, abs=0.002)


def test_a_map_fitted_before_has_its_shares_in_the_overlap_of_its_clusters() -> None:
    cluster_map = fit_map((str(n % 70 + n / 3_000) for n in range(3_000)), NumberEmbedder(), 5)
    known = cluster_map.fitted_prompts
    assert known is not None
    before = ClusterMap(cluster_map.centroids, embedder_id="number", reference_models=cluster_map.reference_models)

    assert before.fitted_prompts is None
    assert before.prompt_shares == pytest.approx(known.shares, abs=1e-6)
    assert ClusterMap(cluster_map.centroids, embedder_id="number").prompt_shares is None


def test_a_map_of_more_clusters_than_overlaps_are_kept_for_knows_its_prompts_too() -> None:
    cluster_map = fit_map((str(n * 0.01) for n in range(9_000)), NumberEmbedder(), MAX_CLUSTERS_FOR_OVERLAP + 1)
    assert cluster_map.reference_models is None
    assert cluster_map.fitted_prompts is not None
    assert len(cluster_map.fitted_prompts.shares) == MAX_CLUSTERS_FOR_OVERLAP + 1
