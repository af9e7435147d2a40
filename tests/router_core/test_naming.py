"""What a cluster is called."""

import numpy as np

from router_core.fitting import cluster_names


def test_a_word_of_every_cluster_names_none() -> None:
    prompts = ["answer the sum", "answer the sum", "answer the poem", "answer the poem"]
    names = cluster_names(prompts, np.array([0, 0, 1, 1]), 2)
    assert [name.split(",")[0] for name in names] == ["sum", "poem"]
