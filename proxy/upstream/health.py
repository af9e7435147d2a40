"""What one process finds of a model's health, told to the others through Redis. Never on the path of a request.

`uniroute:health:<model>` holds why it rests, and expires when the rest is over, so that no two clocks are compared; the
channel `uniroute:health` carries the names of models whose key was written or deleted. Without Redis each process goes
by what it finds itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.concurrency import BackgroundTasks
from proxy.errors import UpstreamError
from proxy.settings.schema import CircuitBreakerSettings
from proxy.storage.models import ModelRecord
from proxy.storage.redis import Store, StoreUnavailable, retry_until_available
from proxy.upstream.circuit_breaker import CircuitBreaker, Permit, classify_failure

log = logging.getLogger("uniroute.health")

MAX_MODELS = 10_000
"""More than are ever registered: a bound for the memory, not a limit that anybody meets."""

_NOBODY: Final[Mapping[str, float]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HealthEvent:
    """A model went to rest, or is well again."""

    model: str
    resting: bool
    from_elsewhere: bool
    """Another process found it, or forgets it."""


class Attempt:
    """One request to one model. Exactly one of `succeeded`, `failed`, `abandoned` ends it; later calls are ignored."""

    __slots__ = ("_breaker", "_health", "_model", "_over", "_permit")

    def __init__(self, health: HealthRegistry, model: str, breaker: CircuitBreaker, permit: Permit) -> None:
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

    def failed(self, failure: UpstreamError) -> None:
        """What it says of the model is decided in `verdicts`: many failures are the caller's own."""
        if self._ends():
            verdict = classify_failure(failure, self._health.unix_time())
            self._health._change(self._model, self._breaker, self._breaker.failed, self._permit, verdict)

    def abandoned(self) -> None:
        """The client left, or its own time limit, shorter than ours, was over: that says nothing of the model."""
        if self._ends():
            self._breaker.abandoned(self._permit)

    def _ends(self) -> bool:
        over, self._over = self._over, True
        return not over


