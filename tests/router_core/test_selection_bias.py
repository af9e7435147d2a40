from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.clustering import ClusterMap
from router_core.estimators import RAW
from router_core.profiles import Profile
from router_core.selection_bias import GradedPrompts, SelectionBias
from router_core.types import Doubles

TWO = ClusterMap(np.eye(2, dtype=np.float32), embedder_id="corners", top=1)
EVENLY = {0: 0.5, 1: 0.5}


def a_profile(errors: tuple[float, float], labels: float) -> Profile:
    counts, answers = np.full(2, float(labels)), np.ones(2)
    return Profile(TWO.id, np.array(errors) * counts, counts, answers, answers, answers, answers)


def bias_of(
    profiles: dict[str, Profile], lambda_: float = 0.0, costs: dict[str, float] | None = None, tie: float = 0.0
) -> float:
    names = sorted(profiles)
    found = SelectionBias(profiles, TWO, RAW).of(
        names, [(costs or {}).get(name, 1.0) for name in names], lambda_, tie, EVENLY
    )
    assert found is not None
    return found


def lucky(labels: float, models: int = 30) -> dict[str, Profile]:
    """Models that are all wrong on half of the prompts, as so many labels say."""
    rng = np.random.default_rng(1)
    return {
        f"m{number:02}": a_profile(tuple((rng.binomial(int(labels), 0.5, size=2) / labels).tolist()), labels)
        for number in range(models)
    }


def test_luck_that_made_the_choice_is_found_by_the_other_half_of_the_labels() -> None:
    profiles = lucky(8)
    best = min(float(each.error_sums.sum() / each.labels.sum()) for each in profiles.values())

    assert best < 0.35
    assert best + bias_of(profiles) == pytest.approx(0.5, abs=0.1)


def test_with_very_many_labels_there_is_no_luck() -> None:
    profiles = {"cheap": a_profile((0.3, 0.4), 1e8), "dear": a_profile((0.1, 0.1), 1e8)}
    assert bias_of(profiles) == pytest.approx(0, abs=1e-3)


def test_a_choice_that_cost_decides_has_none() -> None:
    profiles = lucky(8, models=3)
    costs = {"m00": 0.0, "m01": 1.0, "m02": 1.0}
    assert bias_of(profiles, lambda_=100.0, costs=costs) == pytest.approx(0, abs=0.2)
    assert abs(bias_of(profiles, lambda_=100.0, costs=costs)) < bias_of(lucky(8)) / 2


def test_a_model_that_is_gone_or_has_no_sums_leaves_it_unknown() -> None:
    stated = replace(a_profile((0.5, 0.5), 5), stated_rates=np.full(2, 0.5))
    bias = SelectionBias({"known": a_profile((0.1, 0.1), 5), "stated": stated}, TWO, RAW)

    assert bias.of(["known", "gone"], [1, 1], 0, 0, EVENLY) is None
    assert bias.of(["known", "stated"], [1, 1], 0, 0, EVENLY) is None
    assert bias.of([], [], 0, 0, EVENLY) is None
    assert SelectionBias({}, TWO, RAW).of(["known"], [1], 0, 0, EVENLY) is None
    assert bias.of(["known"], [1], 0, 0, {1: 1.0}) is not None


def test_the_same_seed_finds_the_same() -> None:
    assert bias_of(lucky(8)) == bias_of(lucky(8))


def test_with_known_answers_the_halves_are_those_of_the_prompts() -> None:
    rng = np.random.default_rng(0)
    weights = np.repeat(np.eye(2), 40, axis=0)
    hard = rng.random(80) < 0.5
    # every model is wrong on the same prompts: none is luckier than another
    scores = {f"m{number}": np.where(hard, 0.0, 1.0) for number in range(9)}
    profiles = {name: measured(weights, each) for name, each in scores.items()}
    known, thinned = (
        SelectionBias(profiles, TWO, RAW, graded).of(sorted(profiles), [1.0] * 9, 0.0, 0.0, EVENLY)
        for graded in (GradedPrompts(weights, scores), None)
    )

    assert known == pytest.approx(0, abs=0.03)
    assert thinned is not None
    assert thinned > 0.05


def measured(weights: Doubles, scores: Doubles) -> Profile:
    labelled = ~np.isnan(scores)
    labels = labelled.astype(float) @ weights
    errors = np.where(labelled, 1.0 - scores, 0.0) @ weights
    return Profile(TWO.id, errors, labels, labels, labels, labels, labels)


def test_answers_of_another_measurement_are_not_taken_for_those_of_the_profile() -> None:
    weights, scores = np.repeat(np.eye(2), 4, axis=0), np.array([1.0, 0.0, np.nan, 1.0] * 2)
    profile = measured(weights, scores)

    assert GradedPrompts(weights, {"m": scores}).measured("m", profile)
    assert not GradedPrompts(weights, {"m": 1.0 - scores}).measured("m", profile)
    assert not GradedPrompts(weights, {}).measured("m", profile)
