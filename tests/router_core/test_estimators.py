import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.clustering import ClusterMap, ReferenceModels, reference_models_of
from router_core.estimators import ESTIMATORS, LAPLACE, POOLED, RAW, SHRUNK, part_tools, partially_pooled_rates
from router_core.types import Assignment, Doubles
from tests.router_core.makers import a_map, an_assignment

ERRORS = np.array([[80.0, 220.0, 60.0, 0.0]])
LABELS = np.array([[400.0, 400.0, 400.0, 0.0]])


def test_raw_rates_are_errors_over_labels_and_one_half_where_nothing_was_asked() -> None:
    assert RAW.rates(ERRORS, LABELS, a_map()).tolist() == [[0.20, 0.55, 0.15, 0.5]]


def test_laplace_adds_one_error_and_one_success() -> None:
    assert LAPLACE.rates(ERRORS, LABELS, a_map()).tolist() == [[81 / 402, 221 / 402, 61 / 402, 0.5]]


def test_shrunk_rates_are_shrunk_to_the_models_mean() -> None:
    mean = 360.5 / 1201
    expected = [(80 + 0.5 * mean) / 400.5, (220 + 0.5 * mean) / 400.5, (60 + 0.5 * mean) / 400.5, mean]
    assert SHRUNK.rates(ERRORS, LABELS, a_map())[0] == pytest.approx(expected)


def test_without_labels_every_estimator_gives_one_half() -> None:
    nothing = np.zeros((1, 3))
    for recipe in ESTIMATORS.values():
        assert recipe.rates(nothing, nothing, a_map())[0] == pytest.approx([0.5, 0.5, 0.5])


def test_a_map_of_very_many_clusters_gets_the_shrunk_estimator() -> None:
    large = ClusterMap(np.eye(300, dtype=np.float32), embedder_id="e", top=1)
    sums, labels = np.zeros((2, 300)), np.ones((2, 300))
    assert np.array_equal(POOLED.rates(sums, labels, large), SHRUNK.rates(sums, labels, large))


def many(rates: list[float], labels: float = 400.0) -> tuple[Doubles, Doubles]:
    """Return one model's sums when each cluster of `a_map` has so many labels."""
    return np.array([rates]) * labels, np.full((1, 3), labels)


def test_with_many_labels_a_rate_is_the_models_own_mean() -> None:
    errors, labels = many([0.1, 0.5, 0.9])
    assert partially_pooled_rates(errors, labels, a_map())[0] == pytest.approx([0.1, 0.5, 0.9], abs=0.02)


def test_a_model_with_few_labels_takes_the_difficulty_from_others() -> None:
    errors, labels = many([0.1, 0.5, 0.9])
    errors = np.vstack([errors, errors, [[0.5, 0.5, 0.5]]])
    labels = np.vstack([labels, labels, np.ones((1, 3))])
    easy, middle, hard = partially_pooled_rates(errors, labels, a_map())[2]
    assert easy < 0.25 < middle < 0.75 < hard


def test_ability_in_one_cluster_is_expected_in_others() -> None:
    errors, labels = many([0.5, 0.5, 0.5])
    errors = np.vstack([errors, [[0.0, 0.0, 0.0]], [[12.0, 0.0, 0.0]]])
    labels = np.vstack([labels, [[12.0, 0.0, 0.0]], [[12.0, 0.0, 0.0]]])
    _, good, bad = partially_pooled_rates(errors, labels, a_map())
    assert good[0] < good[2] < 0.45
    assert bad[0] > bad[2] > 0.55


def test_a_deviation_is_expected_more_in_similar_clusters_than_in_distant_ones() -> None:
    near = np.array([[1, 0, 0], [0.96, 0.28, 0], [-1, 0, 0]], dtype=np.float32)
    errors, labels = many([0.5, 0.5, 0.5])
    rates = partially_pooled_rates(
        np.vstack([errors, [[10.0, 0.0, 0.0]]]),
        np.vstack([labels, [[10.0, 0.0, 0.0]]]),
        ClusterMap(near, embedder_id="e", top=1),
    )[1]
    assert rates[0] > rates[1] > rates[2] > 0.5


def test_reference_models_inform_the_rates_and_are_not_among_them() -> None:
    errors, labels = many([0.1, 0.5, 0.9])
    history = ReferenceModels(np.eye(3), ("known", "too"), np.vstack([errors, errors]), np.vstack([labels, labels]))
    sums = np.array([[0.5, 0.5, 0.5]]), np.ones((1, 3))
    alone, helped = (
        partially_pooled_rates(*sums, a_map()),
        partially_pooled_rates(*sums, a_map().with_known(history)),
    )
    assert alone.shape == helped.shape == (1, 3)
    assert np.ptp(alone) == pytest.approx(0.0)
    assert helped[0, 0] < 0.3 < 0.7 < helped[0, 2]


def test_clusters_with_the_same_prompts_have_the_same_rates() -> None:
    """Every prompt lies half in the first cluster and half in the second; their sums then differ by accident only."""
    shared = Assignment(np.array([[0, 1]] * 8), np.full((8, 2), 0.5, dtype=np.float32))
    aware = a_map(top=2).with_known(reference_models_of(shared, 3, np.empty((8, 0)), ()))
    errors, labels = np.array([[6.0, 2.0, 0.0], [2.0, 6.0, 0.0]]), np.array([[8.0, 8.0, 0.0]] * 2)
    unaware_gap, aware_gap = (
        np.ptp(partially_pooled_rates(errors, labels, known)[0, :2]) for known in (a_map(top=2), aware)
    )
    assert unaware_gap > 0.2
    assert aware_gap == pytest.approx(0.0)


