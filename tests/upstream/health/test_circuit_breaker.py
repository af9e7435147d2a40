from __future__ import annotations

from proxy.settings.schema import CircuitBreakerSettings
from proxy.upstream.circuit_breaker import PROBE_TIMEOUT_S, CircuitBreaker, FailureClass, FailureKind
from tests.upstream.health.makers import started

FAILED = FailureClass(FailureKind.TRANSIENT, "status 500")
CALLERS = FailureClass(FailureKind.CALLER_ERROR, "status 400")
UNSENT = FailureClass(FailureKind.NOT_SENT, "status 400")
OUR_KEY = FailureClass(FailureKind.OPENS_AT_ONCE, "status 401")
OUR_ADDRESS = FailureClass(FailureKind.OPENS_UNLESS_HEALTHY, "status 404")


def retry_in(seconds: float) -> FailureClass:
    return FailureClass(FailureKind.OPENS_AT_ONCE, "status 429", seconds)


def a_breaker(**policy: float) -> CircuitBreaker:
    return CircuitBreaker(CircuitBreakerSettings.model_validate(policy))


def fail(breaker: CircuitBreaker, times: int, now: float = 0.0, failure: FailureClass = FAILED) -> None:
    for _ in range(times):
        breaker.failed(started(breaker, now), failure, now)


