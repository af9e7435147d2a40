"""A bucket of so many a minute, refilled continuously; a minute's may be taken at once. No clock, no store.

What is kept is what is used, which leaks away: nothing used is a full bucket. Debt is more than a minute's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from redis.exceptions import ResponseError

from proxy.concurrency import cancel_and_wait
from proxy.errors import BudgetExceeded, ProxyError, RateLimited, ServiceUnavailable
from proxy.server.metrics import Metrics
from proxy.server.reservations import (
    END,
    RESERVE,
    SETTLE,
    TIMEOUT_S,
    ReservationRequest,
    ScriptBatcher,
    StoreUnavailableNow,
    state_key,
)
from proxy.storage.client_keys import ClientKey, KeyLimits
from proxy.storage.redis import Store, StoreUnavailable, StoreUnreadable
from proxy.storage.usage_writer import MAX_COUNT
from router_core.pricing import PICO, picousd
from router_core.text import rfc3339

MAX_KEYS = 10_000

UNKNOWN_WAIT_S = 60.0
"""Where nothing is ever refilled."""


@dataclass(frozen=True, slots=True)
class BucketState:
    """What was used at some time, in seconds of whichever clock the caller goes by."""

    used: float = 0.0
    at: float = 0.0


def refill(level: BucketState, per_minute: float, now: float) -> BucketState:
    """The level now. A clock that went back refills nothing."""
    return BucketState(max(0.0, level.used - max(0.0, now - level.at) * per_minute / 60), now)


def take(level: BucketState, per_minute: float, amount: float, now: float) -> BucketState | None:
    """The level after taking `amount`; None: there is not so much."""
    current = refill(level, per_minute, now)
    return None if current.used + amount > per_minute else BucketState(current.used + amount, now)


def adjust(level: BucketState, per_minute: float, more: float, now: float) -> BucketState:
    """The level after `more`, or less where that is negative, was used than had been taken. May be a debt."""
    return BucketState(max(0.0, refill(level, per_minute, now).used + more), now)


def wait_s(used: float, amount: float, per_minute: float) -> float:
    """Seconds until `amount` can be taken."""
    return max(0.0, used + amount - per_minute) * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


def time_to_full(used: float, per_minute: float) -> float:
    """Seconds until it is full."""
    return used * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


class BucketCache:
    """Levels by name, of the names used last."""

    def __init__(self, most: int = MAX_KEYS) -> None:
        self._most = most
        self._levels: OrderedDict[str, BucketState] = OrderedDict()

    def __getitem__(self, name: str) -> BucketState:
        return self._levels.get(name, BucketState())

    def __setitem__(self, name: str, level: BucketState) -> None:
        self._levels[name] = level
        self._levels.move_to_end(name)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)

    def __len__(self) -> int:
        return len(self._levels)


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """What is used, this request included where it was granted."""

    requests: float
    tokens: float
    spent_picousd: dict[str, int] = field(default_factory=dict)
    """Of the day and the month. Empty: not known here."""
    reserved_picousd: int = 0
    now: float = 0.0
    """Unix seconds by Redis' clock."""

    @classmethod
    def of_reply(cls, reply: Sequence[str]) -> LimitStatus:
        """What the script `RESERVE` says after its verdict."""
        requests, tokens, day, month, reserved, ended, now = reply
        spent = {"day": int(day) + int(ended), "month": int(month) + int(ended)}
        return cls(float(requests), float(tokens), spent, int(reserved), float(now))


Settling = asyncio.Future[Any]


def _no_op(_: int | None, __: int | None) -> None:
    """Of nothing that was set aside."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request that may be sent."""

    key_id: str
    reservation: str | None
    """To be settled by the usage record. None: there is none in Redis."""
    headers: dict[str, str]
    used: Callable[[int | None, int | None], Settling | None] = _no_op
    """Is told the tokens and picodollars that the request took, as far as they are known. What it returns is done, or
    has failed, when the next request is judged by them."""
    wait_s: float = 0.0
    """How long that is waited for at most."""


def rate_headers(limits: KeyLimits, standing: LimitStatus) -> dict[str, str]:
    """`x-ratelimit-limit-requests`, `-remaining-` and `-reset-`, and the same of tokens; of those that are limited."""
    kinds = (
        ("requests", limits.requests_per_minute, standing.requests),
        ("tokens", limits.tokens_per_minute, standing.tokens),
    )
    headers: dict[str, str] = {}
    for kind, per_minute, used in kinds:
        if per_minute is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(per_minute - used)))
            headers[f"x-ratelimit-reset-{kind}"] = duration(time_to_full(used, per_minute))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


MAX_WAIT_S = 3600

NEVER = {"x-should-retry": "false"}
"""OpenAI's clients ask a 429 again otherwise."""


