from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from proxy.server.ratelimit import RateLimiter
from proxy.server.reservations import END, PREFIX, RESERVE, SETTLE, Reservation, ReservationRequest, state_key
from proxy.storage.client_keys import ClientKey, KeyLimits, digest_of, new_secret
from proxy.storage.redis import CHANGED, KEYS, VERSION, Store, awaited
from router_core.pricing import PICO
from tests.support.waiting import MAX_WAIT_S, POLL_S

CENT = PICO // 100


def a_key(**limits: Any) -> ClientKey:
    return ClientKey(uuid.uuid4().hex[:12], "limited", digest_of("x"), 1.0, limits=KeyLimits(**limits))


def a_request(name: str = "r", *, tokens: int = 0, picousd: int = 0) -> ReservationRequest:
    return ReservationRequest(name, tokens, picousd, 600)


async def settle(store: Store, reservation: Reservation, *, tokens: int | str = "", picousd: int | str = "") -> None:
    """Settle as the usage record does."""
    arguments = _settle_arguments(reservation.key_id, reservation.id or "", tokens, picousd, "2026-01-01")
    await store.client.register_script(SETTLE)(keys=[state_key(reservation.key_id)], args=arguments)


def _settle_arguments(
    key_id: str, reservation: str, tokens: int | str, picousd: int | str, day: str
) -> tuple[str, ...]:
    return key_id, reservation, str(tokens), str(picousd), day, day[:7]


async def reserved(store: Store, key: ClientKey) -> int:
    """Return the picodollars that are reserved."""
    return int(_text(await awaited(store.client.hget(state_key(key.id), "reserved"))))


async def until_asked_again(limiter: RateLimiter) -> None:
    """Return once requests are checked by Redis, after a time in which it did not answer."""
    key, deadline = a_key(requests_per_minute=10**9), time.monotonic() + MAX_WAIT_S
    while (await limiter.reserve(key, a_request(uuid.uuid4().hex))).id is None:
        assert time.monotonic() < deadline, "Redis is not asked again"
        await asyncio.sleep(POLL_S)


@dataclass(frozen=True)
class KeyScripts:
    """Run the scripts of one key's limits over a connection of the test's own."""

    client: redis.Redis
    key_id: str = "k"

    def reserve(
        self,
        reservation: str,
        picousd: int,
        *,
        tokens: int = 0,
        tokens_per_minute: int | str = "",
        picousd_per_day: int | str = "",
        picousd_per_month: int | str = "",
    ) -> str:
        """Reserve for ten minutes, and return the verdict: `granted`, or the limit that refuses."""
        limits = "", tokens_per_minute, picousd_per_day, picousd_per_month
        return _text(self._run(RESERVE, self.key_id, reservation, 600, tokens, picousd, *limits)).split()[0]

    def end(self, reservation: str, picousd: int, *, tokens: int | str = "") -> None:
        """End an answer whose usage record is still to come."""
        self._run(END, self.key_id, reservation, tokens, picousd)

    def settle(self, reservation: str, picousd: int | str, *, tokens: int | str = "", day: str | None = None) -> None:
        """Settle as the usage record does, which states the day on which it was written: today, unless stated."""
        self._run(SETTLE, *_settle_arguments(self.key_id, reservation, tokens, picousd, day or self.today))

    @property
    def today(self) -> str:
        """The day by Redis' clock."""
        now: Any = self.client.time()
        return datetime.fromtimestamp(now[0], UTC).strftime("%Y-%m-%d")

    def _run(self, script: str, *arguments: int | str) -> Any:
        return self.client.eval(script, 1, state_key(self.key_id), *map(str, arguments))


@dataclass(frozen=True)
class LimitedKey:
    id: str
    secret: str
    store: redis.Redis

    @classmethod
    def put(cls, store: redis.Redis, **limits: Any) -> LimitedKey:
        """Store the key. Running processes know it within a second."""
        secret = new_secret()
        key = ClientKey(uuid.uuid4().hex[:12], "limited", digest_of(secret), 1.0, limits=KeyLimits(**limits))
        store.hset(KEYS, key.id, key.to_json())
        store.publish(CHANGED, str(store.incr(VERSION)))
        return cls(key.id, secret, store)

    @property
    def spent_usd(self) -> float:
        """Return the USD spent on the only day that there is."""
        days: Any = self.store.keys(f"{PREFIX}{{{self.id}}}:day:*")
        return sum(int(_text(self.store.get(day))) for day in days) / PICO

    @property
    def reserved_usd(self) -> float:
        return int(_text(self.store.hget(state_key(self.id), "reserved"))) / PICO

    @property
    def open(self) -> int:
        """Count the reservations that are not settled."""
        return int(_text(self.store.zcard(f"{PREFIX}{{{self.id}}}:open")))

    def let_reservations_end(self) -> None:
        """Let the reservations expire."""
        name = f"{PREFIX}{{{self.id}}}:open"
        members: Any = self.store.zrange(name, 0, -1)
        for member in members:
            self.store.zadd(name, {member: 0})

    def spend(self, usd: float, day: str = "2026-01-31") -> None:
        """Record the cost of a request of an earlier day."""
        KeyScripts(self.store, self.id).settle("", round(usd * PICO), day=day)


def _text(value: Any) -> str:
    return "0" if value is None else value.decode() if isinstance(value, bytes) else str(value)
