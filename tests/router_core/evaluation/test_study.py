from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.errors import InvalidInput
from router_core.evaluation.curves import BUDGETS, Baselines, Curve
from router_core.evaluation.outcomes import Outcomes
from router_core.evaluation.study import ESTIMATED, METHODS, Results, ServedTrial, run_study, summarize, trial_metrics
from router_core.evaluation.trials import Plan, Trial
from tests.router_core.evaluation.toys import SIX, TWO, a_plan, trials_of, two_kinds, vectors_of

# The methods that look at the prompt, and at no more than they may.
LOOKING = (*ESTIMATED, "ours")
ALL_NEW, SOME_NEW = a_plan(), a_plan(unseen=2 / 3)
SIX_PRICES = {name: (kind, replace(price, output_cost_per_token=1e-6)) for name, (kind, price) in SIX.items()}


def studied(outcomes: Outcomes, plan: Plan = ALL_NEW) -> Results:
    return run_study(outcomes, vectors_of(outcomes), plan)


@pytest.fixture(scope="module")
def plain() -> Results:
    return studied(two_kinds())


def areas(results: Results, method: str) -> list[float]:
    return [figures.area.mean for figures in results.methods[method].values()]


def test_the_oracle_is_always_right(plain: Results) -> None:
    assert [figures.peak.mean for figures in plain.methods["oracle"].values()] == [1.0, 1.0]


@pytest.mark.parametrize("method", LOOKING)
def test_each_method_that_reads_the_prompt_finds_the_better_model(plain: Results, method: str) -> None:
    assert plain.methods[method][40].peak.mean == pytest.approx(1.0)
    assert plain.methods[method][40].qnc.mean < 1.0


def test_the_cheapest_baseline_is_the_cheapest_model(plain: Results) -> None:
    """Its quality is the share of "a" among the test prompts, whatever may be spent."""
    share = np.mean([trial.test.scores[:, 0].mean() for trial in trials_of(two_kinds(), ALL_NEW)])
    assert areas(plain, "cheapest") == pytest.approx([share, share])


def test_a_random_mix_is_half_way_between_two_models(plain: Results) -> None:
    assert areas(plain, "random_mix") == pytest.approx([0.5, 0.5])


def test_the_best_single_model_has_its_own_cost_as_qnc(plain: Results) -> None:
    figures = plain.methods["best_single"][40]
    assert (figures.qnc.mean, figures.cost_save.mean, figures.perf_gain.mean) == pytest.approx((1.0, 0.0, 0.0))


def test_no_method_is_better_than_the_oracle(plain: Results) -> None:
    assert max(max(areas(plain, method)) for method in METHODS) == pytest.approx(areas(plain, "oracle")[0])


def test_methods_keep_their_order_and_differences_are_ours_minus_theirs(plain: Results) -> None:
    assert tuple(plain.methods) == METHODS
    assert tuple(plain.differences) == tuple(method for method in METHODS if method != "ours")
    expected = areas(plain, "ours")[1] - areas(plain, "cheapest")[1]
    assert plain.differences["cheapest"][40].mean == pytest.approx(expected)
    assert plain.chosen_differences[40].mean == pytest.approx(plain.chosen[40].mean - areas(plain, "ours")[1])


def test_the_protocol_is_reported(plain: Results) -> None:
    protocol = plain.protocol
    assert (protocol.outcomes, protocol.prompts, protocol.models) == ("toy.jsonl", 90, ("left", "right"))
    assert (protocol.labels, protocol.trials, protocol.seed, protocol.unseen) == ((20, 40), 2, 0, 0.0)
    assert (protocol.known_models, protocol.new_models, protocol.test_prompts) == (0, 2, 27)
    assert not protocol.measured_lengths


def test_the_heat_map_is_of_all_models_with_all_their_labels(plain: Results) -> None:
    heat_map = plain.heat_map
    assert heat_map.models == ("left", "right")
    assert heat_map.errors.shape == heat_map.labels.shape == (2, len(heat_map.clusters))
    assert heat_map.labels.sum(axis=1) == pytest.approx([90.0, 90.0])
    assert (np.abs(heat_map.errors[0] - heat_map.errors[1]) > 0.5).all()


def test_the_seed_decides_every_figure() -> None:
    outcomes, plan = two_kinds(90, SIX), a_plan(labels=(20,), unseen=2 / 3)
    one, same, other = (studied(outcomes, replace(plan, seed=seed)) for seed in (3, 3, 4))
    for method in METHODS:
        assert areas(one, method) == areas(same, method)
    assert one.differences == same.differences
    assert one.chosen == same.chosen
    assert areas(one, "oracle") != areas(other, "oracle")


