"""Fitting a map from prompts."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from router_core.clustering import kmeans
from router_core.errors import InvalidInput
from router_core.fitting import (
    BATCH_SIZE,
    MIN_SAMPLE_SIZE,
    batches,
    count_nearest,
    embed_prompts,
    fit_map,
    token_weights,
)
from router_core.types import Floats
from tests.router_core.makers import FirstLetterEmbedder

PROMPTS = ["apple pie", "apple cake", "banana bread", "banana split", "cherry tart", "cherry jam"]


def test_each_kind_of_prompt_gets_a_cluster_named_after_its_words() -> None:
    cluster_map = fit_map(PROMPTS, FirstLetterEmbedder(), 3)
    assert {name.split(",")[0] for name in cluster_map.names} == {"apple", "banana", "cherry"}
    assert cluster_map.embedder_id == "first-letter"


def test_progress_is_told_until_all_is_done() -> None:
    told: list[tuple[str, int, int]] = []
    fit_map(PROMPTS, FirstLetterEmbedder(), 3, progress=lambda *step: told.append(step))
    assert told[0][0] == "embedding"
    assert told[-1] == ("clustering", 1, 1)


def test_duplicates_and_blank_prompts_do_not_count() -> None:
    with pytest.raises(InvalidInput, match="there are 2"):
        fit_map(["a", "a", " ", "b"], FirstLetterEmbedder(), 3)


def test_frequent_tokens_weigh_little() -> None:
    weights = token_weights([0, 1, 999])
    assert weights[0] == 1.0
    assert weights[1] == pytest.approx(0.5)
    assert weights[2] == pytest.approx(0.001, rel=0.01)


class NumberEmbedder:
    """A prompt is a number; its vector lies at that many degrees. Remembers how many it was asked for at once."""

    id = "number"
    dimension = 2

    def __init__(self) -> None:
        self.asked: list[int] = []

    def embed(self, texts: Sequence[str]) -> Floats:
        self.asked.append(len(texts))
        angles = np.radians([float(text) for text in texts])
        return np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def numbers(count: int) -> Iterator[str]:
    """Read once, and never a list."""
    return (str(n % 90 + n / count) for n in range(count))


def test_of_few_prompts_all_are_clustered_in_the_order_they_came_in() -> None:
    embedder = NumberEmbedder()
    prompts = [*numbers(3_000)]
    cluster_map = fit_map(numbers(3_000), embedder, 5, seed=3)
    assert np.array_equal(cluster_map.centroids, kmeans(embedder.embed(prompts), 5, seed=3))


def test_of_many_prompts_only_a_sample_is_embedded_batch_by_batch() -> None:
    embedder = NumberEmbedder()
    fit_map(numbers(3 * MIN_SAMPLE_SIZE), embedder, 5)
    assert sum(embedder.asked) == MIN_SAMPLE_SIZE
    assert max(embedder.asked) == BATCH_SIZE


def test_the_same_seed_draws_and_fits_the_same() -> None:
    one, two, other = (fit_map(numbers(2 * MIN_SAMPLE_SIZE), NumberEmbedder(), 5, seed=seed) for seed in (1, 1, 2))
    assert one.id == two.id != other.id


def test_embedding_in_batches_is_embedding_at_once() -> None:
    prompts = [*numbers(2 * BATCH_SIZE + 1)]
    assert np.array_equal(embed_prompts(prompts, NumberEmbedder()), NumberEmbedder().embed(prompts))


def test_every_prompt_is_counted_in_its_nearest_cluster() -> None:
    hard = fit_map(PROMPTS, FirstLetterEmbedder(), 3).with_hard_assignment()
    counts = sum(count_nearest(batch, FirstLetterEmbedder(), hard) for batch in batches(["apple", " ", *PROMPTS]))
    named = {name.split(",")[0]: count for name, count in zip(hard.names, np.asarray(counts).tolist(), strict=True)}
    assert named == {"apple": 3, "banana": 2, "cherry": 2}
