"""What a plan takes for granted where nothing is said, and what it refuses."""

from __future__ import annotations

import pytest

from router_core.errors import InvalidInput
from router_core.evaluation import trials as plan
from router_core.evaluation.trials import (
    DEFAULT_LABELS,
    DEFAULT_UNSEEN,
    count_new_models,
    default_labels,
    default_unseen,
)
from tests.router_core.evaluation.toys import SIX, a_plan, two_kinds


@pytest.mark.parametrize(
    ("models", "unseen"), [(2, 0.0), (4, 0.0), (5, DEFAULT_UNSEEN), (6, DEFAULT_UNSEEN), (30, DEFAULT_UNSEEN)]
)
def test_a_third_of_the_models_is_new_or_all_if_that_leaves_no_choice(models: int, unseen: float) -> None:
    assert default_unseen(models) == unseen


@pytest.mark.parametrize("models", range(2, 40))
def test_at_least_two_models_are_new_by_default(models: int) -> None:
    assert 2 <= count_new_models(default_unseen(models), models) <= models


@pytest.mark.parametrize(
    ("prompts", "labels"),
    [
        (36, (25,)),
        (70, (25,)),
        (71, (25, 50)),
        (570, DEFAULT_LABELS[:4]),
        (571, DEFAULT_LABELS),
        (30_000, DEFAULT_LABELS),
    ],
)
def test_default_labels_do_not_exceed_the_train_prompts(prompts: int, labels: tuple[int, ...]) -> None:
    """Of 71 prompts 21 are test prompts, and 50 are left."""
    assert default_labels(prompts) == labels


def test_the_smallest_default_stays_if_there_are_too_few_prompts() -> None:
    assert default_labels(10) == DEFAULT_LABELS[:1]
    with pytest.raises(InvalidInput, match=r"25 labels are more than the 7 prompts .* of 10 that differ"):
        a_plan(labels=default_labels(10)).check(two_kinds(10))


@pytest.mark.parametrize(("prompts", "tested"), [(1, 1), (4, 1), (5, 2), (90, 27)])
def test_three_of_ten_prompts_are_test_prompts_and_one_always_is(prompts: int, tested: int) -> None:
    assert plan.tested_prompts(prompts) == tested


def test_one_new_model_leaves_nothing_to_choose_from() -> None:
    with pytest.raises(InvalidInput, match=r"unseen=0\.2 of 6 models leaves 1 new one"):
        a_plan(unseen=0.2).check(two_kinds(90, SIX))


@pytest.mark.parametrize("labels", [(), (0, 5), (5, 5), (10, 5)])
def test_labels_ascend_from_one(labels: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="labels must be ascending whole numbers, 1 or more"):
        a_plan(labels=labels)


def test_trials_and_the_share_of_new_models_have_their_range() -> None:
    with pytest.raises(InvalidInput, match="trials must be 1 or more; got 0"):
        a_plan(trials=0)
    with pytest.raises(InvalidInput, match="unseen must be from 0 to 1; got nan"):
        a_plan(unseen=float("nan"))