def test_each_method_finds_the_better_model_with_known_models() -> None:
    results = studied(two_kinds(90, SIX), replace(SOME_NEW, trials=4))
    assert results.protocol.known_models == 2
    for method in LOOKING:
        assert results.methods[method][40].peak.mean == pytest.approx(results.methods["oracle"][40].peak.mean)


@pytest.mark.parametrize("unseen", [0.0, 1 / 3])
def test_unasked_models_are_left_out(unseen: float) -> None:
    outcomes = two_kinds(120, SIX_PRICES)
    rng = np.random.default_rng(1)
    outcomes.scores[rng.random(outcomes.scores.shape) < 0.15] = np.nan
    outcomes.output_tokens[:] = np.where(rng.random(outcomes.scores.shape) < 0.5, 20.0, np.nan)
    results = studied(outcomes, a_plan(unseen=unseen))
    for method in METHODS:
        for figures in results.methods[method].values():
            assert 0.0 <= figures.peak.mean <= 1.0
    assert results.protocol.measured_lengths
    assert np.isfinite(results.heat_map.errors).all()


@pytest.mark.parametrize("method", ESTIMATED)
@pytest.mark.parametrize("labels", [1, 20, 63])
@pytest.mark.parametrize("plan", [ALL_NEW, SOME_NEW])
def test_a_new_model_without_labels_breaks_no_method(plan: Plan, labels: int, method: str) -> None:
    trial = trials_of(two_kinds(90, SIX), plan)[0]
    sample = trial.sample(trial.order[:labels])
    silent, unlabelled = sample.scores.copy(), np.full_like(sample.scores, np.nan)
    silent[:, 0] = np.nan
    estimator = ESTIMATED[method](trial.history)
    for scores in (silent, unlabelled):
        expected = estimator(replace(sample, scores=scores), trial.test.vectors)
        assert ((expected >= 0) & (expected <= 1)).all()


def test_the_product_accepts_a_model_without_labels() -> None:
    for trial in trials_of(two_kinds(90, SIX), SOME_NEW):
        sample = trial.sample(trial.order[:20])
        silent = replace(sample, scores=np.full_like(sample.scores, np.nan))
        errors = ServedTrial(trial).pool(silent).errors
        assert ((errors >= 0) & (errors <= 1)).all()


def test_known_models_with_few_labels_break_no_method() -> None:
    outcomes = two_kinds(90, SIX)
    outcomes.scores[2:, :4] = np.nan
    outcomes.scores[:2, 4:] = np.nan
    for trial in trials_of(outcomes, replace(SOME_NEW, trials=6)):
        for method in ESTIMATED.values():
            expected = method(trial.history)(trial.sample(trial.order[:20]), trial.test.vectors)
            assert ((expected >= 0) & (expected <= 1)).all()


def test_test_answers_do_not_change_expectations() -> None:
    outcomes = two_kinds(90, SIX_PRICES)
    outcomes.output_tokens[:] = np.random.default_rng(2).uniform(10.0, 90.0, outcomes.scores.shape)
    trial = trials_of(outcomes, SOME_NEW)[0]
    known = set(trial.history.texts)
    tested = [row for row, prompt in enumerate(outcomes.prompts) if prompt not in known]
    scores, tokens = outcomes.scores.copy(), outcomes.output_tokens.copy()
    scores[tested], tokens[tested] = 1.0 - scores[tested], 1e4
    other = trials_of(replace(outcomes, scores=scores, output_tokens=tokens), SOME_NEW)[0]
    for one, same in zip(expected_by(trial), expected_by(other), strict=True):
        assert np.array_equal(one, same)
    assert not np.array_equal(trial.test.cents, other.test.cents)


