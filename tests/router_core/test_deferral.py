from __future__ import annotations

import numpy as np
import pytest

from router_core.calibration import DEFAULT_PARAMS
from router_core.clustering import ClusterMap
from router_core.deferral import DeferralCurve, deferral_curve, prompt_weights, split_labels
from router_core.estimators import RAW
from router_core.pool import CachedEstimator, Candidate, Pool
from router_core.profiles import Profile
from router_core.scoring import ScoringParams
from router_core.types import Assignment, Doubles, Price
from tests.router_core.makers import an_assignment

TWO = ClusterMap(np.eye(2, dtype=np.float32), embedder_id="corners", top=1)
CENTS = ScoringParams(cost_unit="cents", tie=0.0)
# So many labels that no half of them is lucky.
MANY = 1e8


def a_curve(
    rates: dict[str, tuple[float, ...]],
    prices: dict[str, float],
    assignment: Assignment,
    *,
    labels: float = MANY,
    mix: Doubles | None = None,
    params: ScoringParams = CENTS,
) -> DeferralCurve:
    """Return the curve of models whose answers have 100 tokens, at so many dollars per token."""

    def profile(errors: tuple[float, ...]) -> Profile:
        counts, answers = np.full(2, labels), np.ones(2)
        return Profile(TWO.id, np.array(errors) * counts, counts, 100 * answers, 0 * answers, answers, answers)

    profiles = {name: profile(errors) for name, errors in rates.items()}
    candidates = [Candidate(name, profiles[name], Price(0.0, prices[name])) for name in rates]
    pool = Pool.build(candidates, TWO, CachedEstimator(TWO, RAW))
    prompt_tokens = np.zeros(len(assignment))
    return deferral_curve(pool, profiles, TWO, assignment, prompt_tokens, mix=mix, estimator=RAW, params=params)


def cheap_and_dear(**more: object) -> DeferralCurve:
    """At 0.01 and 0.1 cents a request, the dear model is 0.45 better on the second cluster and 0.09 on the first.

    Each costs the other's prompts from λ = 0.09 ÷ 0.09 = 1 and 0.45 ÷ 0.09 = 5 on.
    """
    rates = {"cheap": (0.19, 0.55), "dear": (0.1, 0.1)}
    return a_curve(rates, {"cheap": 1e-6, "dear": 1e-5}, an_assignment(0, 0, 0, 1), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lambda_", "quality", "usd", "cheap"),
    [
        (0.5, 0.9, 1e-3, 0.0),
        # three of four prompts at 0.81 for $0.0001, one at 0.9 for $0.001
        (2.0, 0.8325, 0.000325, 0.75),
        # 3 × 0.81 and 0.45
        (6.0, 0.72, 1e-4, 1.0),
    ],
)
def test_quality_cost_and_shares_at_a_lambda_match_those_computed_by_hand(
    lambda_: float, quality: float, usd: float, cheap: float
) -> None:
    point = cheap_and_dear().at(lambda_)

    assert (point.quality, point.usd) == pytest.approx((quality, usd), rel=1e-3)
    assert point.shares == pytest.approx({"cheap": cheap, "dear": 1 - cheap})


def test_prompts_count_as_the_traffic_visits_their_clusters() -> None:
    point = cheap_and_dear(mix=np.array([1.0, 3.0])).at(2.0)

    # a quarter of the traffic at 0.81, three quarters at 0.9
    assert point.quality == pytest.approx(0.8775, rel=1e-3)
    assert point.shares["cheap"] == pytest.approx(0.25)


def test_weights_follow_the_mix_and_are_even_without_one() -> None:
    clusters = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])

    assert prompt_weights(clusters, None).tolist() == [0.25] * 4
    assert prompt_weights(clusters, np.zeros(2)).tolist() == [0.25] * 4
    # the first cluster has 2.5 of the 4 prompts and half of the traffic: 0.5 ÷ 0.625 = 0.8, the second 0.5 ÷ 0.375
    expected = np.array([0.8, 0.8, (0.8 + 4 / 3) / 2, 4 / 3])
    assert prompt_weights(clusters, np.array([7.0, 7.0])) == pytest.approx(expected / expected.sum())


def test_luck_with_few_labels_makes_no_model_look_better_than_it_is() -> None:
    rng = np.random.default_rng(1)
    names = [f"m{number:02}" for number in range(30)]
    # all are wrong on half of all prompts; eight labels in each cluster say otherwise of some
    rates = {name: tuple(rng.binomial(8, 0.5, size=2) / 8) for name in names}
    curve = a_curve(rates, dict.fromkeys(names, 1e-6), an_assignment(0, 1), labels=8.0)

    assert curve.sweep.at(0.0).quality > 0.8
    assert curve.at(0.0).quality == pytest.approx(0.5, abs=0.1)


def test_the_bounds_are_those_of_the_beta_distribution() -> None:
    curve = a_curve({"only": (0.5, 0.5)}, {"only": 1e-6}, an_assignment(0), labels=98.5)
    single = curve.singles()[0]

    # labels 98.5, shrinkage 0.5, one more: 0.5 × 0.5 ÷ 100 is the square of 0.05
    assert (single.high - single.low) / 2 == pytest.approx(1.645 * 0.05)
    assert single.quality == pytest.approx((single.low + single.high) / 2) == pytest.approx(0.5, abs=0.02)
    assert single.usd == pytest.approx(1e-4)


def test_the_curve_meets_the_models_that_it_sends_all_prompts_to() -> None:
    curve = cheap_and_dear(labels=5.0)
    cheap, dear = curve.singles()

    assert curve.at(1e6).quality == pytest.approx(cheap.quality)
    assert (cheap.usd, dear.usd) == pytest.approx((1e-4, 1e-3))


def test_the_curve_goes_from_the_best_model_to_the_cheapest() -> None:
    points = cheap_and_dear(params=ScoringParams(cost_unit="cents")).points()

    assert points[0].lambda_ == 0
    assert points[0].shares["dear"] == points[-1].shares["cheap"] == 1
    assert [point.usd for point in points] == sorted((point.usd for point in points), reverse=True)


def test_the_halves_of_whole_labels_add_up_to_them() -> None:
    labels = np.array([[7.0, 4.0, 0.0]])
    sums = np.array([[3.0, 4.0, 0.0]])

    for (wrong, counted), (other_wrong, other_counted) in split_labels(sums, labels, 20, seed=0):
        assert (wrong + other_wrong).tolist() == sums.tolist()
        assert (counted + other_counted).tolist() == labels.tolist()
        assert abs(counted - other_counted).max() <= 1


def test_halves_of_parts_of_labels_keep_their_means() -> None:
    drawn = [half for pair in split_labels(np.full((1, 500), 0.3), np.full((1, 500), 1.2), 20, seed=0) for half in pair]

    assert np.mean([counted for _, counted in drawn]) == pytest.approx(0.6, abs=0.02)
    assert np.mean([wrong for wrong, _ in drawn]) == pytest.approx(0.15, abs=0.02)


def test_the_same_seed_gives_the_same_curve() -> None:
    one, other = (cheap_and_dear(labels=5.0, params=DEFAULT_PARAMS).at(0.1) for _ in range(2))

    assert one == other
