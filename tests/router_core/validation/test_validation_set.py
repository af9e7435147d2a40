from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.types import Assignment
from router_core.validation.validation_set import choose_prompts, coverage, thin_clusters


def hard(*clusters: int) -> Assignment:
    """Put each prompt wholly in one cluster."""
    return Assignment(np.array(clusters, dtype=np.int64)[:, None], np.ones((len(clusters), 1), dtype=np.float32))


def soft(rng: np.random.Generator, prompts: int, clusters: int, top: int = 3) -> Assignment:
    ids = np.stack([rng.permutation(clusters)[:top] for _ in range(prompts)]).astype(np.int64)
    weights = rng.dirichlet(np.ones(top), prompts).astype(np.float32)
    return Assignment(ids, weights)


def test_small_clusters_get_more_prompts_than_at_random() -> None:
    clusters = np.repeat([0, 1, 2, 3], [500, 300, 150, 50])
    for seed in range(5):
        chosen_counts = np.bincount(clusters[choose_prompts(hard(*clusters), 100, families=["a"] * 1000, seed=seed)])
        assert chosen_counts[3] >= 10
        assert chosen_counts[0] <= 35


def test_a_familys_share_grows_with_the_root_of_its_size() -> None:
    families = np.array(["sums"] * 900 + ["code"] * 100)
    chosen = choose_prompts(hard(*[0] * 1000), 40, families=families.tolist())
    assert (families[chosen] == "code").sum() == pytest.approx(10, abs=2)


def test_a_prompt_shared_by_all_clusters_is_not_always_first() -> None:
    """As it would be, if the widest of all were asked."""
    ids, weights = np.tile(np.arange(3), (30, 1)), np.full((30, 3), [0.98, 0.01, 0.01], dtype=np.float32)
    weights[0] = 1 / 3
    first = {int(choose_prompts(Assignment(ids, weights), 1, families=["a"] * 30, seed=seed)[0]) for seed in range(9)}
    assert len(first) > 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(0, 40), more=st.integers(0, 20))
def test_a_smaller_choice_is_the_beginning_of_a_bigger_one(seed: int, count: int, more: int) -> None:
    assignment = soft(np.random.default_rng(seed), 50, 7)
    families = [f"f{row % 5}" for row in range(50)]
    few = choose_prompts(assignment, count, families=families, seed=seed)
    many = choose_prompts(assignment, count + more, families=families, seed=seed)
    assert few.tolist() == many[: len(few)].tolist()
    assert len(set(many.tolist())) == len(many) == min(count + more, 50)


def test_the_seed_decides_which_prompts_of_a_cluster_are_asked() -> None:
    assignment = hard(*[0] * 20)
    orders = {tuple(choose_prompts(assignment, 5, families=["a"] * 20, seed=seed)) for seed in range(5)}
    again = choose_prompts(assignment, 5, families=["a"] * 20, seed=0)
    assert len(orders) > 1
    assert tuple(again) in orders


def test_asking_for_too_many_gives_all_and_for_none_gives_none() -> None:
    assert sorted(choose_prompts(hard(0, 1), 9, families=["a", "b"])) == [0, 1]
    assert len(choose_prompts(hard(0, 1), 0, families=["a", "b"])) == 0
    with pytest.raises(ValueError, match="2 prompts but 1 families"):
        choose_prompts(hard(0, 1), 1, families=["a"])


def test_coverage_sums_the_weights_and_names_the_thin_clusters_thinnest_first() -> None:
    ids = np.array([[0, 1], [0, 2], [0, 1]], dtype=np.int64)
    weights = np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], dtype=np.float32)
    labels = coverage(Assignment(ids, weights), 4)
    assert labels.tolist() == [2.25, 0.75, 0.0, 0.0]
    assert thin_clusters(labels) == (2, 3, 1)
    assert thin_clusters(labels, below=0.5) == (2, 3)