class HealthRegistry:
    """One per process, used on one event loop. `clock`: seconds that only grow. `unix_time`: for dates in headers."""

    def __init__(
        self,
        policy: CircuitBreakerSettings,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[HealthEvent], None] = lambda _: None,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self.unix_time = unix_time
        self._clock = clock
        self._listeners = [on_change]
        self._breakers: dict[str, CircuitBreaker] = {}
        self._open: dict[str, CircuitBreaker] = {}

    def watch(self, on_change: Callable[[HealthEvent], None]) -> None:
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
            self._tell(HealthEvent(model, resting=False, from_elsewhere=from_elsewhere))

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

    def _of(self, model: str) -> CircuitBreaker:
        breaker = self._breakers.get(model)
        if breaker is None:
            if len(self._breakers) >= MAX_MODELS:
                self.forget(next((name for name in self._breakers if name not in self._open), next(iter(self._open))))
            breaker = self._breakers[model] = CircuitBreaker(self.policy)
        return breaker

    def _change(
        self, model: str, breaker: CircuitBreaker, act: Callable[..., None], *given: Any, from_elsewhere: bool = False
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
        self._tell(HealthEvent(model, resting=not breaker.closed, from_elsewhere=from_elsewhere))

    def _tell(self, change: HealthEvent) -> None:
        for listener in self._listeners:
            listener(change)


CHANNEL: Final = "uniroute:health"

LISTEN_S = 0.5

REREAD_S = 5.0
"""All keys are read this often too: a message may be lost, and a connection may be dead without a word."""

RETRY_INTERVAL_S = 0.5

VANISHED_S = 1.0
"""A key that is gone while its rest had longer than this to go was deleted; otherwise its time was over."""

MAX_MESSAGES = 1000

MAX_QUEUED = 1000

MAX_WHY = 200

UNKNOWN_REASON = "another process found it failing"


def health_key(model: str) -> str:
    return f"{CHANNEL}:{model}"


class CooldownReplicator:
    """`known`: the models that are registered now. Others are neither read nor adopted, whatever the channel says."""

    def __init__(self, store: Store, health: HealthRegistry, known: Callable[[], Collection[str]]) -> None:
        self._store = store
        self._health = health
        self._known = known
        self._pending: dict[str, None] = {}
        """In order. What is told of them is read when it is written: only the newest counts."""
        self._something_untold = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        """A reading that overtook a writing would bring back what was just ended."""
        self._complaints: set[str] = set()
        self._tasks = BackgroundTasks()
        health.watch(self._note)

    def start(self) -> None:
        self._tasks.start("uniroute-health-told", self._publish_loop)
        self._tasks.start("uniroute-health-heard", self._listen_on)

    async def stop(self) -> None:
        await self._tasks.close()

    def _note(self, change: HealthEvent) -> None:
        if change.from_elsewhere:
            return
        if len(self._pending) >= MAX_QUEUED:
            self._pending.pop(next(iter(self._pending)))
        self._pending[change.model] = None
        self._something_untold.set()

    async def _publish_loop(self) -> None:
        while True:
            await self._something_untold.wait()
            self._something_untold.clear()
            await retry_until_available(self._tell)

    async def _tell(self) -> None:
        """Raises StoreUnavailable; nothing is forgotten then."""
        async with self._one_at_a_time:
            models, self._pending = self._pending, {}
            try:
                await self._write(models)
            except StoreUnavailable:
                self._pending = {**models, **self._pending}
                raise

    async def _write(self, models: Collection[str]) -> None:
        async with (
            self._store.operation("share the health of models") as client,
            client.pipeline(transaction=False) as pipe,
        ):
            for model in models:
                found = self._health.found(model)
                if found is None:
                    pipe.delete(health_key(model))
                elif (left_ms := int(found[0] * 1000)) > 0:
                    pipe.set(health_key(model), found[1][:MAX_WHY], px=left_ms)
                pipe.publish(CHANNEL, model)
            replies = await pipe.execute(raise_on_error=False)
        if refused := next((reply for reply in replies if isinstance(reply, RedisError)), None):
            log.warning("the health of models is not shared: %s", refused)

    async def _listen_on(self) -> None:
        while True:
            try:
                await self._listen()
            except (StoreUnavailable, RedisError, OSError) as error:
                log.debug("the health of models elsewhere is not known: %s", error)
                await asyncio.sleep(RETRY_INTERVAL_S)

    async def _listen(self) -> None:
        async with self._store.client.pubsub() as pubsub:
            await pubsub.subscribe(CHANNEL)
            read_at = None
            while True:
                if read_at is None or time.monotonic() - read_at >= REREAD_S:
                    await self._read(self._known(), told=False)
                    read_at = time.monotonic()
                await self._read(await _named(pubsub), told=True)

    async def _read(self, named: Collection[str], *, told: bool) -> None:
        """Adopt what Redis holds of these models. `told`: somebody says that it has changed just now.

        Raises:
            StoreUnavailable: nothing is adopted then.
        """
        known = self._known()
        models = [model for model in named if model in known]
        if not models:
            return
        async with self._one_at_a_time:
            async with (
                self._store.operation("read the health of models") as client,
                client.pipeline(transaction=False) as pipe,
            ):
                for model in models:
                    pipe.pttl(health_key(model))
                    pipe.get(health_key(model))
                replies = await pipe.execute(raise_on_error=False)
            for model, left_ms, why in zip(models, replies[::2], replies[1::2], strict=True):
                if model not in self._pending:  # what this process knows of it is newer
                    self._adopt(model, left_ms, why, told=told)

    def _adopt(self, model: str, left_ms: object, why: object, *, told: bool) -> None:
        seconds = left_ms / 1000 if isinstance(left_ms, int) else 0.0
        if 0 < seconds <= self._health.policy.longest_cooldown_s:
            self._health.rest(model, seconds, _words(why), from_elsewhere=True)
            return
        if left_ms != -2:
            self._warn_once(model)
        standing = self._health.standing(model)
        if told or (standing["recovers_in_s"] or 0.0) > VANISHED_S:
            self._health.lift(model)

    def _warn_once(self, model: str) -> None:
        """Of a key that never expires, or too late: whoever wrote it, it is not one of us."""
        if model not in self._complaints and len(self._complaints) < MAX_MESSAGES:
            self._complaints.add(model)
            log.warning("%s is ignored: it does not expire within the longest cooldown", health_key(model))


def _words(why: object) -> str:
    """One printable line: it is shown to administrators, whoever wrote it."""
    said = "".join(letter for letter in why[:MAX_WHY] if letter.isprintable()) if isinstance(why, str) else ""
    return said or UNKNOWN_REASON


async def _named(pubsub: Any) -> set[str]:
    """The models of the messages that have come, or that come within LISTEN_S."""
    names: set[str] = set()
    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
    for _ in range(MAX_MESSAGES):
        if message is None:
            break
        if isinstance(message["data"], str):
            names.add(message["data"])
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.0)
    return names


LOOK_S = 0.5


class Roster:
    """`known`: the registered models, another mapping whenever one of them is another."""

    def __init__(self, health: HealthRegistry, known: Callable[[], Mapping[str, ModelRecord]]) -> None:
        self._health = health
        self._known = known
        self._seen = known()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        seen, self._seen = self._seen, self._known()
        if seen is self._seen:
            return
        for name, record in seen.items():
            now = self._seen.get(name)
            if now is None or now.litellm_params != record.litellm_params:
                self._health.forget(name, from_elsewhere=True)
