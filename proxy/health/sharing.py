"""What one process finds of a model's health, told to the others through Redis. Never on the path of a request.

`uniroute:health:<model>` holds why it rests, and expires when the rest is over, so that no two clocks are compared; the
channel `uniroute:health` carries the names of models whose key was written or deleted. Without Redis each process goes
by what it finds itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.concurrency import end
from proxy.health.health import Change, ModelHealth
from proxy.storage.redis import Store, StoreUnavailable, until_it_answers

log = logging.getLogger("uniroute.health")

CHANNEL: Final = "uniroute:health"
LISTEN_S = 0.5
REREAD_S = 5.0
"""All keys are read this often too: a message may be lost, and a connection may be dead without a word."""
AGAIN_S = 0.5
VANISHED_S = 1.0
"""A key that is gone while its rest had longer than this to go was deleted; otherwise its time was over."""
MOST_MESSAGES = 1000
MOST_QUEUED = 1000
LONGEST_WHY = 200
UNSAID = "another process found it failing"


def health_key(model: str) -> str:
    return f"{CHANNEL}:{model}"


class HealthSharing:
    """`known`: the models that are registered now. Others are neither read nor adopted, whatever the channel says."""

    def __init__(self, store: Store, health: ModelHealth, known: Callable[[], Collection[str]]) -> None:
        self._store = store
        self._health = health
        self._known = known
        self._untold: dict[str, None] = {}
        """In order. What is told of them is read when it is written: only the newest counts."""
        self._something_untold = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        """A reading that overtook a writing would bring back what was just ended."""
        self._complaints: set[str] = set()
        self._running: list[asyncio.Task[None]] = []
        health.watch(self._note)

    def start(self) -> None:
        loops = {"uniroute-health-told": self._tell_on(), "uniroute-health-heard": self._listen_on()}
        self._running = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]

    async def stop(self) -> None:
        await end(*self._running)

    def _note(self, change: Change) -> None:
        if change.from_elsewhere:
            return
        if len(self._untold) >= MOST_QUEUED:
            self._untold.pop(next(iter(self._untold)))
        self._untold[change.model] = None
        self._something_untold.set()

    async def _tell_on(self) -> None:
        while True:
            await self._something_untold.wait()
            self._something_untold.clear()
            await until_it_answers(self._tell)

    async def _tell(self) -> None:
        """Raises StoreUnavailable; nothing is forgotten then."""
        async with self._one_at_a_time:
            models, self._untold = self._untold, {}
            try:
                await self._write(models)
            except StoreUnavailable:
                self._untold = {**models, **self._untold}
                raise

    async def _write(self, models: Collection[str]) -> None:
        async with (
            self._store.asking("share the health of models") as client,
            client.pipeline(transaction=False) as pipe,
        ):
            for model in models:
                found = self._health.found(model)
                if found is None:
                    pipe.delete(health_key(model))
                elif (left_ms := int(found[0] * 1000)) > 0:
                    pipe.set(health_key(model), found[1][:LONGEST_WHY], px=left_ms)
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
                await asyncio.sleep(AGAIN_S)

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
                self._store.asking("read the health of models") as client,
                client.pipeline(transaction=False) as pipe,
            ):
                for model in models:
                    pipe.pttl(health_key(model))
                    pipe.get(health_key(model))
                replies = await pipe.execute(raise_on_error=False)
            for model, left_ms, why in zip(models, replies[::2], replies[1::2], strict=True):
                if model not in self._untold:  # what this process knows of it is newer
                    self._adopt(model, left_ms, why, told=told)

    def _adopt(self, model: str, left_ms: object, why: object, *, told: bool) -> None:
        seconds = left_ms / 1000 if isinstance(left_ms, int) else 0.0
        if 0 < seconds <= self._health.policy.longest_cooldown_s:
            self._health.rest(model, seconds, _words(why), from_elsewhere=True)
            return
        if left_ms != -2:
            self._complain(model)
        standing = self._health.standing(model)
        if told or (standing["recovers_in_s"] or 0.0) > VANISHED_S:
            self._health.lift(model)

    def _complain(self, model: str) -> None:
        """Of a key that never expires, or too late: whoever wrote it, it is not one of us."""
        if model not in self._complaints and len(self._complaints) < MOST_MESSAGES:
            self._complaints.add(model)
            log.warning("%s is ignored: it does not expire within the longest cooldown", health_key(model))


def _words(why: object) -> str:
    """One printable line: it is shown to administrators, whoever wrote it."""
    said = "".join(letter for letter in why[:LONGEST_WHY] if letter.isprintable()) if isinstance(why, str) else ""
    return said or UNSAID


async def _named(pubsub: Any) -> set[str]:
    """The models of the messages that have come, or that come within LISTEN_S."""
    names: set[str] = set()
    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
    for _ in range(MOST_MESSAGES):
        if message is None:
            break
        if isinstance(message["data"], str):
            names.add(message["data"])
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.0)
    return names
