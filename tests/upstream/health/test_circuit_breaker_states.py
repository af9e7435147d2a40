from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from proxy.settings.schema import CircuitBreakerSettings
from proxy.upstream.circuit_breaker import PROBE_TIMEOUT_S, CircuitBreaker, FailureClass, FailureKind, Permit
from tests.upstream.health.makers import started

POLICY = CircuitBreakerSettings(failures=3, cooldown_s=5, longest_cooldown_s=45)
FAILURES = st.builds(
    FailureClass, st.sampled_from(FailureKind), st.just("status 500"), st.one_of(st.none(), st.floats(0.01, 1e6))
)
SECONDS = st.floats(0.01, 1e6)
ROUNDING_S = 1e-6


class BreakerMachine(RuleBasedStateMachine):
    begun = Bundle("begun")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CircuitBreaker(POLICY)
        self.now = 1000.0
        self.probes: dict[Permit, float] = {}

    @rule(target=begun)
    def begin(self) -> Permit:
        askable = self.breaker.unavailable_s(self.now) is None
        permit = started(self.breaker, self.now)
        assert permit.is_probe == (askable and not self.breaker.closed)
        if permit.is_probe:
            live = [p for p, at in self.probes.items() if p.epoch == permit.epoch and self.now < at + PROBE_TIMEOUT_S]
            assert live == []
            self.probes[permit] = self.now
        return permit

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(permit=begun)
    def first_content(self, permit: Permit) -> None:
        self.breaker.first_content(permit, self.now)

    @rule(permit=consumes(begun))
    def succeed(self, permit: Permit) -> None:
        cooling = self.breaker.cooldown_s(self.now)
        self.probes.pop(permit, None)
        self.breaker.succeeded(permit, self.now)
        assert self.breaker.cooldown_s(self.now) == cooling

    @rule(permit=consumes(begun))
    def abandon(self, permit: Permit) -> None:
        before = (self.breaker.epoch, self.breaker.cooldown_s(self.now))
        self.probes.pop(permit, None)
        self.breaker.abandoned(permit)
        assert (self.breaker.epoch, self.breaker.cooldown_s(self.now)) == before

    @rule(permit=consumes(begun), failure=FAILURES)
    def fail(self, permit: Permit, failure: FailureClass) -> None:
        cooling = self.breaker.cooldown_s(self.now)
        self.probes.pop(permit, None)
        self.breaker.failed(permit, failure, self.now)
        assert self.breaker.cooldown_s(self.now) >= cooling

    @rule(seconds=SECONDS)
    def rest(self, seconds: float) -> None:
        self.breaker.open(seconds, "said so", self.now)
        assert not self.breaker.closed

    @rule(seconds=SECONDS)
    def adopt(self, seconds: float) -> None:
        self.breaker.open_from_peer(seconds, "said elsewhere", self.now)
        assert not self.breaker.closed

    @rule()
    def lift(self) -> None:
        found = self.breaker.local_cooldown_s(self.now)
        self.breaker.close_from_peer()
        assert self.breaker.local_cooldown_s(self.now) == found

    @invariant()
    def no_cooldown_is_longer_than_the_longest(self) -> None:
        assert self.breaker.cooldown_s(self.now) <= POLICY.longest_cooldown_s + ROUNDING_S
        assert (self.breaker.unavailable_s(self.now) or 0.0) <= max(
            POLICY.longest_cooldown_s, PROBE_TIMEOUT_S
        ) + ROUNDING_S

    @invariant()
    def a_closed_circuit_is_available_and_an_open_one_says_why(self) -> None:
        if self.breaker.closed:
            assert (self.breaker.unavailable_s(self.now), self.breaker.why) == (None, None)
        else:
            assert self.breaker.why


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@given(st.lists(st.floats(0, 20), max_size=200))
def test_a_model_of_which_two_thirds_of_the_attempts_succeed_stays_closed(gaps: list[float]) -> None:
    breaker, now = CircuitBreaker(CircuitBreakerSettings()), 0.0
    for place, gap in enumerate(gaps):
        now += gap
        permit = started(breaker, now)
        if place % 3 == 2:
            breaker.failed(permit, FailureClass(FailureKind.TRANSIENT, "status 500"), now)
        else:
            breaker.succeeded(permit, now)
        assert breaker.closed


@given(st.lists(st.tuples(st.floats(0, 400), st.booleans()), max_size=60))
def test_a_model_that_answers_again_is_served_again(past: list[tuple[float, bool]]) -> None:
    breaker, now = CircuitBreaker(CircuitBreakerSettings()), 0.0
    for gap, failed in past:
        now += gap
        permit = started(breaker, now)
        if failed:
            breaker.failed(permit, FailureClass(FailureKind.TRANSIENT, "status 500"), now)
        else:
            breaker.succeeded(permit, now)
    now += CircuitBreakerSettings().longest_cooldown_s
    assert breaker.unavailable_s(now) is None
    breaker.succeeded(started(breaker, now), now)
    assert breaker.closed
