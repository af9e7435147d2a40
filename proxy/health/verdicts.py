"""What a failure says of the model that it came from: one table. The state that it leads to is breaker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from proxy.errors import AnswerTooLarge, OwnFault, UpstreamFailure
from proxy.health.retry_after import stated_wait_s


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
class Verdict:
    weight: Weight
    why: str
    """In our words: it is logged, shown to administrators and stored."""
    wait_s: float | None = None
    """What the upstream asked for."""


_OUR_ACCOUNT = frozenset({401, 402})
_OUR_ADDRESS = frozenset({403, 404, 405, 410})
_STATES_ITS_WAIT = frozenset({429, 503, 529})


def verdict_of(failure: UpstreamFailure, now: float) -> Verdict:
    """`now`: Unix seconds."""
    status = failure.status
    if isinstance(failure, OwnFault):
        return Verdict(Weight.UNSENT, "this process could not do its part")
    if isinstance(failure, AnswerTooLarge):
        return Verdict(Weight.ANSWERED, "its answer was too large")
    if status is None:
        return Verdict(Weight.COUNTED, "it did not answer in time" if failure.timed_out else "it gave no answer")
    why = f"status {status}"
    wait_s = stated_wait_s(failure.headers, now) if status in _STATES_ITS_WAIT else None
    if wait_s is not None:
        return Verdict(Weight.AT_ONCE, f"{why}, to be asked again after {wait_s:.3g} s", wait_s)
    return Verdict(_weight_of(status, sent=failure.body is not None), why)


def _weight_of(status: int, *, sent: bool) -> Weight:
    if status >= 500 or status in (408, 429):
        return Weight.COUNTED
    if status in _OUR_ACCOUNT:
        return Weight.AT_ONCE
    if status in _OUR_ADDRESS:
        return Weight.AT_ONCE_UNLESS_SERVING
    return Weight.ANSWERED if sent else Weight.UNSENT
