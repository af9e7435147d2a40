"""The circuit breaker of one model. `now` is always an argument, in monotonic seconds: no clock, no Redis, no HTTP.

closed ──(failures, or one that opens it at once)──▶ open ──(time)──▶ half-open ──(a probe)──▶ closed, or open again

Half-open is no state of its own: it is "open" whose cooldown is over. The next attempt is then the probe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

from proxy.errors import RETRY_AFTER_HEADERS, LocalFailure, ResponseTooLarge, UpstreamError
from proxy.settings.schema import CircuitBreakerSettings

_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*", re.ASCII)

# Longer waits are taken for this one, in whatever form they are stated: nobody plans further by a header.
MAX_RETRY_AFTER_S = 3600.0

# A number or a date is shorter; longer values are not read.
_MAX_VALUE_CHARS = 100


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Read how long an upstream wants to be left alone.

    Args:
        now: Unix seconds, to which a date is compared.

    Returns:
        Seconds above 0, at most MAX_RETRY_AFTER_S; None if nothing usable is stated.
    """
    stated = {name.lower(): value for name, value in headers.items() if len(value) <= _MAX_VALUE_CHARS}
    for wait in (_scaled(stated.get("retry-after-ms"), 1e-3), _scaled(stated.get("retry-after"), 1.0)):
        if wait is not None:
            return min(wait, MAX_RETRY_AFTER_S) if wait > 0 else None
    until = _seconds_until(stated.get("retry-after"), now)
    return None if until is None else min(until, MAX_RETRY_AFTER_S)


def retry_after_headers(headers: Mapping[str, str], now: float) -> dict[str, str]:
    """Replace the wait in an upstream's headers by the one that the circuit breaker uses.

    Names come back in lower case. The wait is in whole seconds, and in milliseconds too if those were stated; an
    unusable one is left out.
    """
    shown = {name.lower(): text for name, text in headers.items()}
    stated = {name for name in RETRY_AFTER_HEADERS if shown.pop(name, None) is not None}
    wait = parse_retry_after(headers, now) if stated else None
    if wait is not None:
        shown["retry-after"] = str(math.ceil(wait))
        if "retry-after-ms" in stated:
            shown["retry-after-ms"] = str(math.ceil(wait * 1000))
    return shown


def _scaled(text: str | None, unit_s: float) -> float | None:
    return float(text) * unit_s if text is not None and _NUMBER.fullmatch(text) else None


