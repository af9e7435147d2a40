"""The health of all models in this process, and its replication to other processes through Redis.

`uniroute:health:<model>` holds the reason why the circuit is open, and lives as long as the cooldown: no process
compares its clock with another's. The channel `uniroute:health` carries the names of models whose key was written or
deleted. Without Redis each process knows only what it has seen itself. No request ever waits for the replication.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.concurrency import BackgroundTasks
from proxy.errors import UpstreamError
from proxy.settings.schema import CircuitBreakerSettings
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store, StoreUnavailable, retry_until_available
from proxy.upstream.circuit_breaker import CircuitBreaker, Permit, classify_failure
from proxy.upstream.concurrency_limit import ConcurrencyLimiter

log = logging.getLogger("uniroute.health")


@dataclass(frozen=True, slots=True)
class HealthEvent:
    """The circuit of a model was opened, or closed."""

    model: str
    is_open: bool
    from_peer: bool
    """Another process opened or closed it, and this one follows."""


class Attempt(Permit):
    """One request to one model, which reports its outcome to the circuit breaker and then releases its slot.

    Exactly one of `succeeded`, `failed` and `abandoned` ends it; later calls are ignored.
    """

    __slots__ = ("_breaker", "_ended", "_health", "_slots", "acquired_at", "is_cut_short", "model")

    def __init__(
        self,
        health: HealthRegistry,
        model: str,
        breaker: CircuitBreaker,
        slots: ConcurrencyLimiter | None,
        acquired_at: float,
    ) -> None:
        self.epoch = breaker.epoch
        self.is_probe = False
        self.model = model
        # Whether the attempt has less time than is configured for the model: a timeout then says nothing of the model.
        self.is_cut_short = False
        self._health = health
        self._breaker = breaker
        self._slots = slots
        self.acquired_at = acquired_at
        self._ended = False

    def first_content(self) -> None:
        """Report the first content. A probe closes its circuit now, without waiting for the end of the answer."""
        if not self._ended:
            self._health._change(self.model, self._breaker, self._breaker.first_content, self)

    def succeeded(self) -> None:
        if self._end():
            self._health._change(self.model, self._breaker, self._breaker.succeeded, self)

    def failed(self, failure: UpstreamError) -> None:
        if failure.timed_out and self.is_cut_short:
            self.abandoned()
        elif self._end():
            failure_class = classify_failure(failure, self._health.unix_time())
            self._health._change(self.model, self._breaker, self._breaker.failed, self, failure_class)

    def abandoned(self) -> None:
        """End without an outcome: the client left, or its own time limit has passed."""
        if self._end():
            self._breaker.abandoned(self)

    def _end(self) -> bool:
        """End this attempt and release its slot; return False if it had ended before."""
        if self._ended:
            return False
        self._ended = True
        if self._slots is not None:
            self._slots.release(self.model, self.acquired_at)
        return True


# Bounds the memory, far above the number of models that are ever registered.
MAX_MODELS = 10_000

_NOTHING_COOLING_DOWN: Final[Mapping[str, float]] = MappingProxyType({})


class HealthRegistry:
    """The circuit breakers of all models. One per process, used on one event loop.

    Args:
        clock: monotonic seconds.
        unix_time: the clock to which dates in headers are compared.
    """

    def __init__(
        self,
        settings: CircuitBreakerSettings,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[HealthEvent], None] = lambda _: None,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.unix_time = unix_time
        self._clock = clock
        self._listeners = [on_change]
        self._breakers: dict[str, CircuitBreaker] = {}
        self._open_breakers: dict[str, CircuitBreaker] = {}

    def add_listener(self, on_change: Callable[[HealthEvent], None]) -> None:
        self._listeners.append(on_change)

    def cooling_down(self) -> Mapping[str, float]:
        """Return the models that may not be asked now, with the seconds until they may.

        They include models that are being probed, with the seconds after which the probe counts as lost.
        """
        if not self._open_breakers:
            return _NOTHING_COOLING_DOWN
        now = self._clock()
        waits = ((model, breaker.unavailable_s(now)) for model, breaker in self._open_breakers.items())
        return {model: wait for model, wait in waits if wait is not None}

    def start_attempt(self, model: str, slots: ConcurrencyLimiter | None = None, acquired_at: float = 0.0) -> Attempt:
        """Start an attempt at a model, even if its circuit is open. The first attempt after a cooldown is the probe.

        To respect an open circuit, check `cooling_down` right before this call, with no await in between. Acquire a
        slot before that check, so that no probe waits in a queue.

        Args:
            slots: of which a slot was acquired, to be released when the attempt ends.
            acquired_at: when it was.
        """
        breaker = self._breaker(model)
        attempt = Attempt(self, model, breaker, slots, acquired_at)
        if model in self._open_breakers:
            breaker.start(attempt, self._clock())
        return attempt

    def open(self, model: str, seconds: float, why: str, *, from_peer: bool = False) -> None:
        """Open a model's circuit, for no longer than the longest cooldown. Does nothing if `seconds` is not above 0."""
        if not seconds > 0:
            return
        breaker = self._breaker(model)
        change = breaker.open_from_peer if from_peer else breaker.open
        self._change(model, breaker, change, seconds, why, from_peer=from_peer)

    def close_from_peer(self, model: str) -> None:
        """Close a circuit that another process opened and has now closed. A cooldown that was found here stays."""
        if (breaker := self._open_breakers.get(model)) is not None:
            self._change(model, breaker, lambda _: breaker.close_from_peer(), from_peer=True)

    def reset(self, model: str, *, from_peer: bool = False) -> None:
        """Forget a model that was removed or changed. Attempts that were started before no longer count."""
        self._breakers.pop(model, None)
        if self._open_breakers.pop(model, None) is not None:
            self._notify(HealthEvent(model, is_open=False, from_peer=from_peer))

    def local_cooldown(self, model: str) -> tuple[float, str] | None:
        """Return the remaining seconds, 0 when over, and the reason of a cooldown found here; None: there is none."""
        breaker = self._open_breakers.get(model)
        seconds = breaker.local_cooldown_s(self._clock()) if breaker else None
        return None if breaker is None or seconds is None else (seconds, breaker.why or "")

    def status(self, model: str) -> dict[str, Any]:
        """Return a model's health as JSON.

        The state is `well` (closed), `resting` (in its cooldown) or `probing` (the cooldown is over, and the next
        answer decides).
        """
        breaker = self._open_breakers.get(model)
        if breaker is None:
            return {"state": "well", "recovers_in_s": None, "why": None}
        cooldown_s = breaker.cooldown_s(self._clock())
        if cooldown_s > 0:
            return {"state": "resting", "recovers_in_s": round(cooldown_s, 3), "why": breaker.why}
        return {"state": "probing", "recovers_in_s": None, "why": breaker.why}

    def open_counts(self) -> dict[str, int]:
        """Return how often this process opened the circuit of each model that it has asked."""
        return {model: breaker.open_count for model, breaker in self._breakers.items()}

    def _breaker(self, model: str) -> CircuitBreaker:
        breaker = self._breakers.get(model)
        if breaker is None:
            if len(self._breakers) >= MAX_MODELS:
                closed = (name for name in self._breakers if name not in self._open_breakers)
                self.reset(next(chain(closed, self._open_breakers)))
            breaker = self._breakers[model] = CircuitBreaker(self.settings)
        return breaker

    def _change(
        self, model: str, breaker: CircuitBreaker, change: Callable[..., None], *args: Any, from_peer: bool = False
    ) -> None:
        """Call `change` with `args` and the time, and notify the listeners if that opened or closed the circuit."""
        epoch, now = breaker.epoch, self._clock()
        change(*args, now)
        # An unchanged epoch: no change of state. Another breaker: the model was reset since this one was handed out.
        if breaker.epoch == epoch or self._breakers.get(model) is not breaker:
            return
        if breaker.closed:
            self._open_breakers.pop(model, None)
            log.info("model %s is well again", model)
        else:
            self._open_breakers[model] = breaker
            log.warning("model %s rests for %.3g s: %s", model, breaker.cooldown_s(now), breaker.why)
        self._notify(HealthEvent(model, is_open=not breaker.closed, from_peer=from_peer))

    def _notify(self, event: HealthEvent) -> None:
        for listener in self._listeners:
            listener(event)


