"""The health of all models: who rests, who hears of it, and what is forgotten."""

from __future__ import annotations

import logging

import pytest

from proxy.errors import UpstreamError
from proxy.server.metrics import HealthCollector
from proxy.settings.schema import CircuitBreakerSettings
from proxy.upstream.health import HealthEvent, HealthRegistry
from tests.upstream.health.makers import Clock, a_failure, fail


def a_health(clock: Clock | None = None) -> tuple[HealthRegistry, list[HealthEvent]]:
    changes: list[HealthEvent] = []
    return HealthRegistry(CircuitBreakerSettings(), clock or Clock(), changes.append, unix_time=lambda: 0.0), changes


def test_while_all_are_well_asking_who_rests_makes_nothing() -> None:
    health, _ = a_health()
    health.begin("small").succeeded()
    assert health.resting() == {}
    assert health.resting() is health.resting()


def test_only_the_failing_model_rests_and_for_how_long_is_known() -> None:
    clock = Clock()
    health, changes = a_health(clock)
    fail(health)
    health.begin("large").succeeded()
    clock.now += 4
    assert health.resting() == {"small": 6.0}
    assert changes == [HealthEvent("small", resting=True, from_elsewhere=False)]


def test_a_model_goes_through_resting_and_probing_to_well() -> None:
    clock = Clock()
    health, changes = a_health(clock)
    fail(health, status=503)
    why = "5 of 5 attempts failed within 30 s, the last: status 503"
    assert health.standing("small") == {"state": "resting", "recovers_in_s": 10.0, "why": why}
    clock.now += 10
    assert health.standing("small") == {"state": "probing", "recovers_in_s": None, "why": why}
    assert health.resting() == {}
    probe = health.begin("small")
    assert probe.is_probe
    assert set(health.resting()) == {"small"}
    probe.answering()
    probe.succeeded()
    assert health.standing("small") == {"state": "well", "recovers_in_s": None, "why": None}
    assert [change.resting for change in changes] == [True, False]


def test_the_first_end_of_an_attempt_is_its_end() -> None:
    health, _ = a_health()
    for _ in range(5):
        attempt = health.begin("small")
        attempt.succeeded()
        attempt.failed(a_failure())
        attempt.abandoned()
    fail(health, times=4)
    assert health.resting() == {}


def test_a_date_in_retry_after_is_read_by_the_wall_clock() -> None:
    health = HealthRegistry(CircuitBreakerSettings(), Clock(), unix_time=lambda: 1_800_000_000.0)
    fail(health, times=1, status=429, headers={"retry-after": "Fri, 15 Jan 2027 08:01:00 GMT"})
    assert health.resting() == {"small": 60.0}


def test_neither_log_nor_standing_repeats_the_upstreams_words(caplog: pytest.LogCaptureFixture) -> None:
    health, _ = a_health()
    with caplog.at_level(logging.DEBUG):
        fail(health, body=b"sk-canary")
    assert "small rests for 10 s" in caplog.text
    assert "canary" not in caplog.text + str(health.standing("small")) + str(health.found("small"))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("-inf")])
def test_a_rest_of_no_length_is_none(seconds: float) -> None:
    health, changes = a_health()
    health.rest("small", seconds, "garbage", from_elsewhere=True)
    health.rest("small", seconds, "garbage")
    assert (health.resting(), changes) == ({}, [])


def test_an_endless_rest_is_the_longest() -> None:
    health, _ = a_health()
    health.rest("small", float("inf"), "far away", from_elsewhere=True)
    assert health.resting() == {"small": 300.0}


def test_what_was_adopted_and_lifted_is_said_as_from_elsewhere() -> None:
    health, changes = a_health()
    health.rest("small", 20, "said elsewhere", from_elsewhere=True)
    health.rest("small", 19, "said elsewhere", from_elsewhere=True)
    assert health.found("small") is None
    health.lift("small")
    health.lift("small")
    assert changes == [HealthEvent("small", resting=resting, from_elsewhere=True) for resting in (True, False)]


def test_a_forgotten_model_is_well_and_attempts_on_what_it_was_say_nothing_of_it() -> None:
    health, changes = a_health()
    old = [health.begin("small") for _ in range(10)]
    fail(health)
    health.forget("small")
    for attempt in old:
        attempt.failed(a_failure())
    assert health.resting() == {}
    assert [change.resting for change in changes] == [True, False]
    assert health.opened() == {}


def test_what_still_runs_on_a_model_as_it_was_cannot_rest_what_it_is_now() -> None:
    health, changes = a_health()
    old = [health.begin("small") for _ in range(10)]
    health.forget("small")
    for attempt in old:
        attempt.failed(a_failure(429, headers={"retry-after": "60"}))
    assert (health.resting(), changes) == ({}, [])


def test_forgetting_one_that_was_well_is_no_change() -> None:
    health, changes = a_health()
    health.begin("small").succeeded()
    health.forget("small")
    health.forget("never-heard-of")
    assert changes == []


def test_the_memory_for_models_is_bounded_and_the_resting_are_the_last_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.health.MAX_MODELS", 3)
    health, _ = a_health()
    fail(health)
    for number in range(20):
        health.begin(f"model-{number}").succeeded()
    assert len(health.opened()) == 3
    assert set(health.resting()) == {"small"}
    for number in range(5):
        fail(health, f"model-{number}")
    assert len(health.opened()) == len(health.resting()) == 3


def test_metrics_have_a_series_for_each_registered_model_and_for_no_other() -> None:
    health, _ = a_health()
    registered = {"small", "large"}
    fail(health)
    fail(health, "removed")
    gauge, counter = HealthCollector(health, lambda: registered).collect()
    assert {s.labels["model"]: s.value for s in gauge.samples} == {"small": 1.0, "large": 0.0}
    assert {s.labels["model"]: s.value for s in counter.samples} == {"small": 1.0, "large": 0.0}
    assert [gauge.samples[0].name, counter.samples[0].name] == [
        "uniroute_model_resting",
        "uniroute_breaker_opened_total",
    ]


def test_adopted_rests_are_not_counted_again_by_every_process() -> None:
    health, _ = a_health()
    health.rest("small", 20, "said elsewhere", from_elsewhere=True)
    assert health.opened() == {"small": 0}


def test_a_dead_connection_and_a_timeout_count_alike() -> None:
    health, _ = a_health()
    for number in range(5):
        health.begin("small").failed(UpstreamError("x", timed_out=number % 2 == 0))
    assert set(health.resting()) == {"small"}
