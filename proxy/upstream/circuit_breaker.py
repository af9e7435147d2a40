"""One model's circuit breaker. No clock, no Redis, no HTTP: `now` is an argument, in seconds that only grow.

closed ──(failures, or one that rests it at once)──▶ open ──(time)──▶ half-open ──(a probe)──▶ closed, or open again

Half-open is no state of its own: it is "open" whose time is over. The next attempt is then the probe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

from proxy.errors import NAMES, AnswerTooLarge, OwnFault, UpstreamError
from proxy.settings.schema import CircuitBreakerSettings

_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*", re.ASCII)

MAX_WAIT_S = 3600.0
"""What is asked for beyond it is taken for an hour, in whatever form: nobody plans further by a header."""

_MAX_VALUE = 100
"""Characters. A number or a date is shorter; what is longer is not read."""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds, above 0 and no more than LONGEST_WAIT_S; None where nothing usable is stated.

    Args:
        now: Unix seconds; a date is that far away from it.
    """
    stated = {name.lower(): value for name, value in headers.items() if len(value) <= _MAX_VALUE}
    for wait in (_number(stated.get("retry-after-ms"), 1e-3), _number(stated.get("retry-after"), 1.0)):
        if wait is not None:
            return min(wait, MAX_WAIT_S) if wait > 0 else None
    until = _until_date(stated.get("retry-after"), now)
    return None if until is None else min(until, MAX_WAIT_S)


def told_wait(headers: Mapping[str, str], now: float) -> dict[str, str]:
    """Put into the headers for a client, in lower case, the wait that counts here too, in place of the upstream's: in
    whole seconds, and in milliseconds where those were stated; none where nothing usable was."""
    told = {name.lower(): text for name, text in headers.items()}
    stated = {name for name in NAMES if told.pop(name, None) is not None}
    wait = parse_retry_after(headers, now) if stated else None
    if wait is not None:
        told["retry-after"] = str(math.ceil(wait))
        if "retry-after-ms" in stated:
            told["retry-after-ms"] = str(math.ceil(wait * 1000))
    return told


def _number(text: str | None, unit: float) -> float | None:
    return float(text) * unit if text is not None and _NUMBER.fullmatch(text) else None


def _until_date(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    try:
        wait = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return wait if wait > 0 else None


BUCKETS = 15
"""What is older than the window is forgotten a bucket at a time: between 14 and 15 fifteenths of it are looked at."""


class SlidingWindow:
    """Sixty numbers at most, however much traffic there is. `now`: seconds that do not run backwards."""

    __slots__ = ("_attempts", "_bucket_s", "_failures", "_newest")

    def __init__(self, window_s: float) -> None:
        self._bucket_s = window_s / BUCKETS
        self.clear()

    def clear(self) -> None:
        self._attempts = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self._newest: int | None = None

    def add(self, now: float, *, failed: bool) -> None:
        place = self._advance(now)
        self._attempts[place] += 1
        self._failures[place] += failed

    def counts(self, now: float) -> tuple[int, int]:
        """Attempts that ended, and those of them that failed."""
        self._advance(now)
        return sum(self._attempts), sum(self._failures)

    def _advance(self, now: float) -> int:
        current = int(now // self._bucket_s)
        newest = current if self._newest is None else self._newest
        current = max(current, newest)
        for passed in range(newest + 1, min(current, newest + BUCKETS) + 1):
            self._attempts[passed % BUCKETS] = self._failures[passed % BUCKETS] = 0
        self._newest = current
        return current % BUCKETS


class Weight(Enum):
    COUNTED = "counted"
    """Timeouts, no connection, 5xx, 408, no completion, a stream that broke, 429 without a time."""
    AT_ONCE = "at once"
    """Our key or our account is refused (401, 402), or the upstream stated how long it wants to be left alone."""
    AT_ONCE_UNLESS_SERVING = "at once, unless it serves others"
    """403, 404, 405, 410: as a rule our address or our key, which no caller can mend. But providers also answer so to
    one prompt that they moderate or to one parameter that they have no server for; a model that has just answered
    others well is not taken from them all by one caller."""
    ANSWERED = "answered"
    """400, 413, 422, a context overflow and the rest: the caller's matter, and a proof that the upstream is there."""
    UNSENT = "unsent"
    """It was refused here, before anything was sent: that says nothing of the upstream."""


@dataclass(frozen=True, slots=True)
class FailureClass:
    weight: Weight
    why: str
    """In our words: it is logged, shown to administrators and stored."""
    wait_s: float | None = None
    """What the upstream asked for."""


_OUR_ACCOUNT = frozenset({401, 402})

_OUR_ADDRESS = frozenset({403, 404, 405, 410})

_STATES_ITS_WAIT = frozenset({429, 503, 529})


def classify_failure(failure: UpstreamError, now: float) -> FailureClass:
    """`now`: Unix seconds."""
    status = failure.status
    if isinstance(failure, OwnFault):
        return FailureClass(Weight.UNSENT, "this process could not do its part")
    if isinstance(failure, AnswerTooLarge):
        return FailureClass(Weight.ANSWERED, "its answer was too large")
    if status is None:
        return FailureClass(Weight.COUNTED, "it did not answer in time" if failure.timed_out else "it gave no answer")
    why = f"status {status}"
    wait_s = parse_retry_after(failure.headers, now) if status in _STATES_ITS_WAIT else None
    if wait_s is not None:
        return FailureClass(Weight.AT_ONCE, f"{why}, to be asked again after {wait_s:.3g} s", wait_s)
    return FailureClass(_weight_of(status, sent=failure.body is not None), why)


def _weight_of(status: int, *, sent: bool) -> Weight:
    if status >= 500 or status in (408, 429):
        return Weight.COUNTED
    if status in _OUR_ACCOUNT:
        return Weight.AT_ONCE
    if status in _OUR_ADDRESS:
        return Weight.AT_ONCE_UNLESS_SERVING
    return Weight.ANSWERED if sent else Weight.UNSENT


PROBE_S = 60.0
"""A probe that has neither answered nor ended by then holds up nobody any longer."""

LONGER_BY_S = 1.0
"""A model at rest that asks for less than this much more gets no other rest: many attempts may say so at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """One attempt, as the breaker knows it again. Compared by identity."""

    epoch: int
    probe: bool


class CircuitBreaker:
    """Rests that were found here and rests that were adopted are kept apart: taking back the latter leaves the former.

    `epoch` grows with every change that others may want to hear of; reports of attempts from another epoch are stale.
    """

    def __init__(self, policy: CircuitBreakerSettings) -> None:
        self._policy = policy
        self._window = SlidingWindow(policy.window_s)
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

    def failed(self, permit: Permit, verdict: FailureClass, now: float) -> None:
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

    def _count(self, verdict: FailureClass, now: float) -> None:
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
