from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import InvalidInput
from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.trials import (
    DEFAULT_LABELS,
    DEFAULT_UNSEEN,
    POINTS,
    HeldOut,
    Plan,
    Trial,
    cost_weights,
    count_new_models,
    count_test_prompts,
    default_labels,
    default_unseen,
    deferral_curve,
    draw_trial,
)
from router_core.kernels import argmin_with_ties
from router_core.scoring import TIE_TOLERANCE
from router_core.types import Doubles, Floats, Indices
from tests.router_core.evaluation.toys import CHEAP, EXPENSIVE, SIX, a_plan, two_kinds

THIRD = a_plan(unseen=1 / 3)


def numbered(outcomes: Outcomes) -> Floats:
    """Return (n, 1) vectors that are the row numbers, so that it can be seen where a prompt went."""
    return np.arange(len(outcomes.prompts), dtype=np.float32)[:, None]


def drawn(outcomes: Outcomes, plan: Plan = THIRD, number: int = 0) -> Trial:
    return draw_trial(outcomes, numbered(outcomes), plan, number)


def rows(vectors: Floats) -> Indices:
    return vectors[:, 0].astype(np.int64)


def columns(outcomes: Outcomes, names: Sequence[str]) -> Indices:
    return np.array([outcomes.models.index(name) for name in names])


def test_three_in_ten_prompts_are_tested_and_the_others_known() -> None:
    trial = drawn(two_kinds(90, SIX))
    tested, known = rows(trial.test.vectors), rows(trial.history.vectors)
    assert (len(tested), len(known)) == (27, 63)
    assert sorted([*tested, *known]) == list(range(90))


def test_a_third_of_the_models_is_new_and_the_others_known() -> None:
    trial = drawn(two_kinds(90, SIX))
    assert (len(trial.new_models), len(trial.history.models)) == (2, 4)
    assert sorted((*trial.new_models, *trial.history.models)) == sorted(SIX)


@pytest.mark.parametrize("unseen", [0.0, 1.0])
def test_all_models_may_be_new(unseen: float) -> None:
    trial = drawn(two_kinds(90, SIX), a_plan(unseen=unseen))
    assert (len(trial.new_models), trial.history.models, trial.history.scores.shape) == (6, (), (63, 0))


def test_every_figure_belongs_to_its_prompt_and_model() -> None:
    outcomes = replace(
        two_kinds(90, SIX),
        scores=np.linspace(0.0, 1.0, 540).reshape(90, 6),
        output_tokens=np.arange(540.0).reshape(90, 6),
        prompt_tokens=np.arange(90.0),
    )
    trial = drawn(outcomes)
    tested, known = rows(trial.test.vectors), rows(trial.history.vectors)
    new, old = columns(outcomes, trial.new_models), columns(outcomes, trial.history.models)
    assert (trial.test.scores == outcomes.scores[np.ix_(tested, new)]).all()
    assert (trial.test.prompt_tokens == tested).all()
    assert (trial.test.cents == outcomes.usd()[np.ix_(tested, new)] / 0.01).all()
    assert (trial.history.scores == outcomes.scores[np.ix_(known, old)]).all()
    assert (trial.scores == outcomes.scores[np.ix_(known, new)]).all()
    assert (trial.output_tokens == outcomes.output_tokens[np.ix_(known, new)]).all()
    assert [outcomes.prompts[row] for row in known] == trial.history.texts
    assert trial.prices == tuple(SIX[name][1] for name in trial.new_models)


def test_more_labels_extend_the_same_prompts() -> None:
    trial = drawn(two_kinds(90, SIX))
    nested = [trial.sample(trial.order[:count]).rows.tolist() for count in (5, 20, 63)]
    assert all(more[: len(fewer)] == fewer for fewer, more in pairwise(nested))
    assert sorted(nested[-1]) == list(range(63))