def rate_limited(kind: str, limits: KeyLimits, standing: LimitStatus, claim: ReservationRequest) -> RateLimited:
    """`kind`: requests or tokens."""
    if kind == "requests":
        per_minute, used, amount = limits.requests_per_minute or 0, standing.requests, 1
    else:
        per_minute, used, amount = limits.tokens_per_minute or 0, standing.tokens, claim.tokens
    wait = max(1, math.ceil(min(wait_s(used, amount, per_minute), MAX_WAIT_S)))
    left = max(0, math.floor(per_minute - used))
    return RateLimited(
        f"this key may use {per_minute:,} {kind} per minute; {left:,} are left, and this request needs {amount:,}:"
        f" try again in {wait} s",
        headers={"retry-after": str(wait), **rate_headers(limits, standing)},
    )


def request_too_large_error(limits: KeyLimits, claim: ReservationRequest) -> RateLimited:
    return RateLimited(
        f"this key may use {limits.tokens_per_minute or 0:,} tokens per minute, and this request alone may take"
        f" {claim.tokens:,}; shorten the prompt, or state a smaller max_tokens",
        headers=NEVER,
    )


def budget_exceeded(period: str, limits: KeyLimits, standing: LimitStatus, claim: ReservationRequest) -> BudgetExceeded:
    """`period`: day or month."""
    limit_usd = (limits.usd_per_day if period == "day" else limits.usd_per_month) or 0.0
    spent = standing.spent_picousd[period]
    told = (
        f"this key may spend {format_usd(picousd(limit_usd))} a {period}: {format_usd(spent)} are spent,"
        f" {format_usd(standing.reserved_picousd)} are set aside for requests under way, and this one may cost"
        f" {format_usd(claim.picousd)}; "
    )
    if spent + claim.picousd <= picousd(limit_usd):
        return BudgetExceeded(told + "try again when they have ended", headers={"retry-after": "1"})
    return BudgetExceeded(f"{told}it begins again at {next_start(period, standing.now)}", headers=NEVER)


def budget_unavailable_error(why: str) -> ServiceUnavailable:
    message = f"the budget of this key cannot be checked now, and it has a spend limit: {why}"
    return ServiceUnavailable(message, headers={"retry-after": "1"})


