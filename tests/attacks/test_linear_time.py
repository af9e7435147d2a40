from __future__ import annotations

import pytest

from tests.support.linear_time import stopped_at


@pytest.mark.parametrize("module", ["tests.attacks.exploding_graders", "tests.attacks.exploding_parsers"])
def test_the_usual_exploding_shapes_are_read_in_linear_time(module: str) -> None:
    assert stopped_at(module, "few") == ""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tests.attacks.exploding_graders", "tests.attacks.exploding_parsers"])
def test_all_exploding_shapes_are_read_in_linear_time(module: str) -> None:
    assert stopped_at(module, "many") == ""
