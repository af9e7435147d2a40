"""The health of every model as this process knows it: who rests, who may be asked. Waits for nothing, asks nobody."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from proxy.errors import UpstreamFailure
from proxy.health.breaker import Breaker, Permit
from proxy.health.verdicts import verdict_of
from proxy.settings.schema import HealthPolicy

log = logging.getLogger("uniroute.health")

MOST_MODELS = 10_000
"""More than are ever registered: a bound for the memory, not a limit that anybody meets."""
_NOBODY: Final[Mapping[str, float]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Change:
    """A model went to rest, or is well again."""

    model: str
    resting: bool
    from_elsewhere: bool
    """Another process found it, or forgets it."""


class Attempt:
    """One request to one model. Exactly one of `succeeded`, `failed`, `abandoned` ends it; later calls are ignored."""

    __slots__ = ("_breaker", "_health", "_model", "_over", "_permit")

    def __init__(self, health: ModelHealth, model: str, breaker: Breaker, permit: Permit) -> None:
        self._health, self._model, self._breaker, self._permit = health, model, breaker, permit
        self._over = False

    @property
    def is_probe(self) -> bool:
        return self._permit.probe

    def answering(self) -> None:
        """Its first content has come: others need not wait for the end of a probe. It may be left out."""
        if not self._over:
            self._health._change(self._model, self._breaker, self._breaker.answering, self._permit)

    def succeeded(self) -> None:
        if self._ends():
            self._health._change(self._model, self._breaker, self._breaker.succeeded, self._permit)

    def failed(self, failure: UpstreamFailure) -> None:
        """What it says of the model is decided in `verdicts`: many failures are the caller's own."""
        if self._ends():
            verdict = verdict_of(failure, self._health.unix_time())
            self._health._change(self._model, self._breaker, self._breaker.failed, self._permit, verdict)

    def abandoned(self) -> None:
        """The client left, or its own time limit, shorter than ours, was over: that says nothing of the model."""
        if self._ends():
            self._breaker.abandoned(self._permit)

    def _ends(self) -> bool:
        over, self._over = self._over, True
        return not over


class ModelHealth:
    """One per process, used on one event loop. `clock`: seconds that only grow. `unix_time`: for dates in headers."""

    def __init__(
        self,
        policy: HealthPolicy,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[Change], None] = lambda _: None,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self.unix_time = unix_time
        self._clock = clock
        self._listeners = [on_change]
        self._breakers: dict[str, Breaker] = {}
        self._open: dict[str, Breaker] = {}

    def watch(self, on_change: Callable[[Change], None]) -> None:
        self._listeners.append(on_change)

    def resting(self) -> Mapping[str, float]:
        """Model → seconds until it may be asked, of those that may not be asked now. One that is being probed is among
        them, with the time after which its probe counts as lost."""
        if not self._open:
            return _NOBODY
        now = self._clock()
        waits = ((model, breaker.resting_s(now)) for model, breaker in self._open.items())
        return {model: wait for model, wait in waits if wait is not None}

    def begin(self, model: str) -> Attempt:
        """Always allowed, so that a model can be asked because all rest or because it was named. The first one after a
        cooldown is the probe; whoever is to ask nobody who is being probed looks at `resting` right before, with no
        await between. Begin after waiting for a slot, so that no probe stands in a queue."""
        breaker = self._of(model)
        return Attempt(self, model, breaker, breaker.begin(self._clock()))

    def rest(self, model: str, seconds: float, why: str, *, from_elsewhere: bool = False) -> None:
        """Let it rest for so long, no longer than the longest cooldown. `from_elsewhere`: another process found it.

        Seconds that are no number above 0 are ignored.
        """
        if not seconds > 0:
            return
        breaker = self._of(model)
        act = breaker.adopt if from_elsewhere else breaker.rest
        self._change(model, breaker, act, seconds, why, from_elsewhere=from_elsewhere)

    def lift(self, model: str) -> None:
        """Another process says that it is well: what was adopted is over, what was found here stays."""
        if (breaker := self._open.get(model)) is not None:
            self._change(model, breaker, lambda _: breaker.lift(), from_elsewhere=True)

    def forget(self, model: str, *, from_elsewhere: bool = False) -> None:
        """An administrator removed or changed it. Attempts on what it was before say nothing of it any more."""
        self._breakers.pop(model, None)
        if self._open.pop(model, None) is not None:
            self._tell(Change(model, resting=False, from_elsewhere=from_elsewhere))

    def found(self, model: str) -> tuple[float, str] | None:
        """Seconds left, 0 when they are over, and why, of a rest that was found here; None if there is none."""
        breaker = self._open.get(model)
        seconds = breaker.found_s(self._clock()) if breaker else None
        return None if breaker is None or seconds is None else (seconds, breaker.why or "")

    def standing(self, model: str) -> dict[str, Any]:
        """`state`: well, resting, or probing (its time is over and the next answer decides)."""
        breaker = self._open.get(model)
        if breaker is None:
            return {"state": "well", "recovers_in_s": None, "why": None}
        cooling = breaker.cooling_s(self._clock())
        if cooling > 0:
            return {"state": "resting", "recovers_in_s": round(cooling, 3), "why": breaker.why}
        return {"state": "probing", "recovers_in_s": None, "why": breaker.why}

    def opened(self) -> dict[str, int]:
        """How often each model that was ever asked went to rest by what was found here."""
        return {model: breaker.opened for model, breaker in self._breakers.items()}

    def _of(self, model: str) -> Breaker:
        breaker = self._breakers.get(model)
        if breaker is None:
            if len(self._breakers) >= MOST_MODELS:
                self.forget(next((name for name in self._breakers if name not in self._open), next(iter(self._open))))
            breaker = self._breakers[model] = Breaker(self.policy)
        return breaker

    def _change(
        self, model: str, breaker: Breaker, act: Callable[..., None], *given: Any, from_elsewhere: bool = False
    ) -> None:
        """`act` with what is given and the time. What others may want to hear of is told to them after it."""
        epoch, now = breaker.epoch, self._clock()
        act(*given, now)
        if breaker.epoch == epoch or self._breakers.get(model) is not breaker:
            return
        if breaker.closed:
            self._open.pop(model, None)
            log.info("model %s is well again", model)
        else:
            self._open[model] = breaker
            log.warning("model %s rests for %.3g s: %s", model, breaker.cooling_s(now), breaker.why)
        self._tell(Change(model, resting=not breaker.closed, from_elsewhere=from_elsewhere))

    def _tell(self, change: Change) -> None:
        for listener in self._listeners:
            listener(change)