def expected_by(trial: Trial) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Return all errors and costs that any method expects of the test prompts."""
    sample, served = trial.sample(trial.order[:20]), ServedTrial(trial)
    pool = served.pool(sample)
    errors = [method(trial.history)(sample, trial.test.vectors) for method in ESTIMATED.values()]
    return [*errors, pool.errors, served.expected_cents(pool)]


def test_unmeasured_lengths_are_not_expected() -> None:
    outcomes = two_kinds(
        90, {name: (kind, replace(price, output_cost_per_token=1.0)) for name, (kind, price) in TWO.items()}
    )
    trial = trials_of(outcomes, ALL_NEW)[0]
    served = ServedTrial(trial)
    cents = served.expected_cents(served.pool(trial.sample(trial.order[:20])))
    assert cents == pytest.approx(trial.test.cents)


def test_area_is_undefined_and_quality_defined_if_the_best_model_is_the_cheapest() -> None:
    results = studied(two_kinds(90, {"left": ("a", TWO["right"][1]), "right": ("b", TWO["left"][1])}))
    figures = results.methods["ours"][40]
    assert (figures.area.trials, figures.peak.mean) == pytest.approx((0, 1.0))
    assert np.isnan(results.differences["knn"][40].mean)
    assert np.isnan(figures.curve.costs).all()


def test_progress_is_reported_trial_by_trial() -> None:
    progress: list[tuple[str, int, int]] = []
    outcomes = two_kinds()
    run_study(outcomes, vectors_of(outcomes), a_plan(labels=(5,)), lambda *step: progress.append(step))
    assert progress == [("trials", 0, 2), ("trials", 1, 2), ("trials", 2, 2)]


def test_too_few_prompts_for_the_plan_are_refused_before_any_trial() -> None:
    outcomes = two_kinds(20)
    with pytest.raises(InvalidInput, match=r"40 labels.*14 prompts"):
        run_study(outcomes, vectors_of(outcomes), ALL_NEW, lambda *_: pytest.fail("it was begun"))


def test_models_without_a_common_prompt_cannot_be_compared() -> None:
    outcomes = two_kinds()
    outcomes.scores[::2, 0] = np.nan
    outcomes.scores[1::2, 1] = np.nan
    outcomes.scores[:30, 0] = np.nan
    message = (
        "no test prompt is scored for all of left, right; .* leave out 'left', which is scored on 30 of 90 prompts"
    )
    with pytest.raises(InvalidInput, match=message):
        run_study(outcomes, vectors_of(outcomes), ALL_NEW, lambda *_: pytest.fail("it was begun"))


def test_a_file_of_a_few_prompts_can_be_evaluated() -> None:
    results = studied(two_kinds(10), a_plan(labels=(1, 7), trials=3))
    assert all(0.0 <= figures.peak.mean <= 1.0 for by in results.methods.values() for figures in by.values())


BASELINES = Baselines(cheapest=1.0, best=5.0, most_expensive=9.0, best_quality=0.8)
BEST_IS_CHEAPEST = Baselines(cheapest=1.0, best=1.0, most_expensive=9.0, best_quality=0.8)


def a_line(top: float) -> Curve:
    """Return a sloped curve from the best single model's cost to the cheapest's."""
    return Curve(np.array([5.0, 1.0]), np.array([top, 0.4]))


def test_the_mean_curve_has_the_mean_area() -> None:
    found = summarize([trial_metrics(a_line(0.8), BASELINES), trial_metrics(a_line(0.6), BASELINES)], seed=0)
    assert found.area.mean == pytest.approx((0.6 + 0.5) / 2)
    assert found.curve.qualities.mean() == pytest.approx(found.area.mean)
    assert found.curve.qualities[[0, -1]] == pytest.approx([0.7, 0.4])


def test_costs_of_the_mean_curve_are_relative_to_the_best_single_models() -> None:
    costs = summarize([trial_metrics(a_line(0.8), BASELINES)], seed=0).curve.costs
    assert (costs[0], costs[-1], costs.size) == (1.0, pytest.approx(0.2), BUDGETS)
    assert (np.diff(costs) < 0).all()


def test_a_trial_without_an_area_does_not_count_for_it() -> None:
    found = summarize([trial_metrics(a_line(0.8), BASELINES), trial_metrics(a_line(0.2), BEST_IS_CHEAPEST)], seed=0)
    assert (found.area.mean, found.area.trials) == pytest.approx((0.6, 1))
    assert (found.peak.mean, found.peak.trials) == pytest.approx(((0.8 + 0.4) / 2, 2))
    assert found.curve.qualities[0] == pytest.approx(0.8)


def test_a_figure_that_no_trial_defines_is_nan() -> None:
    found = summarize([trial_metrics(a_line(0.2), BEST_IS_CHEAPEST)], seed=0)
    assert np.isnan([found.area.mean, found.area.low, found.area.high]).all()
    assert found.area.trials == 0
    assert np.isnan(found.curve.costs).all()
    assert np.isnan(found.curve.qualities).all()


def test_quality_that_is_not_reached_has_no_qnc_and_is_counted() -> None:
    found = summarize([trial_metrics(a_line(0.8), BASELINES), trial_metrics(a_line(0.6), BASELINES)], seed=0)
    assert (found.reached, found.qnc.trials, found.qnc.mean) == pytest.approx((0.5, 1, 1.0))


def test_free_quality_is_reached_although_its_qnc_is_undefined() -> None:
    free = Baselines(cheapest=0.0, best=0.0, most_expensive=9.0, best_quality=0.8)
    found = summarize([trial_metrics(a_line(0.8), free), trial_metrics(a_line(0.6), free)], seed=0)
    assert (found.reached, found.qnc.trials) == (0.5, 0)


def test_an_interval_holds_its_mean() -> None:
    area = summarize([trial_metrics(a_line(top), BASELINES) for top in (0.5, 0.6, 0.7, 0.8)], seed=0).area
    assert area.low < area.mean < area.high
