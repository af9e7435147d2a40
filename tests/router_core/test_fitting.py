"""Fitting a map from prompts."""

import pytest

from router_core.errors import InvalidInput
from router_core.fitting import cluster_names, fit_map, token_weights
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


def test_a_word_that_is_everywhere_names_nothing() -> None:
    import numpy as np

    prompts = ["answer the sum", "answer the sum", "answer the poem", "answer the poem"]
    names = cluster_names(prompts, np.array([0, 0, 1, 1]), 2)
    assert [name.split(",")[0] for name in names] == ["sum", "poem"]