CHANNEL: Final = "uniroute:health"

LISTEN_TIMEOUT_S = 0.5

# All keys are also read this often: a message may be lost, and a dead connection may go unnoticed.
REREAD_INTERVAL_S = 5.0

RETRY_INTERVAL_S = 0.5

# A missing key was deleted if its cooldown should have lasted longer than this; otherwise it has expired.
MIN_REVOKED_S = 1.0

# Announcements that are read at once.
MAX_MESSAGES = 1000

MAX_WARNINGS = 1000

MAX_QUEUED = 1000

MAX_WHY_CHARS = 200

UNKNOWN_REASON = "another process found it failing"


def health_key(model: str) -> str:
    return f"{CHANNEL}:{model}"


class CooldownReplicator:
    """Share open circuits with the other processes over Redis, and adopt theirs.

    Only the models that are `registered` now are read, whatever the channel says.
    """

    def __init__(self, store: Store, health: HealthRegistry, registered: Callable[[], Collection[str]]) -> None:
        self._store = store
        self._health = health
        self._registered = registered
        # Models to publish, in order. Their state is looked up only when it is written, and is then the newest.
        self._pending: dict[str, None] = {}
        self._has_pending = asyncio.Event()
        # Held while Redis is read or written: a read that overtook a write would bring back an ended cooldown.
        self._lock = asyncio.Lock()
        self._warned: set[str] = set()
        self._tasks = BackgroundTasks()
        health.add_listener(self._queue)

    def start(self) -> None:
        self._tasks.start("uniroute-health-publish", self._publish_loop)
        self._tasks.start("uniroute-health-listen", self._listen_loop)

    async def stop(self) -> None:
        await self._tasks.close()

    def _queue(self, event: HealthEvent) -> None:
        """Note a model whose state is to be published, unless it came from another process."""
        if event.from_peer:
            return
        if len(self._pending) >= MAX_QUEUED:
            self._pending.pop(next(iter(self._pending)))
        self._pending[event.model] = None
        self._has_pending.set()

    async def _publish_loop(self) -> None:
        while True:
            await self._has_pending.wait()
            self._has_pending.clear()
            await retry_until_available(self._publish)

    async def _publish(self) -> None:
        """Write the state of all pending models.

        Raises:
            StoreUnavailable: all of them are still pending.
        """
        async with self._lock:
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
                cooldown = self._health.local_cooldown(model)
                if cooldown is None:
                    pipe.delete(health_key(model))
                else:
                    seconds, why = cooldown
                    if (left_ms := int(seconds * 1000)) > 0:
                        pipe.set(health_key(model), why[:MAX_WHY_CHARS], px=left_ms)
                pipe.publish(CHANNEL, model)
            replies = await pipe.execute(raise_on_error=False)
        if refused := next((reply for reply in replies if isinstance(reply, RedisError)), None):
            log.warning("the health of models is not shared: %s", refused)

    async def _listen_loop(self) -> None:
        while True:
            try:
                await self._listen()
            except (StoreUnavailable, RedisError, OSError) as error:
                log.debug("the health of models elsewhere is not known: %s", error)
                await asyncio.sleep(RETRY_INTERVAL_S)

    async def _listen(self) -> None:
        """Adopt what other processes announce, and read all keys now and then."""
        async with self._store.client.pubsub() as pubsub:
            await pubsub.subscribe(CHANNEL)
            read_at = None
            while True:
                if read_at is None or time.monotonic() - read_at >= REREAD_INTERVAL_S:
                    await self._read(self._registered(), announced=False)
                    read_at = time.monotonic()
                await self._read(await _announced_models(pubsub), announced=True)

    async def _read(self, named: Collection[str], *, announced: bool) -> None:
        """Adopt what Redis has about these models. `announced`: a message said that it has just changed.

        Raises:
            StoreUnavailable: nothing was adopted.
        """
        registered = self._registered()
        models = [model for model in named if model in registered]
        if not models:
            return
        async with self._lock:
            async with (
                self._store.operation("read the health of models") as client,
                client.pipeline(transaction=False) as pipe,
            ):
                for model in models:
                    pipe.pttl(health_key(model))
                    pipe.get(health_key(model))
                replies = await pipe.execute(raise_on_error=False)
            for model, left_ms, why in zip(models, replies[::2], replies[1::2], strict=True):
                if model not in self._pending:  # else what this process is about to publish is newer
                    self._adopt(model, left_ms, why, announced=announced)

    def _adopt(self, model: str, left_ms: object, why: object, *, announced: bool) -> None:
        """Open or close the circuit here, as the key in Redis says."""
        seconds = left_ms / 1000 if isinstance(left_ms, int) else 0.0
        if 0 < seconds <= self._health.settings.longest_cooldown_s:
            self._health.open(model, seconds, _printable(why), from_peer=True)
            return
        if left_ms != -2:  # the key exists, since only a missing one has this time to live
            self._warn_once(model)
        status = self._health.status(model)
        if announced or (status["recovers_in_s"] or 0.0) > MIN_REVOKED_S:
            self._health.close_from_peer(model)

    def _warn_once(self, model: str) -> None:
        """Warn of a key that never expires, or expires too late: no UniRoute process wrote it."""
        if model not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(model)
            log.warning("%s is ignored: it does not expire within the longest cooldown", health_key(model))