def next_start(period: str, now: float) -> str:
    """When the day or month after `now`, Unix seconds, begins."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    after = today + timedelta(days=1) if period == "day" else (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return rfc3339(after.timestamp())


def format_usd(picodollars: int) -> str:
    """To a millionth of a dollar, or exactly where it is less."""
    whole, rest = divmod(picodollars, PICO)
    digits = f"{rest:012d}"
    shown = digits[:6] if whole or rest >= 10**6 else digits
    return f"${whole}.{shown}".rstrip("0").rstrip(".")


log = logging.getLogger("uniroute.limits")

RETRY_INTERVAL_S = 1.0

MAX_ORPHANS = 10_000

MAX_COMPLAINTS = 1000

Refusal = Literal["requests", "tokens", "day", "month"]


class RateLimiter:
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
        self._asking = ScriptBatcher(store, (RESERVE, END), timeout_s)
        self._settle = store.client.register_script(SETTLE)
        self._buckets = BucketCache()
        self._away = False
        self._unreadable: set[str] = set()
        self._strays: dict[str, str] = {}
        self._giving_back: asyncio.Task[None] | None = None

    async def reserve(self, key: ClientKey, claim: ReservationRequest) -> Reservation:
        """Set `claim` aside, for a key that has limits.

        Raises:
            RateLimited, BudgetExceeded: nothing was set aside.
            Unavailable: Redis does not answer, and there is a spend limit.
        """
        limits = key.limits
        if limits.tokens_per_minute is not None and claim.tokens > limits.tokens_per_minute:
            self._metrics.limited.labels("tokens").inc()
            raise request_too_large_error(limits, claim)
        try:
            verdict, *reply = await self._answer(key, claim)
        except StoreUnavailableNow as error:
            return self._without_store(key, claim, error, reservation=None)
        except StoreUnavailable as error:
            return self._without_store(key, claim, error, reservation=claim.id)
        self._back()
        return self._decided(key, claim, verdict, LimitStatus.of_reply(reply))

    @property
    def silent(self) -> bool:
        """Redis did not answer, and is not asked."""
        return self._asking.silent

    @property
    def strays(self) -> int:
        """Reservations that wait to be given back."""
        return len(self._strays)

    def release(self, granted: Reservation) -> None:
        """Of a request that was never sent, and has no usage record: as soon as Redis answers."""
        granted.used(0, 0)
        if granted.reservation is not None:
            self._give_back_soon(granted.key_id, granted.reservation)

    async def close(self) -> None:
        """What could not be given back ends by itself."""
        await self._asking.close()
        await cancel_and_wait(self._giving_back)

    async def _answer(self, key: ClientKey, claim: ReservationRequest) -> list[str]:
        answer = self._asking.ask(RESERVE, state_key(key.id), _arguments(key, claim))
        try:
            return str(await asyncio.shield(answer)).split()
        except asyncio.CancelledError:  # the client left, and what is granted to it now is nobody's
            answer.add_done_callback(lambda _: self._give_back_soon(key.id, claim.id))
            raise

    def _decided(self, key: ClientKey, claim: ReservationRequest, verdict: str, standing: LimitStatus) -> Reservation:
        if verdict == "granted":
            headers = rate_headers(key.limits, standing)
            if not (claim.tokens or claim.picousd):
                return Reservation(key.id, claim.id, headers)
            return Reservation(key.id, claim.id, headers, partial(self._ended, key.id, claim), self._timeout_s)
        self._metrics.limited.labels(verdict).inc()
        if verdict in ("day", "month"):
            raise budget_exceeded(verdict, key.limits, standing, claim)
        raise rate_limited(verdict, key.limits, standing, claim)

    def _ended(
        self, key_id: str, claim: ReservationRequest, tokens: int | None, picousd: int | None
    ) -> Settling | None:
        """In the store. Where it does not hear of this, what was set aside stays until the usage record is there."""
        known = picousd is not None and picousd <= MAX_COUNT
        took = ("" if tokens is None else tokens, picousd if picousd is not None and known else "")
        try:
            settling = self._asking.ask(END, state_key(key_id), (key_id, claim.id, *took))
        except StoreUnavailableNow:
            return None
        settling.add_done_callback(_looked_at)
        return settling

    def _without_store(
        self, key: ClientKey, claim: ReservationRequest, error: StoreUnavailable, reservation: str | None
    ) -> Reservation:
        """`reservation`: Redis may have heard of it, and has it then until it is settled."""
        self._note(key, error)
        try:
            return self._locally(key, claim, str(error), reservation)
        except ProxyError:
            if reservation is not None:
                self._give_back_soon(key.id, reservation)
            raise

    def _locally(self, key: ClientKey, claim: ReservationRequest, why: str, reservation: str | None) -> Reservation:
        outcome = "refused" if key.limits.money and not self._open else "open" if key.limits.money else "local"
        self._metrics.limits_unchecked.labels(outcome).inc()
        if outcome == "refused":
            raise budget_unavailable_error(why)
        refused, standing = self._taken(key.id, key.limits, claim.tokens)
        if refused is not None:
            self._metrics.limited.labels(refused).inc()
            raise rate_limited(refused, key.limits, standing, claim)
        used = partial(self._correct, key.id, key.limits, claim.tokens)
        return Reservation(key.id, reservation, rate_headers(key.limits, standing), used)

    def _taken(self, key_id: str, limits: KeyLimits, tokens: int) -> tuple[Refusal | None, LimitStatus]:
        """From this process' own buckets, all or nothing; the first that has not enough, or None."""
        now = self._clock()
        wanted: tuple[tuple[Refusal, int | None, int], ...] = (
            ("requests", limits.requests_per_minute, 1),
            ("tokens", limits.tokens_per_minute, tokens),
        )
        levels, refused = {}, None
        for kind, per_minute, amount in wanted:
            level = refill(self._buckets[f"{kind}:{key_id}"], per_minute or 0, now)
            after = level if per_minute is None else take(level, per_minute, amount, now)
            refused = kind if after is None and refused is None else refused
            levels[kind] = after or level
        if refused is None:
            for kind, level in levels.items():
                self._buckets[f"{kind}:{key_id}"] = level
        return refused, LimitStatus(levels["requests"].used, levels["tokens"].used)

    def _correct(self, key_id: str, limits: KeyLimits, claimed: int, tokens: int | None, _: int | None) -> None:
        """In this process' own bucket."""
        if limits.tokens_per_minute is not None and tokens is not None:
            name = f"tokens:{key_id}"
            more = tokens - claimed
            self._buckets[name] = adjust(self._buckets[name], limits.tokens_per_minute, more, self._clock())

    def _give_back_soon(self, key_id: str, reservation: str) -> None:
        if len(self._strays) < MAX_ORPHANS:
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
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            self._strays.pop(reservation, None)

    def _note(self, key: ClientKey, error: StoreUnavailable) -> None:
        if isinstance(error.__cause__, ResponseError):
            if key.id not in self._unreadable and len(self._unreadable) < MAX_COMPLAINTS:
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


def _arguments(key: ClientKey, claim: ReservationRequest) -> list[str | int | float]:
    limits = key.limits
    budgets = [None if usd is None else picousd(usd) for usd in (limits.usd_per_day, limits.usd_per_month)]
    stated = [limits.requests_per_minute, limits.tokens_per_minute, *budgets]
    return [key.id, claim.id, claim.lives_s, claim.tokens, claim.picousd, *("" if n is None else n for n in stated)]