def test_the_order_of_the_models_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 30, (70, 3))
    errors = labels * rng.uniform(0, 1, (70, 3))
    order = rng.permutation(70)
    assert partially_pooled_rates(errors[order], labels[order], a_map()) == pytest.approx(
        partially_pooled_rates(errors, labels, a_map())[order], abs=1e-9
    )


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), min_size=3, max_size=3), min_size=1, max_size=5)
)
def test_rates_lie_in_the_unit_interval_whatever_the_sums(rows: list[list[tuple[float, float]]]) -> None:
    rates = np.array([[rate for rate, _ in row] for row in rows])
    labels = np.array([[weight for _, weight in row] for row in rows])
    pooled = partially_pooled_rates(rates * labels, labels, a_map())
    assert ((pooled >= 0) & (pooled <= 1)).all()


def test_reference_models_count_labelled_answers_and_a_hard_assignment_has_no_overlap() -> None:
    scores = np.array([[1.0], [0.0], [np.nan]])
    history = reference_models_of(an_assignment(0, 0, 1), 3, scores, ("known",))
    assert history.overlap.tolist() == np.eye(3).tolist()
    assert history.error_sums.tolist() == [[1.0, 0.0, 0.0]]
    assert history.labels.tolist() == [[2.0, 0.0, 0.0]]


def test_what_tools_add_is_shrunk_to_what_all_models_have_in_common() -> None:
    rates, labels = np.full((3, 2), 0.2), np.full((3, 2), 4.0)
    errors = labels * np.array([0.1, 0.4, 0.7])[:, None]
    _, excess = part_tools(rates, 10 * labels, errors, labels)
    own = np.array([-0.1, 0.2, 0.5]) / 0.9
    assert np.all(np.abs(excess - excess.mean()) < np.abs(own - own.mean()) + 1e-12)
    assert np.all(np.diff(excess) > 0.05)


def test_models_that_do_not_differ_get_nearly_the_same_excess() -> None:
    rates, labels = np.full((4, 2), 0.5), np.full((4, 2), 4.0)
    errors = np.array([[2.0, 2.0], [2.0, 1.0], [1.0, 2.0], [2.0, 2.0]])
    _, excess = part_tools(rates, 10 * labels, errors, labels)
    assert np.ptp(excess) < 0.04


def test_what_is_due_to_tools_is_told_apart_from_what_a_model_errs_without_them() -> None:
    texts, tools = np.array([[40.0, 12.0]]), np.array([[0.0, 8.0]])
    text_errors, tool_errors = 0.1 * texts, 0.9 * tools
    rates = (text_errors + tool_errors) / (texts + tools)
    due, excess = part_tools(rates, texts + tools, tool_errors, tools)

    assert 0.3 < excess[0] < 0.8
    assert np.all(np.abs(rates - due - 0.1) < 0.5 * (rates - 0.1) + 0.05)
    assert np.all(rates - due + excess > rates)


def test_rates_of_prompts_with_tools_alone_stay_rates() -> None:
    labels = np.array([[6.0, 0.0]])
    due, excess = part_tools(np.array([[0.9, 0.9]]), labels, labels * 0.9, labels)
    assert np.all(np.abs(due) < 0.05)
    assert np.all(np.abs(excess) < 0.05)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_an_excess_is_never_more_than_a_model_could_have(models: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates, labels = rng.random((models, 3)), rng.integers(0, 5, (models, 3)).astype(np.float64)
    others = rng.integers(0, 5, (models, 3))
    due, excess = part_tools(rates, labels + others, labels * rng.random((models, 3)), labels)
    assert np.isfinite(due).all()
    assert np.all(np.abs(due) <= np.abs(excess)[:, None])
    assert np.all(np.abs(excess) <= 2.0)
    if not labels.any():
        assert not excess.any()


def three_efforts(labels: float = 4.0) -> tuple[Doubles, Doubles]:
    """Return a model that is right everywhere, and two neighbouring efforts that are wrong in the first cluster."""
    errors = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) * labels
    return errors, np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]) * labels


def test_an_effort_that_was_not_asked_in_a_cluster_is_expected_to_be_as_its_neighbour_there() -> None:
    sums = three_efforts()
    apart = partially_pooled_rates(*sums, a_map())
    together = partially_pooled_rates(*sums, a_map(), ((1, 2),))
    assert together[2, 0] > apart[2, 0] + 0.05
    assert together[0] == pytest.approx(apart[0])


def test_a_distant_effort_tells_less_than_a_neighbour() -> None:
    errors, labels = three_efforts()
    errors, labels = np.vstack([errors, errors[:1]]), np.vstack([labels, labels[:1]])
    near = partially_pooled_rates(errors, labels, a_map(), ((1, 2, 3),))[2, 0]
    far = partially_pooled_rates(errors, labels, a_map(), ((1, 3, 2),))[2, 0]
    assert far < near


def test_with_many_labels_the_rates_of_an_effort_are_its_own() -> None:
    errors = np.array([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]]) * 1e4
    labels = np.full((2, 3), 1e4)
    assert partially_pooled_rates(errors, labels, a_map(), ((0, 1),)) == pytest.approx(errors / 1e4, abs=0.02)


def test_other_estimators_take_each_effort_alone() -> None:
    sums = three_efforts()
    for recipe in (SHRUNK, RAW, LAPLACE):
        assert np.array_equal(recipe.rates(*sums, a_map(), ((1, 2),)), recipe.rates(*sums, a_map()))