def _printable(why: object) -> str:
    """Return a stored reason as one printable line: administrators see it, and anything may have written it."""
    line = "".join(char for char in why[:MAX_WHY_CHARS] if char.isprintable()) if isinstance(why, str) else ""
    return line or UNKNOWN_REASON


async def _announced_models(pubsub: Any) -> set[str]:
    """Return the models that messages have named, waiting up to LISTEN_TIMEOUT_S for the first message."""
    names: set[str] = set()
    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_TIMEOUT_S)
    for _ in range(MAX_MESSAGES):
        if message is None:
            break
        if isinstance(message["data"], str):
            names.add(message["data"])
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.0)
    return names


PRUNE_INTERVAL_S = 0.5


async def prune_removed_models(health: HealthRegistry, registered: Callable[[], Mapping[str, ModelRecord]]) -> None:
    """Forget the health of models that were removed or changed, until this is cancelled.

    Args:
        registered: returns the models of the current snapshot, in a new mapping whenever one of them has changed.
    """
    before = registered()
    while True:
        await asyncio.sleep(PRUNE_INTERVAL_S)
        now = registered()
        if now is before:
            continue
        for name, old in before.items():
            new = now.get(name)
            if new is None or new.litellm_params != old.litellm_params:
                # The process that made the change announces it: nothing is to be published here.
                health.reset(name, from_peer=True)
        before = now