def _seconds_until(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    try:
        wait = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return wait if wait > 0 else None


# The window moves by whole buckets, so that between 14 and 15 fifteenths of it are counted.
BUCKETS = 15


class SlidingWindow:
    """Count the attempts and failures of the last seconds, in a fixed amount of memory.

    `now` must not run backwards.
    """

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
        """Return how many attempts ended, and how many of these failed."""
        self._advance(now)
        return sum(self._attempts), sum(self._failures)

    def _advance(self, now: float) -> int:
        current = int(now // self._bucket_s)
        if current == self._newest:
            return current % BUCKETS
        newest = current if self._newest is None else self._newest
        current = max(current, newest)
        for passed in range(newest + 1, min(current, newest + BUCKETS) + 1):
            self._attempts[passed % BUCKETS] = self._failures[passed % BUCKETS] = 0
        self._newest = current
        return current % BUCKETS


class FailureKind(Enum):
    # Timeouts, no connection, 5xx, 408, no completion, a broken stream, 429 without a time.
    TRANSIENT = "transient"
    # Our key or our account is refused (401, 402), or the upstream stated how long it wants to be left alone.
    OPENS_AT_ONCE = "opens at once"
    # 403, 404, 405, 410: as a rule our address or our key, which no caller can mend. But providers also answer so to
    # one prompt that they moderate, or to one parameter that no server of theirs supports. A model that has just
    # answered other callers well must not be lost to all of them because of one.
    OPENS_UNLESS_HEALTHY = "opens unless healthy"
    # 400, 413, 422, a context overflow and the rest: the caller's matter, and a proof that the upstream is there.
    CALLER_ERROR = "caller error"
    # Refused here, before anything was sent: that says nothing of the upstream.
    NOT_SENT = "not sent"


@dataclass(frozen=True, slots=True)
class FailureClass:
    kind: FailureKind
    why: str
    """In our words: it is logged, shown to administrators and stored."""
    wait_s: float | None = None
    """How long the upstream wants to be left alone."""


_ACCOUNT_STATUSES = frozenset({401, 402})

_ADDRESS_STATUSES = frozenset({403, 404, 405, 410})

_RETRY_AFTER_STATUSES = frozenset({429, 503, 529})


def classify_failure(failure: UpstreamError, now: float) -> FailureClass:
    """Decide what a failure says of the model. `now`: Unix seconds."""
    status = failure.status
    if isinstance(failure, LocalFailure):
        return FailureClass(FailureKind.NOT_SENT, "this process could not do its part")
    if isinstance(failure, ResponseTooLarge):
        return FailureClass(FailureKind.CALLER_ERROR, "its answer was too large")
    if status is None:
        why = "it did not answer in time" if failure.timed_out else "it gave no answer"
        return FailureClass(FailureKind.TRANSIENT, why)
    why = f"status {status}"
    wait_s = parse_retry_after(failure.headers, now) if status in _RETRY_AFTER_STATUSES else None
    if wait_s is not None:
        return FailureClass(FailureKind.OPENS_AT_ONCE, f"{why}, to be asked again after {wait_s:.3g} s", wait_s)
    return FailureClass(_kind_of(status, sent=failure.body is not None), why)


def _kind_of(status: int, *, sent: bool) -> FailureKind:
    if status >= 500 or status in (408, 429):
        return FailureKind.TRANSIENT
    if status in _ACCOUNT_STATUSES:
        return FailureKind.OPENS_AT_ONCE
    if status in _ADDRESS_STATUSES:
        return FailureKind.OPENS_UNLESS_HEALTHY
    return FailureKind.CALLER_ERROR if sent else FailureKind.NOT_SENT


# A probe that has neither answered nor ended by then holds up nobody any longer.
PROBE_TIMEOUT_S = 60.0

# A wait that is longer than the running cooldown by less than this changes nothing: many attempts may state it at once.
MIN_EXTENSION_S = 1.0


class Permit:
    """One attempt, as its circuit breaker recognises it: by identity."""

    __slots__ = ("epoch", "is_probe")

    def __init__(self) -> None:
        self.epoch = 0
        self.is_probe = False


class CircuitBreaker:
    """Decide from the ends of attempts whether a model may be asked.

    A cooldown that was found here and one that a peer (another process) found are kept apart: when the peer takes its
    own back, ours stays. `epoch` grows with every change that peers may want to hear of. The ends of attempts that
    began in another epoch are stale.
    """

    def __init__(self, settings: CircuitBreakerSettings) -> None:
        self._settings = settings
        self._window = SlidingWindow(settings.window_s)
        self._local_until: float | None = None
        self._peer_until: float | None = None
        self._last_cooldown_s = 0.0
        self._probe: Permit | None = None
        self._probe_until = 0.0
        self._confirming: Permit | None = None
        self.epoch = 0
        # How often it was opened by what was found here.
        self.open_count = 0
        self.why: str | None = None

    @property
    def closed(self) -> bool:
        return self._local_until is None and self._peer_until is None

    def local_cooldown_s(self, now: float) -> float | None:
        """Return the seconds left of the cooldown that was found here, 0 when it is over; None if there is none."""
        return None if self._local_until is None else max(0.0, self._local_until - now)

    def cooldown_s(self, now: float) -> float:
        """Return the seconds until it is half-open; 0 when it is, or is closed."""
        if self.closed:
            return 0.0
        return max(now, *(until for until in (self._local_until, self._peer_until) if until is not None), now) - now

    def unavailable_s(self, now: float) -> float | None:
        """Return the seconds until the model may be asked, at the latest; None: it may be asked now."""
        cooldown_s = self.cooldown_s(now)
        if cooldown_s > 0:
            return cooldown_s
        return self._probe_until - now if self._is_probing(now) else None

    def start(self, permit: Permit, now: float) -> None:
        """Let an attempt begin; the first one after a cooldown is the probe."""
        permit.epoch = self.epoch
        if self.closed or self.cooldown_s(now) > 0 or self._is_probing(now):
            return
        permit.is_probe = True
        self._probe, self._probe_until = permit, now + PROBE_TIMEOUT_S

    def first_content(self, permit: Permit, now: float) -> None:
        """Close after a probe's first content, so that nobody waits for its last token. It still has to end well."""
        if permit is self._probe and self.cooldown_s(now) == 0:
            self._close()
            self._confirming = permit

    def succeeded(self, permit: Permit, now: float) -> None:
        """Close once the cooldown is over.

        An earlier success, of a model that was asked all the same, changes nothing: an upstream that is overloaded or
        asked for a pause gets all of it.
        """
        if permit is not self._confirming and permit.epoch != self.epoch:
            return
        self.abandoned(permit)
        if not self.closed:
            if self.cooldown_s(now) > 0:
                return
            self._close()
        self._confirming = None  # another success has confirmed it too
        self._last_cooldown_s = 0.0
        self._window.add(now, failed=False)

    def abandoned(self, permit: Permit) -> None:
        """Forget an attempt whose end says nothing of the model."""
        if permit is self._probe:
            self._probe = None
        if permit is self._confirming:
            self._confirming = None

    def failed(self, permit: Permit, failure: FailureClass, now: float) -> None:
        if failure.kind is FailureKind.NOT_SENT:
            self.abandoned(permit)
        elif failure.kind is FailureKind.CALLER_ERROR:
            self.succeeded(permit, now)
        elif permit is self._probe or permit is self._confirming:
            wait_s = self._next_cooldown_s if failure.wait_s is None else failure.wait_s
            self._open_for(wait_s, f"a probe: {failure.why}", now)
        elif failure.wait_s is not None:  # news, however long ago the attempt began
            self.open(failure.wait_s, failure.why, now)
        elif self.closed and permit.epoch == self.epoch:
            self._count(failure, now)

    def open(self, seconds: float, why: str, now: float) -> None:
        """Open for a reason found here. A cooldown that lasts longer already stays."""
        seconds = min(seconds, self._settings.longest_cooldown_s)
        if self.closed or seconds > self.cooldown_s(now) + MIN_EXTENSION_S:
            self._open_for(seconds, why, now)

    def open_from_peer(self, seconds: float, why: str, now: float) -> None:
        """Open for as long as another process says that its circuit is open."""
        seconds = min(seconds, self._settings.longest_cooldown_s)
        self._last_cooldown_s = max(self._last_cooldown_s, seconds)
        if self.closed:
            self._start_cooldown(why)
        self._peer_until = now + seconds

    def close_from_peer(self) -> None:
        """Close a circuit that another process opened and has now closed."""
        opened, self._peer_until = self._peer_until, None
        if opened is not None and self.closed:
            self._close()
            self._last_cooldown_s = 0.0

    def _count(self, failure: FailureClass, now: float) -> None:
        attempts, failures = self._window.counts(now)
        healthy = attempts > failures
        if failure.kind is FailureKind.OPENS_AT_ONCE or (
            failure.kind is FailureKind.OPENS_UNLESS_HEALTHY and not healthy
        ):
            self._open_for(self._next_cooldown_s, failure.why, now)
            return
        self._window.add(now, failed=True)
        attempts, failures = attempts + 1, failures + 1
        if failures >= self._settings.failures and failures / attempts >= self._settings.share:
            within = f"{failures} of {attempts} attempts failed within {self._settings.window_s:g} s"
            self._open_for(self._next_cooldown_s, f"{within}, the last: {failure.why}", now)

    @property
    def _next_cooldown_s(self) -> float:
        return max(self._settings.cooldown_s, 2 * self._last_cooldown_s)

    def _open_for(self, seconds: float, why: str, now: float) -> None:
        self.open_count += self.cooldown_s(now) == 0
        self._last_cooldown_s = min(seconds, self._settings.longest_cooldown_s)
        self._local_until = now + self._last_cooldown_s
        self._start_cooldown(why)

    def _start_cooldown(self, why: str) -> None:
        self.why = why
        self.epoch += 1
        self._probe = self._confirming = None

    def _close(self) -> None:
        self._local_until = self._peer_until = self.why = None
        self.epoch += 1
        self._probe = self._confirming = None
        self._window.clear()

    def _is_probing(self, now: float) -> bool:
        return self._probe is not None and now < self._probe_until
