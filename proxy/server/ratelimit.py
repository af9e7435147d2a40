"""Limits of client keys: token buckets, the rate limiter, its headers and its refusals.

A bucket holds what may be used in a minute, all of which may be taken at once, and refills continuously. What is kept
is the amount used, which leaks away: nothing used is a full bucket, and more than a minute's is a debt.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Literal

from redis.exceptions import ResponseError

from proxy.concurrency import LRU, cancel_and_wait
from proxy.errors import APIError, BudgetExceeded, RateLimited, ServiceUnavailable
from proxy.server.metrics import Metrics
from proxy.server.reservations import (
    END,
    RESERVE,
    SETTLE,
    Reservation,
    ReservationRequest,
    Settlement,
    state_key,
)
from proxy.storage.client_keys import ClientKey, KeyLimits
from proxy.storage.command_batcher import CommandBatcher, StoreUnavailableNow
from proxy.storage.redis import Availability, Store, StoreUnavailable, StoreUnreadable
from proxy.storage.usage_writer import MAX_COUNT
from router_core.pricing import PICO, picousd
from router_core.text import rfc3339
from router_core.types import frozen

log = logging.getLogger("uniroute.limits")

# How long a request waits for Redis.
TIMEOUT_S = 0.05

# Keys whose buckets a process keeps by itself.
MAX_KEYS = 10_000

RETRY_INTERVAL_S = 1.0

MAX_ORPHANS = 10_000

MAX_WARNINGS = 1000

Refusal = Literal["requests", "tokens", "day", "month"]


class RateLimiter:
    """Keep the limits of client keys. All processes over one Redis keep the same limits.

    Without Redis each process keeps the rates by itself, and keys with a spend limit are refused.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        open_without_store: bool = False,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_without_store`: serve keys with spend limits while Redis does not answer within `timeout_s`."""
        self._store = store
        self._metrics = metrics
        self._open = open_without_store
        self._clock = clock
        self._timeout_s = timeout_s
        self._scripts = CommandBatcher(store, "check the limits of a key", timeout_s, (RESERVE, END))
        self._settle_script = store.client.register_script(SETTLE)
        self._buckets: LRU[str, BucketState] = LRU(MAX_KEYS)
        self._availability = Availability(log, back="limits are checked in the store again")
        self._unreadable: set[str] = set()
        self._orphans: dict[str, str] = {}  # reservation → key id, of reservations that wait to be released
        self._releasing: asyncio.Task[None] | None = None

    async def reserve(self, key: ClientKey, request: ReservationRequest) -> Reservation:
        """Reserve what a request may take, for a key that has limits.

        Raises:
            RateLimited, BudgetExceeded: nothing is reserved.
            ServiceUnavailable: Redis does not answer, and the key has a spend limit.
        """
        limits = key.limits
        if limits.tokens_per_minute is not None and request.tokens > limits.tokens_per_minute:
            self._metrics.limited.labels("tokens").inc()
            raise request_too_large_error(limits, request)
        try:
            verdict, *reply = await self._run_reserve(key, request)
        except StoreUnavailableNow as error:
            return self._reserve_locally(key, request, error, reservation=None)
        except StoreUnavailable as error:
            return self._reserve_locally(key, request, error, reservation=request.id)
        self._availability.mark_available()
        status = LimitStatus.of_reply(reply)
        if verdict == "granted":
            headers = rate_headers(limits, status)
            if not (request.tokens or request.picousd):
                return Reservation(key.id, request.id, headers)
            settle = partial(self._settle, key.id, request.id)
            return Reservation(key.id, request.id, headers, settle, self._timeout_s)
        self._metrics.limited.labels(verdict).inc()
        if verdict in ("day", "month"):
            raise budget_error(verdict, limits, status, request)
        raise rate_limit_error(verdict, limits, status, request)

    async def close(self) -> None:
        """Stop. Reservations that could not be released expire."""
        await self._scripts.close()
        await cancel_and_wait(self._releasing)

    async def _run_reserve(self, key: ClientKey, request: ReservationRequest) -> list[str]:
        release = partial(self._release_soon, key.id, request.id)
        answer = self._scripts.call_script(RESERVE, state_key(key.id), _arguments(key, request), release)
        try:
            return str(await answer).split()
        except asyncio.CancelledError:  # the client left; what may still be granted is released
            if not answer.cancelled():
                release()
            raise

    def _settle(self, key_id: str, reservation: str, tokens: int | None, picousd: int | None) -> Settlement | None:
        """Replace what is reserved by what was used. If Redis does not hear of it, the usage record settles it."""
        known = picousd is not None and picousd <= MAX_COUNT
        took = ("" if tokens is None else str(tokens), str(picousd) if known else "")
        try:
            settlement = self._scripts.call_script(END, state_key(key_id), (key_id, reservation, *took))
        except StoreUnavailableNow:
            return None
        settlement.add_done_callback(_log_failure)
        return settlement

    def _reserve_locally(
        self, key: ClientKey, request: ReservationRequest, error: StoreUnavailable, reservation: str | None
    ) -> Reservation:
        """Reserve from this process's own buckets.

        Args:
            reservation: Redis may have heard of it, and keeps it then until it is settled.
        """
        self._log_unavailable(key, error)
        limits = key.limits
        outcome = "refused" if limits.money and not self._open else "open" if limits.money else "local"
        self._metrics.limits_unchecked.labels(outcome).inc()
        try:
            if outcome == "refused":
                raise budget_unavailable_error(str(error))
            refusal, status = self._take(key.id, limits, request.tokens)
            if refusal is not None:
                self._metrics.limited.labels(refusal).inc()
                raise rate_limit_error(refusal, limits, status, request)
        except APIError:
            if reservation is not None:
                self._release_soon(key.id, reservation)
            raise
        settle = partial(self._adjust, key.id, limits, request.tokens)
        return Reservation(key.id, reservation, rate_headers(limits, status), settle)

    def _take(self, key_id: str, limits: KeyLimits, tokens: int) -> tuple[Refusal | None, LimitStatus]:
        """Take from both buckets or from none. Return the first bucket that has not enough, or None."""
        now = self._clock()
        wanted: tuple[tuple[Refusal, int | None, int], ...] = (
            ("requests", limits.requests_per_minute, 1),
            ("tokens", limits.tokens_per_minute, tokens),
        )
        states: dict[Refusal, BucketState] = {}
        refusal: Refusal | None = None
        for kind, per_minute, amount in wanted:
            state = refill(self._bucket(kind, key_id), per_minute or 0, now)
            after = state if per_minute is None else take(state, per_minute, amount, now)
            refusal = kind if after is None and refusal is None else refusal
            states[kind] = after or state
        if refusal is None:
            for kind, state in states.items():
                self._buckets[f"{kind}:{key_id}"] = state
        return refusal, LimitStatus(states["requests"].used, states["tokens"].used)

    def _bucket(self, kind: Refusal, key_id: str) -> BucketState:
        return self._buckets.get(f"{kind}:{key_id}") or BucketState()

    def _adjust(self, key_id: str, limits: KeyLimits, reserved: int, tokens: int | None, _: int | None) -> None:
        """Correct this process's own bucket of tokens."""
        if limits.tokens_per_minute is not None and tokens is not None:
            state = self._bucket("tokens", key_id)
            self._buckets[f"tokens:{key_id}"] = adjust(
                state, limits.tokens_per_minute, tokens - reserved, self._clock()
            )

    def _release_soon(self, key_id: str, reservation: str) -> None:
        """Release what Redis may have granted to a request that is not served, and so has no usage record."""
        if len(self._orphans) < MAX_ORPHANS:
            self._orphans[reservation] = key_id
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release_orphans(), name="uniroute-limits")

    async def _release_orphans(self) -> None:
        while self._orphans:
            reservation, key_id = next(iter(self._orphans.items()))
            try:
                async with self._store.operation("give back a reservation"):
                    await self._settle_script(keys=[state_key(key_id)], args=[key_id, reservation, "0", "0", "", ""])
            except StoreUnreadable as error:
                log.warning("a reservation of the key %s is not given back, and ends by itself: %s", key_id, error)
            except StoreUnavailable as error:
                log.debug("a reservation waits to be given back: %s", error)
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            self._orphans.pop(reservation, None)

    def _log_unavailable(self, key: ClientKey, error: StoreUnavailable) -> None:
        if isinstance(error.__cause__, ResponseError):
            if key.id not in self._unreadable and len(self._unreadable) < MAX_WARNINGS:
                self._unreadable.add(key.id)
                log.warning("what the key %s has used cannot be checked: %s", key.id, error)
            return
        money = "are served unchecked (limits_without_store: allow)" if self._open else "are refused"
        self._availability.mark_unavailable(
            f"rate limits are kept by this process alone, and keys with spend limits {money}: {error}"
        )


def _log_failure(settlement: Settlement) -> None:
    if not settlement.cancelled() and (error := settlement.exception()) is not None:
        log.debug("what a request took waits for its usage record: %s", error)


def _arguments(key: ClientKey, request: ReservationRequest) -> list[str]:
    limits = key.limits
    amounts = [str(request.ttl_s), str(request.tokens), str(request.picousd)]
    return [key.id, request.id, *amounts, *_configured(limits)]


@lru_cache(maxsize=1024)
def _configured(limits: KeyLimits) -> tuple[str, ...]:
    """Return the limits as reserve.lua reads them."""
    budgets = [None if usd is None else picousd(usd) for usd in (limits.usd_per_day, limits.usd_per_month)]
    configured = (limits.requests_per_minute, limits.tokens_per_minute, *budgets)
    return tuple("" if limit is None else str(limit) for limit in configured)


@frozen
class LimitStatus:
    """What a key has used, this request included if it was granted."""

    requests: float
    tokens: float
    spent_picousd: dict[str, int] = field(default_factory=dict)
    """Of the day and of the month. Empty: not known here."""
    reserved_picousd: int = 0
    now: float = 0.0
    """Unix seconds by Redis' clock."""

    @classmethod
    def of_reply(cls, reply: Sequence[str]) -> LimitStatus:
        """Parse what reserve.lua returns after its verdict."""
        requests, tokens, day, month, reserved, ended, now = reply
        spent = {"day": int(day) + int(ended), "month": int(month) + int(ended)}
        return cls(float(requests), float(tokens), spent, int(reserved), float(now))


# Of a bucket that is never refilled.
UNKNOWN_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class BucketState:
    """The amount used at some time, in seconds of the caller's clock."""

    used: float = 0.0
    at: float = 0.0


def refill(state: BucketState, per_minute: float, now: float) -> BucketState:
    """Return the state now. A clock that went back refills nothing."""
    return BucketState(max(0.0, state.used - max(0.0, now - state.at) * per_minute / 60), now)


def take(state: BucketState, per_minute: float, amount: float, now: float) -> BucketState | None:
    """Return the state after taking `amount`; None if there is not so much."""
    current = refill(state, per_minute, now)
    return None if current.used + amount > per_minute else BucketState(current.used + amount, now)


def adjust(state: BucketState, per_minute: float, more: float, now: float) -> BucketState:
    """Return the state after `more` was used than had been taken, or less if it is negative. It may be a debt."""
    return BucketState(max(0.0, refill(state, per_minute, now).used + more), now)


def wait_s(used: float, amount: float, per_minute: float) -> float:
    """Return the seconds until `amount` can be taken."""
    return max(0.0, used + amount - per_minute) * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


def time_to_full(used: float, per_minute: float) -> float:
    """Return the seconds until the bucket is full."""
    return used * 60 / per_minute if per_minute else UNKNOWN_WAIT_S


def rate_headers(limits: KeyLimits, status: LimitStatus) -> dict[str, str]:
    """Return `x-ratelimit-limit-requests`, `-remaining-requests`, `-reset-requests`, and the same of tokens.

    Only what is limited has headers.
    """
    kinds = (
        ("requests", limits.requests_per_minute, status.requests),
        ("tokens", limits.tokens_per_minute, status.tokens),
    )
    headers: dict[str, str] = {}
    for kind, per_minute, used in kinds:
        if per_minute is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(per_minute - used)))
            headers[f"x-ratelimit-reset-{kind}"] = duration(time_to_full(used, per_minute))
    return headers


def duration(seconds: float) -> str:
    """Format seconds as OpenAI does: `12ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`."""
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

# OpenAI's clients repeat a 429 otherwise.
DO_NOT_RETRY = {"x-should-retry": "false"}


def rate_limit_error(kind: str, limits: KeyLimits, status: LimitStatus, request: ReservationRequest) -> RateLimited:
    """Say when to try again. `kind`: requests or tokens."""
    if kind == "requests":
        per_minute, used, amount = limits.requests_per_minute or 0, status.requests, 1
    else:
        per_minute, used, amount = limits.tokens_per_minute or 0, status.tokens, request.tokens
    wait = max(1, math.ceil(min(wait_s(used, amount, per_minute), MAX_WAIT_S)))
    left = max(0, math.floor(per_minute - used))
    return RateLimited(
        f"this key may use {per_minute:,} {kind} per minute; {left:,} are left, and this request needs {amount:,}:"
        f" try again in {wait} s",
        headers={"retry-after": str(wait), **rate_headers(limits, status)},
    )


def request_too_large_error(limits: KeyLimits, request: ReservationRequest) -> RateLimited:
    return RateLimited(
        f"this key may use {limits.tokens_per_minute or 0:,} tokens per minute, and this request alone may take"
        f" {request.tokens:,}; shorten the prompt, or state a smaller max_tokens",
        headers=DO_NOT_RETRY,
    )


def budget_error(period: str, limits: KeyLimits, status: LimitStatus, request: ReservationRequest) -> BudgetExceeded:
    """Say what is spent and when the period begins again. `period`: day or month."""
    limit_usd = (limits.usd_per_day if period == "day" else limits.usd_per_month) or 0.0
    spent = status.spent_picousd[period]
    message = (
        f"this key may spend {format_usd(picousd(limit_usd))} a {period}: {format_usd(spent)} are spent,"
        f" {format_usd(status.reserved_picousd)} are set aside for requests under way, and this one may cost"
        f" {format_usd(request.picousd)}; "
    )
    if spent + request.picousd <= picousd(limit_usd):
        return BudgetExceeded(message + "try again when they have ended", headers={"retry-after": "1"})
    return BudgetExceeded(f"{message}it begins again at {next_start(period, status.now)}", headers=DO_NOT_RETRY)


def budget_unavailable_error(why: str) -> ServiceUnavailable:
    message = f"the budget of this key cannot be checked now, and it has a spend limit: {why}"
    return ServiceUnavailable(message, headers={"retry-after": "1"})


def next_start(period: str, now: float) -> str:
    """Return the beginning of the day or month after `now`, in Unix seconds."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    after = today + timedelta(days=1) if period == "day" else (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return rfc3339(after.timestamp())


def format_usd(picodollars: int) -> str:
    """Format an amount to a millionth of a dollar, or exactly if it is less than that."""
    whole, rest = divmod(picodollars, PICO)
    digits = f"{rest:012d}"
    shown = digits[:6] if whole or rest >= 10**6 else digits
    return f"${whole}.{shown}".rstrip("0").rstrip(".")