def test_every_new_model_is_asked_the_same_prompts() -> None:
    trial = drawn(two_kinds(90, SIX))
    answers = trial.sample(trial.order[:7])
    assert answers.scores.shape == answers.output_tokens.shape == (7, 2)
    assert (answers.scores == trial.scores[trial.order[:7]]).all()


def test_the_seed_and_the_number_decide_a_trial() -> None:
    outcomes = two_kinds(90, SIX)
    one, same = drawn(outcomes, number=1), drawn(outcomes, replace(THIRD, trials=9), number=1)
    others = drawn(outcomes), drawn(outcomes, replace(THIRD, seed=1), number=1)
    assert (one.order.tolist(), one.history.seed) == (same.order.tolist(), same.history.seed)
    assert (rows(one.test.vectors) == rows(same.test.vectors)).all()
    assert len({tuple(trial.order) for trial in (one, *others)}) == 3


def test_test_answers_are_hidden_from_every_method() -> None:
    outcomes = two_kinds(90, SIX)
    tested = rows(drawn(outcomes).test.vectors)
    scores, tokens = outcomes.scores.copy(), outcomes.output_tokens.copy()
    scores[tested], tokens[tested] = 0.5, 77.0
    one, other = drawn(outcomes), drawn(replace(outcomes, scores=scores, output_tokens=tokens))
    assert not (one.test.scores == other.test.scores).any()
    for field in fields(one.history):
        assert np.array_equal(getattr(one.history, field.name), getattr(other.history, field.name))
    for name in ("order", "scores", "output_tokens"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)


def test_a_prompt_that_a_new_model_has_no_score_on_is_not_tested() -> None:
    outcomes = two_kinds(90, SIX)
    tested = rows(drawn(outcomes).test.vectors)
    outcomes.scores[tested[0]] = np.nan
    assert rows(drawn(outcomes).test.vectors).tolist() == tested[1:].tolist()


def test_a_model_without_lengths_is_marked() -> None:
    outcomes = two_kinds()
    outcomes.output_tokens[3, 1] = 50.0
    assert drawn(outcomes, a_plan()).lengths_known.tolist() == [False, True]


def test_baselines_are_new_models_and_of_equals_the_cheaper_is_best() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    test = HeldOut(["a", "b"], np.zeros((2, 1), dtype=np.float32), scores, np.array([[9.0, 4.0, 1.0]] * 2), np.zeros(2))
    baselines = test.baselines()
    assert (baselines.cheapest, baselines.best, baselines.most_expensive, baselines.best_quality) == (
        1.0,
        4.0,
        9.0,
        1.0,
    )


@pytest.mark.parametrize("models", [3, 4])
def test_one_new_model_is_too_few_to_choose_from(models: int) -> None:
    few = two_kinds(90, {f"model {number}": ("a", CHEAP) for number in range(models)})
    with pytest.raises(InvalidInput, match=rf"of {models} models leaves 1 new one.*--unseen 0"):
        THIRD.check(few)
    a_plan(unseen=0.5).check(few)
    a_plan(unseen=0.0).check(few)


def test_more_labels_than_train_prompts_are_refused() -> None:
    outcomes = two_kinds(90, {"left": ("a", CHEAP), "right": ("b", EXPENSIVE)})
    a_plan(labels=(63,)).check(outcomes)
    with pytest.raises(InvalidInput, match=r"64 labels.*63 prompts.*--labels"):
        a_plan(labels=(5, 64)).check(outcomes)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"labels": ()}, "labels"),
        ({"labels": (0, 5)}, "labels"),
        ({"labels": (5, 5)}, "labels"),
        ({"labels": (9, 5)}, "labels"),
        ({"trials": 0}, "trials"),
        ({"unseen": -0.1}, "unseen"),
        ({"unseen": float("nan")}, "unseen"),
    ],
)
def test_an_impossible_plan_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{named} must be"):
        replace(THIRD, **wrong)


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
    assert count_test_prompts(prompts) == tested


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


