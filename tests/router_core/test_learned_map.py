"""The learned map where it is used: whole weights, the heaviest few, and what does not fit together."""

import numpy as np
import pytest

from router_core.errors import InvalidInput
from router_core.learned_clusters import LearnedMap


def a_map(top: int = 2) -> LearnedMap:
    """Of three clusters, one per axis."""
    return LearnedMap(2.0 * np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32), top)


def test_a_prompt_is_shared_by_its_heaviest_clusters() -> None:
    vectors = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    placed = a_map().assign(vectors)
    assert placed.ids.tolist() == [[0, 1], [2, 0]]
    assert placed.weights[0] == pytest.approx(np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum())
    assert a_map(3).assign(vectors).dense(3) == pytest.approx(a_map().weights(vectors))


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(InvalidInput, match="offset"):
        LearnedMap(np.eye(3, dtype=np.float32), np.zeros(2, dtype=np.float32))
    with pytest.raises(InvalidInput, match="top must be"):
        a_map(4)
