from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.eligibility import eligible
from router_core.evaluation import baselines
from router_core.evaluation.cluster_methods import Deployment, clusters_within, hard_map, kmeans_laplace, kmeans_raw
from router_core.evaluation.curves import area
from router_core.evaluation.study import ServedTrial
from router_core.evaluation.trials import Method, cost_weights, draw_trial
from router_core.pool import Pool
from router_core.scoring import ScoringParams, rank
from router_core.types import Assignment, Floats, Price, Requirements
from tests.router_core.evaluation.toys import SIX, a_known, a_plan, a_sample, two_kinds, vectors_of

EXPECTED_ERRORS, EXPECTED_CENTS = np.array([0.6, 0.1, 0.3]), np.array([1.0, 9.0, 3.0])
# The truth: the third model is the best, though the second was expected to be.
COSTS, QUALITIES = np.array([2.0, 8.0, 4.0]), np.array([0.5, 0.7, 0.8])
A, B = np.eye(2, dtype=np.float32)


def kinds(letters: str) -> Floats:
    """Return one vector for each letter: "ab" is a prompt on the first axis, and one on the second."""
    return np.stack([A if kind == "a" else B for kind in letters])


def test_cheapest_is_one_point_the_model_expected_to_be_cheapest() -> None:
    curve = baselines.cheapest(EXPECTED_CENTS, COSTS, QUALITIES)
    assert (curve.costs.tolist(), curve.qualities.tolist()) == ([2.0], [0.5])


def test_best_single_is_the_model_expected_to_be_best_and_below_its_cost_the_cheapest() -> None:
    curve = baselines.best_single(EXPECTED_ERRORS, EXPECTED_CENTS, COSTS, QUALITIES)
    assert (curve.costs[0], curve.qualities[0]) == (8.0, 0.7)
    assert area(curve, 2.0, 7.9) == pytest.approx(0.5)


def test_a_random_mix_is_linear_between_models_expected_on_the_hull() -> None:
    curve = baselines.random_mix(EXPECTED_ERRORS[:2], EXPECTED_CENTS[:2], COSTS[:2], QUALITIES[:2])
    assert (curve.costs.tolist(), curve.qualities.tolist()) == ([8.0, 2.0], [0.7, 0.5])
    assert area(curve, 2.0, 8.0) == pytest.approx(0.6)


def test_a_model_below_the_line_between_two_others_is_not_mixed_in() -> None:
    assert baselines.hull(np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.3, 0.8])).tolist() == [2, 0]
    assert baselines.hull(np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.6, 0.8])).tolist() == [2, 1, 0]
    assert baselines.hull(np.array([1.0, 2.0]), np.array([0.8, 0.3])).tolist() == [0]


@given(
    points=st.lists(st.tuples(st.floats(0.1, 10.0), st.floats(0.0, 1.0)), min_size=1, max_size=6),
)
def test_no_model_lies_above_the_hull(points: list[tuple[float, float]]) -> None:
    costs, qualities = np.array(points).T
    kept = baselines.hull(costs, qualities)[::-1]
    bound = np.interp(costs, costs[kept], qualities[kept])
    assert (qualities <= bound + 1e-9).all()


@pytest.mark.parametrize(
    ("method", "rates"), [(kmeans_raw, (0.5, 0.0, 0.5, 0.5)), (kmeans_laplace, (0.5, 1 / 3, 0.5, 0.5))]
)
def test_kmeans_rates_are_those_of_the_prompts_in_the_cluster(method: Method, rates: tuple[float, ...]) -> None:
    """The first model: one of two wrong on "a", its one "b" right. The second was never labelled."""
    seen = a_sample([0, 1, 4], [[1.0, np.nan], [0.0, np.nan], [1.0, np.nan]])
    expected = method(a_known(kinds("aaaabbbb")))(seen, kinds("ab"))
    assert expected.T.ravel() == pytest.approx(rates)


