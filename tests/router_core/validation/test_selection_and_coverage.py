"""Which prompts are asked when not all are, and how much label weight each cluster gets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.types import Assignment
from router_core.validation.coverage import coverage, thin_clusters
from router_core.validation.selection import choose_prompts


def hard(*clusters: int) -> Assignment:
    """Each prompt wholly in one cluster."""
    return Assignment(np.array(clusters, dtype=np.int64)[:, None], np.ones((len(clusters), 1), dtype=np.float32))


def soft(rng: np.random.Generator, prompts: int, clusters: int, top: int = 3) -> Assignment:
    ids = np.stack([rng.permutation(clusters)[:top] for _ in range(prompts)]).astype(np.int64)
    weights = rng.dirichlet(np.ones(top), prompts).astype(np.float32)
    return Assignment(ids, weights)


def test_every_cluster_is_asked_before_any_is_asked_twice() -> None:
    clusters = [0] * 20 + list(range(1, 8)) + [8, 8, 8, 9, 9]
    chosen = choose_prompts(hard(*clusters), 10, 10, families=["a"] * 32)
    assert sorted(np.array(clusters)[chosen].tolist()) == list(range(10))


def test_within_a_cluster_another_family_goes_first() -> None:
    chosen = choose_prompts(hard(0, 0, 0, 0), 1, 2, families=["sums", "sums", "sums", "code"])
    assert 3 in chosen


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(0, 40), more=st.integers(0, 20))
def test_a_smaller_choice_is_the_beginning_of_a_bigger_one(seed: int, count: int, more: int) -> None:
    assignment = soft(np.random.default_rng(seed), 50, 7)
    families = [f"f{row % 5}" for row in range(50)]
    few = choose_prompts(assignment, 7, count, families=families, seed=seed)
    many = choose_prompts(assignment, 7, count + more, families=families, seed=seed)
    assert few.tolist() == many[: len(few)].tolist()
    assert len(set(many.tolist())) == len(many) == min(count + more, 50)


def test_the_choice_covers_more_than_the_first_prompts_do() -> None:
    assignment = soft(np.random.default_rng(5), 300, 20)
    chosen = choose_prompts(assignment, 20, 30, families=["a"] * 300)
    spread = coverage(Assignment(assignment.ids[chosen], assignment.weights[chosen]), 20)
    first = coverage(Assignment(assignment.ids[:30], assignment.weights[:30]), 20)
    assert spread.min() > 1.5 * first.min()


def test_the_seed_settles_ties_and_nothing_else() -> None:
    assignment = hard(*[0] * 20)
    orders = {tuple(choose_prompts(assignment, 1, 5, families=["a"] * 20, seed=seed)) for seed in range(5)}
    again = choose_prompts(assignment, 1, 5, families=["a"] * 20, seed=0)
    assert len(orders) > 1
    assert tuple(again) in orders


def test_more_than_there_are_gives_all_and_none_gives_none() -> None:
    assert sorted(choose_prompts(hard(0, 1), 2, 9, families=["a", "b"])) == [0, 1]
    assert len(choose_prompts(hard(0, 1), 2, 0, families=["a", "b"])) == 0
    with pytest.raises(ValueError, match="2 prompts but 1 families"):
        choose_prompts(hard(0, 1), 2, 1, families=["a"])


def test_coverage_sums_the_weights_and_names_the_thin_clusters_thinnest_first() -> None:
    ids = np.array([[0, 1], [0, 2], [0, 1]], dtype=np.int64)
    weights = np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], dtype=np.float32)
    labels = coverage(Assignment(ids, weights), 4)
    assert labels.tolist() == [2.25, 0.75, 0.0, 0.0]
    assert thin_clusters(labels) == (2, 3, 1)
    assert thin_clusters(labels, below=0.5) == (2, 3)
