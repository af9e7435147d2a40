"""Whether a key may send one more request, and what is set aside for it. Without Redis: as far as one process knows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

from redis.exceptions import ResponseError

from proxy.concurrency import end
from proxy.errors import ProxyError
from proxy.limits.asking import TIMEOUT_S, Asking, NotAsked
from proxy.limits.bucket import Buckets, corrected, leaked, taken
from proxy.limits.claims import Claim
from proxy.limits.refusals import budget_exceeded, not_checked, rate_limited, too_large
from proxy.limits.scripts import END, RESERVE, SETTLE, state_key
from proxy.limits.standing import Granted, Settling, Standing, rate_headers
from proxy.recording.metrics import Metrics
from proxy.storage.client_keys import ClientKey, KeyLimits
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable
from proxy.storage.usage_writer import LARGEST
from router_core.pricing import picousd

log = logging.getLogger("uniroute.limits")

AGAIN_S = 1.0
MOST_STRAYS = 10_000
MOST_COMPLAINTS = 1000
Refusal = Literal["requests", "tokens", "day", "month"]


class Limiter:
    """One per process; all of them, over one Redis, keep the same limits."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        open_without_store: bool = False,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_without_store`: keys with spend limits are served while Redis does not answer within `timeout_s`."""
        self._store = store
        self._metrics = metrics
        self._open = open_without_store
        self._clock = clock
        self._timeout_s = timeout_s
        self._asking = Asking(store, (RESERVE, END), timeout_s)
        self._settle = store.client.register_script(SETTLE)
        self._buckets = Buckets()
        self._away = False
        self._unreadable: set[str] = set()
        self._strays: dict[str, str] = {}
        self._giving_back: asyncio.Task[None] | None = None

    async def reserve(self, key: ClientKey, claim: Claim) -> Granted:
        """Set `claim` aside, for a key that has limits.

        Raises:
            RateLimited, BudgetExceeded: nothing was set aside.
            Unavailable: Redis does not answer, and there is a spend limit.
        """
        limits = key.limits
        if limits.tokens_per_minute is not None and claim.tokens > limits.tokens_per_minute:
            self._metrics.limited.labels("tokens").inc()
            raise too_large(limits, claim)
        try:
            verdict, *reply = await self._answer(key, claim)
        except NotAsked as error:
            return self._without_store(key, claim, error, reservation=None)
        except StoreUnavailable as error:
            return self._without_store(key, claim, error, reservation=claim.id)
        self._back()
        return self._decided(key, claim, verdict, Standing.of_reply(reply))

    @property
    def silent(self) -> bool:
        """Redis did not answer, and is not asked."""
        return self._asking.silent

    @property
    def strays(self) -> int:
        """Reservations that wait to be given back."""
        return len(self._strays)

    def give_back(self, granted: Granted) -> None:
        """Of a request that was never sent, and has no usage record: as soon as Redis answers."""
        granted.used(0, 0)
        if granted.reservation is not None:
            self._give_back_soon(granted.key_id, granted.reservation)

    async def close(self) -> None:
        """What could not be given back ends by itself."""
        await self._asking.close()
        await end(self._giving_back)

    async def _answer(self, key: ClientKey, claim: Claim) -> list[str]:
        answer = self._asking.ask(RESERVE, state_key(key.id), _arguments(key, claim))
        try:
            return str(await asyncio.shield(answer)).split()
        except asyncio.CancelledError:  # the client left, and what is granted to it now is nobody's
            answer.add_done_callback(lambda _: self._give_back_soon(key.id, claim.id))
            raise

    def _decided(self, key: ClientKey, claim: Claim, verdict: str, standing: Standing) -> Granted:
        if verdict == "granted":
            headers = rate_headers(key.limits, standing)
            if not (claim.tokens or claim.picousd):
                return Granted(key.id, claim.id, headers)
            return Granted(key.id, claim.id, headers, partial(self._ended, key.id, claim), self._timeout_s)
        self._metrics.limited.labels(verdict).inc()
        if verdict in ("day", "month"):
            raise budget_exceeded(verdict, key.limits, standing, claim)
        raise rate_limited(verdict, key.limits, standing, claim)

    def _ended(self, key_id: str, claim: Claim, tokens: int | None, picousd: int | None) -> Settling | None:
        """In the store. Where it does not hear of this, what was set aside stays until the usage record is there."""
        known = picousd is not None and picousd <= LARGEST
        took = ("" if tokens is None else tokens, picousd if picousd is not None and known else "")
        try:
            settling = self._asking.ask(END, state_key(key_id), (key_id, claim.id, *took))
        except NotAsked:
            return None
        settling.add_done_callback(_looked_at)
        return settling

    def _without_store(self, key: ClientKey, claim: Claim, error: StoreUnavailable, reservation: str | None) -> Granted:
        """`reservation`: Redis may have heard of it, and has it then until it is settled."""
        self._note(key, error)
        try:
            return self._locally(key, claim, str(error), reservation)
        except ProxyError:
            if reservation is not None:
                self._give_back_soon(key.id, reservation)
            raise

    def _locally(self, key: ClientKey, claim: Claim, why: str, reservation: str | None) -> Granted:
        outcome = "refused" if key.limits.money and not self._open else "open" if key.limits.money else "local"
        self._metrics.limits_unchecked.labels(outcome).inc()
        if outcome == "refused":
            raise not_checked(why)
        refused, standing = self._taken(key.id, key.limits, claim.tokens)
        if refused is not None:
            self._metrics.limited.labels(refused).inc()
            raise rate_limited(refused, key.limits, standing, claim)
        used = partial(self._correct, key.id, key.limits, claim.tokens)
        return Granted(key.id, reservation, rate_headers(key.limits, standing), used)

    def _taken(self, key_id: str, limits: KeyLimits, tokens: int) -> tuple[Refusal | None, Standing]:
        """From this process' own buckets, all or nothing; the first that has not enough, or None."""
        now = self._clock()
        wanted: tuple[tuple[Refusal, int | None, int], ...] = (
            ("requests", limits.requests_per_minute, 1),
            ("tokens", limits.tokens_per_minute, tokens),
        )
        levels, refused = {}, None
        for kind, per_minute, amount in wanted:
            level = leaked(self._buckets[f"{kind}:{key_id}"], per_minute or 0, now)
            after = level if per_minute is None else taken(level, per_minute, amount, now)
            refused = kind if after is None and refused is None else refused
            levels[kind] = after or level
        if refused is None:
            for kind, level in levels.items():
                self._buckets[f"{kind}:{key_id}"] = level
        return refused, Standing(levels["requests"].used, levels["tokens"].used)

    def _correct(self, key_id: str, limits: KeyLimits, claimed: int, tokens: int | None, _: int | None) -> None:
        """In this process' own bucket."""
        if limits.tokens_per_minute is not None and tokens is not None:
            name = f"tokens:{key_id}"
            more = tokens - claimed
            self._buckets[name] = corrected(self._buckets[name], limits.tokens_per_minute, more, self._clock())

    def _give_back_soon(self, key_id: str, reservation: str) -> None:
        if len(self._strays) < MOST_STRAYS:
            self._strays[reservation] = key_id
        if self._giving_back is None or self._giving_back.done():
            self._giving_back = asyncio.create_task(self._give_back_strays(), name="uniroute-limits")

    async def _give_back_strays(self) -> None:
        while self._strays:
            reservation, key_id = next(iter(self._strays.items()))
            try:
                async with self._store.asking("give back a reservation"):
                    await self._settle(keys=[state_key(key_id)], args=[key_id, reservation, "0", "0", "", ""])
            except StoreUnreadable as error:
                log.warning("a reservation of the key %s is not given back, and ends by itself: %s", key_id, error)
            except StoreUnavailable as error:
                log.debug("a reservation waits to be given back: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            self._strays.pop(reservation, None)

    def _note(self, key: ClientKey, error: StoreUnavailable) -> None:
        if isinstance(error.__cause__, ResponseError):
            if key.id not in self._unreadable and len(self._unreadable) < MOST_COMPLAINTS:
                self._unreadable.add(key.id)
                log.warning("what the key %s has used cannot be checked: %s", key.id, error)
            return
        if not self._away:
            money = "are served unchecked (limits_without_store: allow)" if self._open else "are refused"
            log.warning("rate limits are kept by this process alone, and keys with spend limits %s: %s", money, error)
        self._away = True

    def _back(self) -> None:
        if self._away:
            log.info("limits are checked in the store again")
        self._away = False


def _looked_at(settling: Settling) -> None:
    if not settling.cancelled() and (error := settling.exception()) is not None:
        log.debug("what a request took waits for its usage record: %s", error)


def _arguments(key: ClientKey, claim: Claim) -> list[str | int | float]:
    limits = key.limits
    budgets = [None if usd is None else picousd(usd) for usd in (limits.usd_per_day, limits.usd_per_month)]
    stated = [limits.requests_per_minute, limits.tokens_per_minute, *budgets]
    return [key.id, claim.id, claim.lives_s, claim.tokens, claim.picousd, *("" if n is None else n for n in stated)]
