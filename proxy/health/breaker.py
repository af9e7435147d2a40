"""One model's circuit breaker. No clock, no Redis, no HTTP: `now` is an argument, in seconds that only grow.

closed ──(failures, or one that rests it at once)──▶ open ──(time)──▶ half-open ──(a probe)──▶ closed, or open again

Half-open is no state of its own: it is "open" whose time is over. The next attempt is then the probe.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.health.verdicts import Verdict, Weight
from proxy.health.window import Window
from proxy.settings.schema import HealthPolicy

PROBE_S = 60.0
"""A probe that has neither answered nor ended by then holds up nobody any longer."""
LONGER_BY_S = 1.0
"""A model at rest that asks for less than this much more gets no other rest: many attempts may say so at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """One attempt, as the breaker knows it again. Compared by identity."""

    epoch: int
    probe: bool


class Breaker:
    """Rests that were found here and rests that were adopted are kept apart: taking back the latter leaves the former.

    `epoch` grows with every change that others may want to hear of; reports of attempts from another epoch are stale.
    """

    def __init__(self, policy: HealthPolicy) -> None:
        self._policy = policy
        self._window = Window(policy.window_s)
        self._found_until: float | None = None
        self._adopted_until: float | None = None
        self._last_rest_s = 0.0
        self._probe: Permit | None = None
        self._probe_until = 0.0
        self._confirming: Permit | None = None
        self.epoch = 0
        self.opened = 0
        """How often it was opened by what was found here."""
        self.why: str | None = None

    @property
    def closed(self) -> bool:
        return self._found_until is None and self._adopted_until is None

    def found_s(self, now: float) -> float | None:
        """Seconds left of the rest that was found here, 0 when they are over; None if there is none."""
        return None if self._found_until is None else max(0.0, self._found_until - now)

    def cooling_s(self, now: float) -> float:
        """Seconds until it is half-open; 0 when it is, or closed."""
        if self.closed:
            return 0.0
        return max(now, *(until for until in (self._found_until, self._adopted_until) if until is not None), now) - now

    def resting_s(self, now: float) -> float | None:
        """Seconds until it may be asked, at the latest; None: now."""
        cooling = self.cooling_s(now)
        if cooling > 0:
            return cooling
        return self._probe_until - now if self._probing(now) else None

    def begin(self, now: float) -> Permit:
        if self.closed or self.cooling_s(now) > 0 or self._probing(now):
            return Permit(self.epoch, probe=False)
        self._probe = Permit(self.epoch, probe=True)
        self._probe_until = now + PROBE_S
        return self._probe

    def answering(self, permit: Permit, now: float) -> None:
        """Content has come. A probe need not keep others waiting for its last token; it still has to end well."""
        if permit is self._probe and self.cooling_s(now) == 0:
            self._close()
            self._confirming = permit

    def succeeded(self, permit: Permit, now: float) -> None:
        """Closes it once its time is over. A success before then, of one that was asked all the same, changes nothing:
        an upstream that is overloaded or asked for a pause gets it whole."""
        if permit is not self._confirming and permit.epoch != self.epoch:
            return
        self.abandoned(permit)
        if self.cooling_s(now) > 0:
            return
        if not self.closed:
            self._close()
        self._confirming = None  # whoever else succeeded has confirmed it too
        self._last_rest_s = 0.0
        self._window.add(now, failed=False)

    def abandoned(self, permit: Permit) -> None:
        if permit is self._probe:
            self._probe = None
        if permit is self._confirming:
            self._confirming = None

    def failed(self, permit: Permit, verdict: Verdict, now: float) -> None:
        if verdict.weight is Weight.UNSENT:
            self.abandoned(permit)
        elif verdict.weight is Weight.ANSWERED:
            self.succeeded(permit, now)
        elif permit is self._probe or permit is self._confirming:
            self._open(self._next_rest_s if verdict.wait_s is None else verdict.wait_s, f"a probe: {verdict.why}", now)
        elif verdict.wait_s is not None:  # news, however long ago the attempt began
            self.rest(verdict.wait_s, verdict.why, now)
        elif self.closed and permit.epoch == self.epoch:
            self._count(verdict, now)

    def rest(self, seconds: float, why: str, now: float) -> None:
        """Found here. A rest that lasts longer already stays."""
        seconds = min(seconds, self._policy.longest_cooldown_s)
        if self.closed or seconds > self.cooling_s(now) + LONGER_BY_S:
            self._open(seconds, why, now)

    def adopt(self, seconds: float, why: str, now: float) -> None:
        """Found elsewhere, and over in so many seconds."""
        seconds = min(seconds, self._policy.longest_cooldown_s)
        self._last_rest_s = max(self._last_rest_s, seconds)
        if self.closed:
            self._begin_rest(why)
        self._adopted_until = now + seconds

    def lift(self) -> None:
        """Whoever found it failing says that it is well."""
        adopted, self._adopted_until = self._adopted_until, None
        if adopted is not None and self.closed:
            self._close()
            self._last_rest_s = 0.0

    def _count(self, verdict: Verdict, now: float) -> None:
        attempts, failures = self._window.counts(now)
        serving = attempts > failures
        if verdict.weight is Weight.AT_ONCE or (verdict.weight is Weight.AT_ONCE_UNLESS_SERVING and not serving):
            return self._open(self._next_rest_s, verdict.why, now)
        self._window.add(now, failed=True)
        attempts, failures = attempts + 1, failures + 1
        if failures >= self._policy.failures and failures / attempts >= self._policy.share:
            within = f"{failures} of {attempts} attempts failed within {self._policy.window_s:g} s"
            self._open(self._next_rest_s, f"{within}, the last: {verdict.why}", now)
        return None

    @property
    def _next_rest_s(self) -> float:
        return max(self._policy.cooldown_s, 2 * self._last_rest_s)

    def _open(self, seconds: float, why: str, now: float) -> None:
        self.opened += self.cooling_s(now) == 0
        self._last_rest_s = min(seconds, self._policy.longest_cooldown_s)
        self._found_until = now + self._last_rest_s
        self._begin_rest(why)

    def _begin_rest(self, why: str) -> None:
        self.why = why
        self.epoch += 1
        self._probe = self._confirming = None

    def _close(self) -> None:
        self._found_until = self._adopted_until = self.why = None
        self.epoch += 1
        self._probe = self._confirming = None
        self._window.clear()

    def _probing(self, now: float) -> bool:
        return self._probe is not None and now < self._probe_until