CHEAP_CENTS, EXPENSIVE_CENTS = 1.0, 3.0


def held_out(scores: Doubles, cents: Doubles) -> HeldOut:
    return HeldOut(
        [""] * len(scores), np.zeros((len(scores), 1), dtype=np.float32), scores, cents, np.zeros(len(scores))
    )


def of_two(*errors: tuple[float, float]) -> tuple[Doubles, Doubles]:
    """Return (t, 2) errors and costs of a cheap and an expensive model."""
    return np.array(errors), np.full((len(errors), 2), (CHEAP_CENTS, EXPENSIVE_CENTS))


def test_a_curve_runs_from_the_best_models_to_the_cheapest() -> None:
    """The second prompt is worth the dear model up to λ = 0.1, the first up to 0.4; the third never is."""
    errors, cents = of_two((0.9, 0.1), (0.3, 0.1), (0.1, 0.8))
    curve = deferral_curve(errors, cents, held_out(1.0 - errors, cents))
    assert (curve.costs[0], curve.qualities[0]) == pytest.approx((7 / 3, 0.9))
    assert (curve.costs[-1], curve.qualities[-1]) == pytest.approx((1.0, 1.7 / 3))
    assert sorted(set(curve.costs.round(9).tolist())) == pytest.approx([1.0, 5 / 3, 7 / 3])


def test_expectations_decide_and_true_costs_are_billed() -> None:
    errors, cents = of_two((0.9, 0.1))
    curve = deferral_curve(errors, cents, held_out(np.array([[0.25, 0.5]]), np.array([[20.0, 10.0]])))
    assert (curve.costs[0], curve.qualities[0]) == (10.0, 0.5)
    assert (curve.costs[-1], curve.qualities[-1]) == (20.0, 0.25)


def test_near_equals_go_to_the_cheaper_model_at_any_cost_weight() -> None:
    errors, cents = of_two((0.1 + TIE_TOLERANCE / 2, 0.1))
    assert set(deferral_curve(errors, cents, held_out(errors, cents)).costs) == {CHEAP_CENTS}


def test_cost_weights_lie_where_models_overtake_each_other() -> None:
    weights = cost_weights(*of_two((0.9, 0.1), (0.3, 0.1), (0.1, 0.8)))
    assert (weights[0], weights[1], weights[-1], len(weights)) == (
        0.0,
        pytest.approx(0.1),
        pytest.approx(0.4),
        POINTS + 1,
    )
    assert (np.diff(weights) >= 0).all()


def test_prices_next_to_nothing_give_finite_cost_weights() -> None:
    weights = cost_weights(np.array([[0.5, 0.1], [0.5, 0.1]]), np.array([[1e-320, 2e-320], [1.0, 2.0]]))
    assert weights.max() == pytest.approx(0.4)


def test_without_a_better_expensive_model_there_is_one_cost_weight() -> None:
    assert cost_weights(*of_two((0.1, 0.8), (0.1, 0.1))).tolist() == [0.0]
    assert cost_weights(np.array([[0.9, 0.1]]), np.array([[2.0, 2.0]])).tolist() == [0.0]


@given(seed=st.integers(0, 10_000), models=st.integers(2, 5))
def test_each_point_is_the_served_rule_prompt_by_prompt(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    errors, cents, scores = rng.random((4, models)), rng.random((4, models)), rng.random((4, models))
    curve = deferral_curve(errors, cents, held_out(scores, cents))
    for at, weight in enumerate(cost_weights(errors, cents)):
        chosen = [argmin_with_ties(errors[row] + weight * cents[row], cents[row], TIE_TOLERANCE) for row in range(4)]
        assert curve.qualities[at] == pytest.approx(np.mean([scores[row, choice] for row, choice in enumerate(chosen)]))
        assert curve.costs[at] == pytest.approx(np.mean([cents[row, choice] for row, choice in enumerate(chosen)]))
    assert curve.costs[-1] == pytest.approx(cents.min(axis=1).mean())
