from __future__ import annotations

import asyncio
import logging

import pytest

from proxy.errors import UpstreamError
from proxy.server.metrics import HealthCollector
from proxy.settings.schema import CircuitBreakerSettings
from proxy.upstream.concurrency_limit import ConcurrencyLimiter, ConcurrencyLimits
from proxy.upstream.health import HealthEvent, HealthRegistry
from tests.upstream.health.makers import Clock, a_failure, fail


def a_health(clock: Clock | None = None) -> tuple[HealthRegistry, list[HealthEvent]]:
    changes: list[HealthEvent] = []
    return HealthRegistry(CircuitBreakerSettings(), clock or Clock(), changes.append, unix_time=lambda: 0.0), changes


def test_without_an_open_circuit_no_mapping_is_made() -> None:
    health, _ = a_health()
    health.start_attempt("small").succeeded()
    assert health.cooling_down() == {}
    assert health.cooling_down() is health.cooling_down()


def test_only_the_failing_model_cools_down_and_for_how_long_is_known() -> None:
    clock = Clock()
    health, changes = a_health(clock)
    fail(health)
    health.start_attempt("large").succeeded()
    clock.now += 4
    assert health.cooling_down() == {"small": 6.0}
    assert changes == [HealthEvent("small", is_open=True, from_peer=False)]


def test_a_model_goes_through_resting_and_probing_to_well() -> None:
    clock = Clock()
    health, changes = a_health(clock)
    fail(health, status=503)
    why = "5 of 5 attempts failed within 30 s, the last: status 503"
    assert health.status("small") == {"state": "resting", "recovers_in_s": 10.0, "why": why}
    clock.now += 10
    assert health.status("small") == {"state": "probing", "recovers_in_s": None, "why": why}
    assert health.cooling_down() == {}
    probe = health.start_attempt("small")
    assert probe.is_probe
    assert set(health.cooling_down()) == {"small"}
    probe.first_content()
    probe.succeeded()
    assert health.status("small") == {"state": "well", "recovers_in_s": None, "why": None}
    assert [change.is_open for change in changes] == [True, False]


def test_the_first_end_of_an_attempt_is_its_end() -> None:
    health, _ = a_health()
    for _ in range(5):
        attempt = health.start_attempt("small")
        attempt.succeeded()
        attempt.failed(a_failure())
        attempt.abandoned()
    fail(health, times=4)
    assert health.cooling_down() == {}


async def test_an_attempt_gives_its_slot_back_once() -> None:
    health, _ = a_health()
    limiter, one = ConcurrencyLimiter(), ConcurrencyLimits(max_parallel=1, max_queued=2)
    attempt = health.start_attempt("small", limiter, await limiter.acquire("small", one))
    waiting = [asyncio.create_task(limiter.acquire("small", one)) for _ in range(2)]
    await asyncio.sleep(0)
    attempt.succeeded()
    attempt.abandoned()
    for _ in range(5):
        await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False]
    limiter.release("small", await waiting[0])
    limiter.release("small", await waiting[1])


def test_a_deadline_of_the_callers_own_says_nothing_of_the_model() -> None:
    health, _ = a_health()
    for _ in range(10):
        attempt = health.start_attempt("small")
        attempt.is_cut_short = True
        attempt.failed(UpstreamError("too slow", timed_out=True))
    assert health.cooling_down() == {}


def test_a_date_in_retry_after_is_read_by_the_wall_clock() -> None:
    health = HealthRegistry(CircuitBreakerSettings(), Clock(), unix_time=lambda: 1_800_000_000.0)
    fail(health, times=1, status=429, headers={"retry-after": "Fri, 15 Jan 2027 08:01:00 GMT"})
    assert health.cooling_down() == {"small": 60.0}


def test_neither_log_nor_status_repeats_the_upstreams_words(caplog: pytest.LogCaptureFixture) -> None:
    health, _ = a_health()
    with caplog.at_level(logging.DEBUG):
        fail(health, body=b"sk-canary")
    assert "small rests for 10 s" in caplog.text
    assert "canary" not in caplog.text + str(health.status("small")) + str(health.local_cooldown("small"))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("-inf")])
def test_a_cooldown_without_length_is_ignored(seconds: float) -> None:
    health, changes = a_health()
    health.open("small", seconds, "garbage", from_peer=True)
    health.open("small", seconds, "garbage")
    assert (health.cooling_down(), changes) == ({}, [])


def test_an_endless_cooldown_is_the_longest() -> None:
    health, _ = a_health()
    health.open("small", float("inf"), "far away", from_peer=True)
    assert health.cooling_down() == {"small": 300.0}


def test_what_a_peer_opened_and_closed_is_an_event_from_a_peer() -> None:
    health, changes = a_health()
    health.open("small", 20, "said elsewhere", from_peer=True)
    health.open("small", 19, "said elsewhere", from_peer=True)
    assert health.local_cooldown("small") is None
    health.close_from_peer("small")
    health.close_from_peer("small")
    assert changes == [HealthEvent("small", is_open=is_open, from_peer=True) for is_open in (True, False)]


def test_a_reset_model_is_well_and_its_earlier_attempts_do_not_count() -> None:
    health, changes = a_health()
    old = [health.start_attempt("small") for _ in range(10)]
    fail(health)
    health.reset("small")
    for attempt in old:
        attempt.failed(a_failure())
    assert health.cooling_down() == {}
    assert [change.is_open for change in changes] == [True, False]
    assert health.open_counts() == {}


def test_earlier_attempts_cannot_open_the_circuit_of_a_model_that_was_reset() -> None:
    health, changes = a_health()
    old = [health.start_attempt("small") for _ in range(10)]
    health.reset("small")
    for attempt in old:
        attempt.failed(a_failure(429, headers={"retry-after": "60"}))
    assert (health.cooling_down(), changes) == ({}, [])


def test_resetting_a_healthy_model_is_no_event() -> None:
    health, changes = a_health()
    health.start_attempt("small").succeeded()
    health.reset("small")
    health.reset("never-heard-of")
    assert changes == []


def test_the_memory_for_models_is_bounded_and_open_circuits_are_the_last_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.health.MAX_MODELS", 3)
    health, _ = a_health()
    fail(health)
    for number in range(20):
        health.start_attempt(f"model-{number}").succeeded()
    assert len(health.open_counts()) == 3
    assert set(health.cooling_down()) == {"small"}
    for number in range(5):
        fail(health, f"model-{number}")
    assert len(health.open_counts()) == len(health.cooling_down()) == 3


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


def test_what_a_peer_opened_is_not_counted_again_by_every_process() -> None:
    health, _ = a_health()
    health.open("small", 20, "said elsewhere", from_peer=True)
    assert health.open_counts() == {"small": 0}


def test_a_dead_connection_and_a_timeout_count_alike() -> None:
    health, _ = a_health()
    for number in range(5):
        health.start_attempt("small").failed(UpstreamError("x", timed_out=number % 2 == 0))
    assert set(health.cooling_down()) == {"small"}
