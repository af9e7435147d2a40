from __future__ import annotations

import asyncio

import pytest

from proxy.dashboard.activity import INFINITE, Activity, quantile
from proxy.dashboard.curve import MIN_ANSWERS, traffic_of
from proxy.server.metrics import Metrics
from proxy.storage.snapshot import TrafficStats


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def sampled(activity: Activity, metrics: Metrics) -> None:
    """Take one sample as the background task does."""
    task = asyncio.create_task(activity.run(metrics))
    await asyncio.sleep(0)
    task.cancel()


async def test_rates_are_those_of_the_time_between_two_samples() -> None:
    clock, metrics = Clock(), Metrics()
    activity = Activity(clock)
    metrics.requests.add(("small", "scored", "complete"), 100)
    await sampled(activity, metrics)
    clock.now += 10
    metrics.requests.add(("small", "scored", "complete"), 15)
    metrics.requests.add(("large", "scored", "failed"), 5)
    metrics.attempts_failed.add(("large", "500"), 7)
    metrics.cost.add(("large",), 0.01)
    metrics.errors.add(("502",), 5)
    figures = activity.figures(metrics)

    assert (figures.requests_per_s, figures.failed_share) == (2.0, 0.25)
    assert figures.usd_per_hour == pytest.approx(3.6)
    assert [(each.model, each.share, each.attempts_failed) for each in figures.shares] == [
        ("small", 0.75, 0),
        ("large", 0.25, 7),
    ]
    assert (figures.refused, figures.total_requests) == ([("502", 5)], 120)


async def test_nothing_is_said_of_rates_before_there_are_two_samples() -> None:
    figures = Activity(Clock()).figures(Metrics())

    assert (figures.requests_per_s, figures.usd_per_hour, figures.overhead_p50_ms) == (None, None, None)
    assert figures.course == []


async def test_rates_are_those_of_the_last_minute_and_the_course_goes_on() -> None:
    clock, metrics = Clock(), Metrics()
    activity = Activity(clock)
    for _ in range(20):
        metrics.requests.add(("small", "scored", "complete"), 50)
        await sampled(activity, metrics)
        clock.now += 5
    figures = activity.figures(metrics)

    assert 60 <= figures.window_s <= 65
    assert [rate for _, rate in figures.course] == [10.0] * 19


@pytest.mark.parametrize(
    ("share", "expected"),
    # 4 up to 1 s, 4 up to 2 s, 2 beyond: the third of the first bucket's four is at three quarters of it
    [(0.3, 0.75), (0.5, 1.25), (0.8, 2.0), (0.99, 2.0)],
)
def test_a_quantile_is_linear_within_its_bucket(share: float, expected: float) -> None:
    assert quantile([(1.0, 4), (2.0, 8), (INFINITE, 10)], share) == pytest.approx(expected)


def test_an_empty_histogram_has_no_quantile() -> None:
    assert quantile([(1.0, 0), (INFINITE, 0)], 0.5) is None


def test_each_models_answers_count_as_often_as_it_was_asked() -> None:
    stats = TrafficStats(4)
    for _ in range(10):
        stats.observe("often", [0], [1.0], 5.0, 0.1)
        stats.observe("seldom", [1], [1.0], 5.0, 0.1)
    few = traffic_of(stats, {"often": MIN_ANSWERS - 1}, 1e4)
    many = traffic_of(stats, {"often": 90.0, "seldom": 10.0, "never observed": 5.0}, 1050.0)

    assert (few.mix, few.mean_prompt_tokens) == (None, None)
    assert many.mix is not None
    assert (many.mix[:2] / many.mix.sum()).tolist() == pytest.approx([0.9, 0.1])
    assert (many.answers, many.mean_prompt_tokens) == (100, 10)