def succeed(breaker: CircuitBreaker, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        breaker.succeeded(started(breaker, now), now)


def an_open_one() -> CircuitBreaker:
    """Open a breaker for ten seconds from 0 on."""
    breaker = a_breaker()
    fail(breaker, 5)
    return breaker


def test_the_fifth_failure_opens_it_for_the_cooldown_and_says_why() -> None:
    breaker = a_breaker()
    fail(breaker, 4)
    assert breaker.closed
    fail(breaker, 1)
    assert breaker.unavailable_s(0.0) == 10.0
    assert breaker.why == "5 of 5 attempts failed within 30 s, the last: status 500"


def test_failures_that_are_less_than_half_of_the_attempts_do_not_open_it() -> None:
    breaker = a_breaker()
    succeed(breaker, 6)
    fail(breaker, 5)
    assert breaker.closed
    fail(breaker, 1)
    assert not breaker.closed


def test_a_share_is_reached_exactly_whatever_its_binary_fraction() -> None:
    breaker = a_breaker(share=0.07, failures=7)
    succeed(breaker, 93)
    fail(breaker, 7)
    assert not breaker.closed


def test_failures_before_the_window_are_forgotten() -> None:
    breaker = a_breaker()
    fail(breaker, 4, now=0.0)
    fail(breaker, 1, now=30.0)
    assert breaker.closed


def test_abandoned_attempts_weigh_nothing() -> None:
    breaker = a_breaker()
    for _ in range(20):
        breaker.abandoned(started(breaker, 0.0))
    fail(breaker, 5)
    assert not breaker.closed


def test_after_the_cooldown_one_attempt_is_the_probe_and_others_must_wait() -> None:
    breaker = an_open_one()
    assert not started(breaker, 9.9).is_probe
    assert breaker.unavailable_s(10.0) is None
    probe = started(breaker, 10.0)
    assert probe.is_probe
    assert breaker.unavailable_s(11.0) == PROBE_TIMEOUT_S - 1
    assert not started(breaker, 11.0).is_probe
    breaker.succeeded(probe, 12.0)
    assert breaker.closed
    assert breaker.unavailable_s(12.0) is None


def test_after_it_closed_counting_starts_afresh() -> None:
    breaker = an_open_one()
    succeed(breaker, 1, now=10.0)
    fail(breaker, 4, now=10.0)
    assert breaker.closed


def test_each_failing_probe_doubles_the_cooldown_up_to_the_longest() -> None:
    breaker, now, cooldowns = an_open_one(), 0.0, []
    for _ in range(7):
        cooldowns.append(breaker.cooldown_s(now))
        now += cooldowns[-1]
        fail(breaker, 1, now)
    assert cooldowns == [10, 20, 40, 80, 160, 300, 300]
    assert breaker.why == "a probe: status 500"


def test_after_a_recovery_the_cooldown_is_the_shortest_again() -> None:
    breaker = an_open_one()
    fail(breaker, 1, now=10.0)
    succeed(breaker, 1, now=30.0)
    fail(breaker, 5, now=31.0)
    assert breaker.cooldown_s(31.0) == 10.0


def test_after_an_abandoned_probe_the_next_attempt_is_one() -> None:
    breaker = an_open_one()
    breaker.abandoned(started(breaker, 10.0))
    assert breaker.unavailable_s(10.0) is None
    assert started(breaker, 10.0).is_probe


def test_a_probe_that_never_ends_is_replaced_and_may_still_succeed_but_not_fail() -> None:
    breaker = an_open_one()
    lost = started(breaker, 10.0)
    assert not started(breaker, 10.0 + PROBE_TIMEOUT_S - 1).is_probe
    second = started(breaker, 10.0 + PROBE_TIMEOUT_S)
    assert second.is_probe
    breaker.failed(lost, FAILED, 11.0 + PROBE_TIMEOUT_S)
    assert breaker.cooldown_s(11.0 + PROBE_TIMEOUT_S) == 0
    breaker.succeeded(lost, 12.0 + PROBE_TIMEOUT_S)
    assert breaker.closed


def test_attempts_from_before_it_opened_do_not_count_after_it_closed() -> None:
    breaker = a_breaker()
    old = [started(breaker, 0.0) for _ in range(10)]
    fail(breaker, 5)
    succeed(breaker, 1, now=10.0)
    for permit in old:
        breaker.failed(permit, FAILED, 11.0)
    assert breaker.closed


def test_no_success_during_the_cooldown_ends_it() -> None:
    breaker = a_breaker()
    straggler = started(breaker, 0.0)
    fail(breaker, 5)
    breaker.succeeded(straggler, 1.0)
    succeed(breaker, 3, now=2.0)
    fail(breaker, 3, now=3.0)
    assert breaker.cooldown_s(3.0) == 7.0


def test_a_success_from_before_it_opened_is_no_probe() -> None:
    breaker = a_breaker()
    straggler = started(breaker, 0.0)
    fail(breaker, 5)
    breaker.succeeded(straggler, 11.0)
    assert started(breaker, 11.0).is_probe


def test_a_success_beside_a_slow_probe_closes_it() -> None:
    breaker = an_open_one()
    started(breaker, 10.0)
    succeed(breaker, 1, now=11.0)
    assert breaker.closed


def test_a_stated_wait_opens_it_at_once_for_no_longer_than_the_longest_cooldown() -> None:
    for retry_after, rest in ((7.0, 7.0), (0.25, 0.25), (86_400.0, 300.0)):
        breaker = a_breaker()
        fail(breaker, 1, failure=retry_in(retry_after))
        assert breaker.cooldown_s(0.0) == rest


def test_a_later_and_longer_wait_counts_also_of_attempts_that_began_before() -> None:
    breaker = a_breaker()
    old = started(breaker, 0.0)
    fail(breaker, 1, failure=retry_in(10.0))
    breaker.failed(old, retry_in(60.0), 1.0)
    assert breaker.cooldown_s(1.0) == 60.0
    fail(breaker, 1, now=2.0, failure=retry_in(5.0))
    assert breaker.cooldown_s(2.0) == 59.0


def test_a_storm_of_the_same_wait_is_one_change() -> None:
    breaker = a_breaker()
    permits = [started(breaker, 0.0) for _ in range(100)]
    for place, permit in enumerate(permits):
        breaker.failed(permit, retry_in(300.0), place / 200)
    assert (breaker.epoch, breaker.open_count) == (1, 1)


def test_a_probe_that_is_told_to_wait_opens_it_for_that_wait() -> None:
    breaker = an_open_one()
    fail(breaker, 1, now=10.0, failure=retry_in(3.0))
    assert breaker.cooldown_s(10.0) == 3.0


def test_a_refusal_of_our_own_key_opens_it_at_once_even_between_successes() -> None:
    breaker = a_breaker()
    succeed(breaker, 50)
    fail(breaker, 1, failure=OUR_KEY)
    assert breaker.cooldown_s(0.0) == 10.0


def test_one_callers_404_does_not_open_the_circuit_of_a_model_that_serves_others() -> None:
    unused, serving = a_breaker(), a_breaker()
    fail(unused, 1, failure=OUR_ADDRESS)
    succeed(serving, 4)
    fail(serving, 4, failure=OUR_ADDRESS)
    assert unused.cooldown_s(0.0) == 10.0
    assert serving.closed
    fail(serving, 1, failure=OUR_ADDRESS)
    assert serving.cooldown_s(0.0) == 10.0


def test_a_callers_mistake_proves_that_the_upstream_is_there() -> None:
    breaker = a_breaker()
    fail(breaker, 6, failure=CALLERS)
    fail(breaker, 5)
    assert breaker.closed
    probed = an_open_one()
    fail(probed, 1, now=10.0, failure=CALLERS)
    assert probed.closed


def test_a_request_that_was_never_sent_is_no_probe() -> None:
    breaker = an_open_one()
    fail(breaker, 1, now=10.0, failure=UNSENT)
    assert not breaker.closed
    assert started(breaker, 10.0).is_probe


def test_a_probe_with_content_closes_it_and_one_that_then_breaks_opens_it_for_twice_as_long() -> None:
    breaker = an_open_one()
    probe = started(breaker, 10.0)
    breaker.first_content(probe, 11.0)
    assert breaker.closed
    breaker.failed(probe, FAILED, 12.0)
    assert breaker.cooldown_s(12.0) == 20.0


def test_a_probe_that_breaks_after_others_succeeded_leaves_it_closed() -> None:
    breaker = an_open_one()
    probe = started(breaker, 10.0)
    breaker.first_content(probe, 11.0)
    succeed(breaker, 1, now=12.0)
    breaker.failed(probe, FAILED, 500.0)
    assert breaker.closed


def test_a_probe_that_answered_to_its_end_is_one_success() -> None:
    breaker = an_open_one()
    probe = started(breaker, 10.0)
    breaker.first_content(probe, 11.0)
    breaker.succeeded(probe, 12.0)
    fail(breaker, 5, now=12.0)
    assert breaker.cooldown_s(12.0) == 10.0
