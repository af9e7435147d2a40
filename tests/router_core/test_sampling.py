"""A sample of the prompts in bounded memory."""

from __future__ import annotations

import random

import pytest

from router_core.fitting import MIN_SAMPLE_SIZE, PROMPTS_PER_CLUSTER, PromptSample, empty_sample, sample_prompts

MANY = [f"prompt {n % 400}" for n in range(1_000)]
"""400 distinct ones."""


def a_sample(texts: list[str], size: int = 50, *, seed: int = 0, part: int = 0) -> PromptSample:
    sample = PromptSample(size, seed=seed, part=part)
    for text in texts:
        sample.add(text)
    return sample


def test_what_fits_is_kept_whole_in_the_order_of_first_appearance() -> None:
    sample = a_sample(["b", "a", "b", " ", "c", "a", ""])
    assert sample.texts() == ["b", "a", "c"]
    assert (len(sample), sample.read) == (3, 5)


def test_of_more_the_sample_is_bounded_and_distinct() -> None:
    sample = a_sample(MANY)
    texts = sample.texts()
    assert (len(texts), len(set(texts)), sample.read) == (50, 50, 1_000)
    assert [MANY.index(text) for text in texts] == sorted(MANY.index(text) for text in texts)


def test_the_order_of_the_prompts_does_not_change_who_is_drawn() -> None:
    shuffled = random.Random(1).sample(MANY, len(MANY))
    assert set(a_sample(shuffled).texts()) == set(a_sample(MANY).texts())


def test_another_seed_draws_others() -> None:
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
def test_there_is_room_for_what_k_means_looks_at(clusters: int, room: int) -> None:
    texts = [str(n) for n in range(room)]
    assert len(sample_prompts([*texts, "one more"], clusters, seed=0)) == room
    assert sample_prompts(texts, clusters, seed=0).texts() == texts
    assert len(empty_sample(clusters, seed=0)) == 0