def test_kmeans_uses_the_number_of_clusters_that_is_best_for_known_models() -> None:
    """Eight kinds; the known models tell four of them from the others, which four clusters cannot."""
    vectors = np.tile(np.eye(8, dtype=np.float32), (12, 1))
    right = np.tile([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0], 12)
    seen = a_sample(range(48), right[:48, None].tolist())
    expected = kmeans_raw(a_known(vectors, np.stack([right, 1.0 - right], axis=1)))(seen, vectors[:8])
    assert np.abs(expected[:, 0] - (1.0 - right[:8])).mean() < 0.2


def test_there_are_no_more_clusters_than_distinct_vectors() -> None:
    known = a_known(kinds("aab"))
    assert (clusters_within(known, 64), hard_map(known, 64).size, Deployment(known).cluster_map.size) == (2, 2, 2)


def test_the_product_learns_errors_and_answer_lengths_per_cluster() -> None:
    deployment = Deployment(a_known(kinds("ab" * 20)))
    seen = replace(a_sample(range(40), [[1.0, 0.0], [0.0, 1.0]] * 20), output_tokens=np.array([[10.0, 30.0]] * 40))
    pool = deployment.pool(seen, (Price(1e-6, 2e-6), Price(3e-6, 4e-6)))
    placed = deployment.cluster_map.assign(kinds("ab"))
    assert placed.expected(pool.errors) == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]), abs=0.1)
    assert placed.expected(pool.output_tokens) == pytest.approx(np.array([[10.0, 30.0]] * 2))
    assert pool.prices.input.tolist() == [1e-6, 3e-6]


def test_many_models_keep_their_order() -> None:
    deployment = Deployment(a_known(kinds("ab" * 6)))
    scores = np.tile(np.arange(12.0) / 11, (12, 1))
    pool = deployment.pool(a_sample(range(12), scores.tolist()), [Price(number * 1e-6, 0.0) for number in range(12)])
    assert pool.prices.input.tolist() == [number * 1e-6 for number in range(12)]
    assert (np.diff(pool.mean_errors) < 0).all()


def test_a_larger_choice_extends_a_smaller_one_without_repeats() -> None:
    deployment = Deployment(a_known(kinds("ab" * 20)))
    few, many = deployment.choose(5).tolist(), deployment.choose(40).tolist()
    assert many[:5] == few
    assert sorted(many) == list(range(40))


def test_the_evaluated_profiles_are_those_that_would_be_served() -> None:
    outcomes = replace(
        two_kinds(90, SIX),
        output_tokens=np.random.default_rng(0).uniform(5.0, 50.0, (90, 6)),
        prices=tuple(Price(1e-6 * number, 2e-6 * number) for number in range(1, 7)),
    )
    trial = draw_trial(outcomes, vectors_of(outcomes, noise=0.3), a_plan(unseen=0.5), 0)
    served = ServedTrial(trial)
    pool = served.pool(trial.sample(trial.order[:20]))
    placed = served.deployment.cluster_map.assign(trial.test.vectors)
    curve = served.curve(pool)
    weights = cost_weights(placed.expected(pool.errors), served.expected_cents(pool))
    for at in range(0, weights.size, 32):
        chosen = [serve(pool, placed, row, tokens, weights[at]) for row, tokens in enumerate(trial.test.prompt_tokens)]
        assert curve.qualities[at] == pytest.approx(trial.test.scores[np.arange(len(chosen)), chosen].mean())
        assert curve.costs[at] == pytest.approx(trial.test.cents[np.arange(len(chosen)), chosen].mean())


def serve(pool: Pool, placed: Assignment, row: int, prompt_tokens: float, cost_weight: float) -> int:
    """Decide one request as the proxy does."""
    alone = Assignment(placed.ids[[row]], placed.weights[[row]])
    needs = Requirements(prompt_tokens=int(prompt_tokens))
    return pool.index[rank(eligible(pool, needs), alone, needs, ScoringParams(cost_weight, cost_unit="cents")).chosen]
