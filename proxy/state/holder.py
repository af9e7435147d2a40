"""StateHolder: keeps the current RoutingState up to date by pub/sub and a poll. What a state is, is snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from proxy.concurrency import end
from proxy.state.keys import KeyLatch
from proxy.state.snapshot import RoutingState, Surroundings, build_state
from proxy.state.store import Store, StoreUnavailable
from proxy.state.stored import CHANGED, PRICING, StoredReader

__all__ = ["RoutingState", "StateHolder"]

log = logging.getLogger("uniroute.state")

POLL_S = 0.5
SETTLE_S = 0.02
"""Messages that come this close together are one change."""
LIVE_REFRESH_S = 5.0
UNUSABLE_S = 5.0
SAY_AGAIN_S = 60.0


class StateHolder:
    """One per process. Without Redis the last state stays; before the first reading the door is closed to all."""

    def __init__(
        self,
        store: Store,
        around: Surroundings,
        latch: KeyLatch,
        on_change: Callable[[RoutingState], None] = lambda _: None,
    ) -> None:
        """`on_change`: is told of the first state, and of every other as it comes into use."""
        self._store = store
        self._on_change = on_change
        self._around = around
        self._latch = latch
        self._reader = StoredReader(store, time.time)
        self._current = self._build()
        on_change(self._current)
        self._following: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()
        self._live_seen = (0, 0.0)
        self._said_away: float | None = None
        self.available = False
        """Whether Redis answered when last asked."""

    @property
    def current(self) -> RoutingState:
        return self._current

    @property
    def loaded(self) -> bool:
        """Whether Redis was ever read: what readiness means, whatever Redis does later."""
        return self._current.known

    async def start(self) -> None:
        """Read once and follow from then on. Redis may be away; then the first reading comes when it is back."""
        try:
            await self.refresh()
        except StoreUnavailable as error:
            self._away(error)
        self._following = asyncio.create_task(self._follow(), name="uniroute-state")

    async def stop(self) -> None:
        await end(self._following)
        self._following = None

    async def refresh(self, *, whole: bool = False) -> None:
        """Swap in what Redis holds now. `whole`: read again even what seems to have this version already.

        Raises:
            StoreUnavailable: the current state stays.
        """
        async with self._refreshing:
            changed = await self._reader.read(self._around.configured, whole=whole or not self.available)
            if not self.available:
                self.available = True
                log.info("the store at %s answers", self._store.name)
            if changed or self._live_moved():
                await self._swap()

    async def wait_for_version(self, version: int) -> None:
        """Return once the current state has what was written as `version`. StoreUnavailable as `refresh`."""
        if self._current.version < version:
            await self.refresh()

    async def _swap(self) -> None:
        """Laid out in a thread: the rates of many models take longer than a request may wait."""
        if self._reader.last.keys and not self._latch.closed:
            self._latch.close()
        live = self._around.live
        self._live_seen = (live.observed if live else 0, time.monotonic())
        self._current = await asyncio.to_thread(self._build)
        self._on_change(self._current)

    def _build(self) -> RoutingState:
        return build_state(self._reader.last, self._around, keys_latched=self._latch.closed)

    def _live_moved(self) -> bool:
        observed, at = self._live_seen
        live = self._around.live
        return live is not None and live.observed != observed and time.monotonic() - at >= LIVE_REFRESH_S

    async def _follow(self) -> None:
        while True:
            try:
                await self._listen(self._store.client)
            except (StoreUnavailable, RedisError, OSError) as error:
                self._away(error)
                with contextlib.suppress(StoreUnavailable):  # said by _away already
                    await self._store.keep_up()
                await asyncio.sleep(POLL_S)
            except (ValueError, ArithmeticError) as error:  # it reads well and cannot be laid out
                log.error("what is stored makes no state, the last one stays in use", exc_info=error)
                await asyncio.sleep(UNUSABLE_S)

    async def _listen(self, client: Redis) -> None:
        """Until the messages come from elsewhere."""
        async with client.pubsub() as pubsub:
            await pubsub.subscribe(CHANGED, PRICING)
            told = True
            while not await self._store.primary_moved():
                await self.refresh(whole=told)
                if told := await _message(pubsub, POLL_S):
                    await asyncio.sleep(SETTLE_S)
                    while await _message(pubsub, 0.0):
                        pass

    def _away(self, error: Exception) -> None:
        """Say so once, and as long as nothing was ever read once a minute."""
        waiting = not self.available and self._said_away is not None
        if not waiting or (not self.loaded and time.monotonic() - (self._said_away or 0) >= SAY_AGAIN_S):
            kept = "the last state stays in use" if self.loaded else "nothing is served until it does"
            log.warning("the store does not answer, %s: %s", kept, error)
            self._said_away = time.monotonic()
        self.available = False


async def _message(pubsub: Any, timeout_s: float) -> bool:
    return await pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s) is not None
