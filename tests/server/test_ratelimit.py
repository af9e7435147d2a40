from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.errors import BudgetExceeded, RateLimited
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import RateLimiter, duration, format_usd, next_start
from proxy.server.reservations import PREFIX, Reservation, ReservationRequest, state_key
from proxy.server.responses import render_error
from proxy.storage.redis import Store
from router_core.pricing import PICO
from tests.support.limited_keys import CENT, a_key, a_request, reserved, settle
from tests.support.waiting import until

# This machine may be busy.
TIMEOUT_S = 1.0


@pytest.fixture
async def limiter(store: Store) -> AsyncIterator[RateLimiter]:
    opened = RateLimiter(store, Metrics(), timeout_s=TIMEOUT_S)
    yield opened
    await opened.close()


@pytest.fixture
async def second(second_store: Store) -> AsyncIterator[RateLimiter]:
    opened = RateLimiter(second_store, Metrics(), timeout_s=TIMEOUT_S)
    yield opened
    await opened.close()


async def test_requests_of_all_processes_are_counted_together(limiter: RateLimiter, second: RateLimiter) -> None:
    key = a_key(requests_per_minute=2)
    first = await limiter.reserve(key, a_request("1"))
    await second.reserve(key, a_request("2"))
    with pytest.raises(RateLimited) as refused:
        await limiter.reserve(key, a_request("3"))

    status, body, headers = render_error(refused.value)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert "2 requests per minute" in body["error"]["message"]
    assert 28 <= int(headers["retry-after"]) <= 30
    assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_are_reserved_and_corrected_by_what_was_used(store: Store, limiter: RateLimiter) -> None:
    key = a_key(tokens_per_minute=1000)
    first = await limiter.reserve(key, a_request("1", tokens=900))
    with pytest.raises(RateLimited, match="needs 200"):
        await limiter.reserve(key, a_request("2", tokens=200))
    await settle(store, first, tokens=100)
    second = await limiter.reserve(key, a_request("3", tokens=200))

    assert 700 <= int(second.headers["x-ratelimit-remaining-tokens"]) <= 720
    assert re.fullmatch(r"1[78](\.\d+)?s", second.headers["x-ratelimit-reset-tokens"])


async def test_tokens_beyond_the_reservation_are_a_debt(store: Store, limiter: RateLimiter) -> None:
    key = a_key(tokens_per_minute=1000)
    await settle(store, await limiter.reserve(key, a_request("1", tokens=10)), tokens=3000)
    with pytest.raises(RateLimited) as refused:
        await limiter.reserve(key, a_request("2", tokens=1))

    assert 115 <= int(refused.value.headers["retry-after"]) <= 121


async def test_unreported_tokens_count_as_reserved(store: Store, limiter: RateLimiter) -> None:
    key = a_key(tokens_per_minute=1000)
    await settle(store, await limiter.reserve(key, a_request("1", tokens=900)))

    with pytest.raises(RateLimited):
        await limiter.reserve(key, a_request("2", tokens=200))


async def test_tokens_without_a_reservation_are_no_debt(store: Store, limiter: RateLimiter) -> None:
    """Records that waited while Redis was away, and whose requests this process' own bucket has let through."""
    key = a_key(tokens_per_minute=1000)
    await limiter.reserve(key, a_request("1", tokens=10))
    await settle(store, Reservation(key.id, None, {}), tokens=30_000)

    assert (await limiter.reserve(key, a_request("2", tokens=900))).id == "2"


async def test_a_request_that_can_never_fit_must_not_be_retried(limiter: RateLimiter) -> None:
    with pytest.raises(RateLimited, match="smaller max_tokens") as refused:
        await limiter.reserve(a_key(tokens_per_minute=100), a_request(tokens=101))

    assert refused.value.headers == {"x-should-retry": "false"}


@pytest.mark.parametrize("period", ["day", "month"])
async def test_money_is_reserved_settled_and_refused_beyond_the_limit(
    store: Store, limiter: RateLimiter, second: RateLimiter, period: str
) -> None:
    key = a_key(**{f"usd_per_{period}": 0.05})
    await settle(store, await limiter.reserve(key, a_request("1", picousd=4 * CENT)), picousd=3 * CENT)
    await second.reserve(key, a_request("2", picousd=2 * CENT))
    with pytest.raises(BudgetExceeded) as refused:
        await limiter.reserve(key, a_request("3", picousd=3 * CENT))

    status, body, headers = render_error(refused.value)
    message = body["error"]["message"]
    assert (status, body["error"]["type"], body["error"]["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert headers == {"x-should-retry": "false"}
    for words in (f"$0.05 a {period}", "$0.03 are spent", "$0.02 are set aside", "cost $0.03", "begins again at 2"):
        assert words in message


async def test_what_an_answer_used_counts_before_its_usage_record_and_once_after_it(
    store: Store, limiter: RateLimiter, second: RateLimiter
) -> None:
    key = a_key(usd_per_day=0.05, tokens_per_minute=1000)
    reservation = await limiter.reserve(key, a_request("1", tokens=900, picousd=4 * CENT))
    settlement = reservation.settle(100, 3 * CENT)
    assert settlement is not None
    await settlement
    again = await second.reserve(key, a_request("2", tokens=800, picousd=CENT))
    with pytest.raises(BudgetExceeded, match=r"\$0.03 are spent, \$0.01 are set aside"):
        await limiter.reserve(key, a_request("3", picousd=2 * CENT))
    await settle(store, reservation, tokens=100, picousd=3 * CENT)
    with pytest.raises(BudgetExceeded, match=r"\$0.03 are spent, \$0.01 are set aside"):
        await limiter.reserve(key, a_request("3", picousd=2 * CENT))

    assert 100 <= int(again.headers["x-ratelimit-remaining-tokens"]) <= 120


async def test_a_cost_beyond_the_reservation_is_spent_at_once(limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    settlement = (await limiter.reserve(key, a_request("1", picousd=CENT))).settle(None, 6 * CENT)
    assert settlement is not None
    await settlement

    with pytest.raises(BudgetExceeded, match="begins again"):
        await limiter.reserve(key, a_request("2", picousd=1))


async def test_an_unknown_cost_counts_as_reserved(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    reservation = await limiter.reserve(key, a_request("1", picousd=4 * CENT))
    settlement = reservation.settle(None, None)
    assert settlement is not None
    await settlement
    with pytest.raises(BudgetExceeded, match=r"\$0.04 are spent"):
        await limiter.reserve(key, a_request("2", picousd=2 * CENT))
    await settle(store, reservation)

    with pytest.raises(BudgetExceeded, match=r"\$0.04 are spent"):
        await limiter.reserve(key, a_request("2", picousd=2 * CENT))


async def test_a_key_with_only_a_request_limit_costs_no_round_trip_at_the_end(limiter: RateLimiter) -> None:
    assert (await limiter.reserve(a_key(requests_per_minute=5), a_request("1"))).settle(100, CENT) is None


async def test_a_request_refused_for_pending_reservations_may_be_retried_soon(limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    await limiter.reserve(key, a_request("1", picousd=4 * CENT))
    with pytest.raises(BudgetExceeded, match="when they have ended") as refused:
        await limiter.reserve(key, a_request("2", picousd=2 * CENT))

    assert refused.value.headers == {"retry-after": "1"}


async def test_a_request_that_costs_nothing_is_within_any_budget(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.01)
    await settle(store, await limiter.reserve(key, a_request("1", picousd=CENT)), picousd=2 * CENT)

    assert (await limiter.reserve(key, a_request("2"))).id == "2"


async def test_what_a_request_without_an_answer_reserved_can_be_used_at_once_and_is_released_once(
    store: Store, limiter: RateLimiter
) -> None:
    key = a_key(usd_per_day=0.05, tokens_per_minute=1000)
    reservation = await limiter.reserve(key, a_request("1", tokens=900, picousd=4 * CENT))
    kept = await limiter.reserve(key, a_request("2", tokens=50, picousd=CENT))
    settlement = reservation.settle(0, 0)
    assert settlement is not None
    await settlement
    for _ in range(2):
        await settle(store, reservation, tokens=0, picousd=0)

    assert await reserved(store, key) == CENT
    again = await limiter.reserve(key, a_request("3", tokens=900, picousd=4 * CENT))
    assert int(again.headers["x-ratelimit-remaining-tokens"]) <= 60
    assert kept.id == "2"


async def test_the_reservation_of_a_dead_process_expires(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    await limiter.reserve(key, a_request("1", picousd=5 * CENT))
    await store.client.zadd(f"{PREFIX}{{{key.id}}}:open", {"1": 0})

    assert (await limiter.reserve(key, a_request("2", picousd=5 * CENT))).id == "2"
    assert await reserved(store, key) == 5 * CENT


async def test_lost_state_of_a_key_is_no_credit(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    reservation = await limiter.reserve(key, a_request("1", picousd=5 * CENT))
    await store.client.hdel(state_key(key.id), "reserved")
    await settle(store, reservation, picousd=0)

    assert await reserved(store, key) == 0


async def test_the_state_of_a_key_expires_but_not_before_its_reservations_and_debts(
    store: Store, limiter: RateLimiter
) -> None:
    key = a_key(usd_per_day=0.05, tokens_per_minute=10)
    reservation = await limiter.reserve(key, a_request("1", tokens=9, picousd=CENT))
    await limiter.reserve(key, ReservationRequest("short", tokens=1, picousd=CENT, ttl_s=1))
    names = [f"{PREFIX}{{{key.id}}}:{name}" for name in ("state", "held", "open")]
    kept = [await store.client.ttl(name) for name in names]
    await settle(store, reservation, tokens=1000, picousd=CENT)

    assert all(600 < seconds <= 660 for seconds in kept)
    assert await store.client.ttl(state_key(key.id)) > 99 * 60


async def test_a_call_repeated_after_a_broken_connection_reserves_once(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05, requests_per_minute=1)
    await limiter.reserve(key, a_request("1", picousd=5 * CENT))
    await limiter.reserve(key, a_request("1", picousd=5 * CENT))

    assert await reserved(store, key) == 5 * CENT


async def test_a_client_that_disconnects_during_reserve_leaves_no_reservation(
    store: Store, limiter: RateLimiter
) -> None:
    key = a_key(usd_per_day=1.0)
    for number in range(20):
        asking = asyncio.create_task(limiter.reserve(key, a_request(f"{number}", picousd=CENT)))
        for _ in range(number):
            await asyncio.sleep(0)
        asking.cancel()
        if not isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError):
            await settle(store, asking.result(), tokens=0, picousd=0)
    await limiter.reserve(a_key(requests_per_minute=1), a_request("asked after all of them"))
    await until(lambda: not limiter._orphans)

    assert await reserved(store, key) == 0


async def test_all_processes_together_overspend_only_by_what_answers_cost_beyond_their_reservation(
    store: Store, limiter: RateLimiter, second: RateLimiter
) -> None:
    """400 requests at once over two connections: each sets 1 cent aside, and costs up to 1.2."""
    key, chance = a_key(usd_per_day=1.0), random.Random(7)
    costs = [chance.randrange(CENT * 6 // 5) for _ in range(400)]
    connections = asyncio.Semaphore(8)

    async def one(number: int) -> int:
        try:
            reservation = await (limiter, second)[number % 2].reserve(key, a_request(str(number), picousd=CENT))
        except BudgetExceeded:
            return 0
        async with connections:
            await settle(store, reservation, picousd=costs[number])
        return costs[number]

    paid = await asyncio.gather(*map(one, range(400)))
    beyond = sum(max(0, cost - CENT) for cost in paid)
    counters = [key async for key in store.client.scan_iter(f"{PREFIX}{{{key.id}}}:day:*")]

    assert [await store.client.get(counter) for counter in counters] == [str(sum(paid))]
    assert sum(paid) <= PICO + beyond
    assert sum(map(bool, paid)) >= 90
    assert await reserved(store, key) == 0


async def test_at_full_speed_no_more_is_granted_than_a_full_bucket_and_its_refill(
    store: Store, limiter: RateLimiter, second: RateLimiter
) -> None:
    key = a_key(requests_per_minute=300)
    began: Any = await store.client.time()

    async def one(number: int) -> bool:
        try:
            return bool(await (limiter, second)[number % 2].reserve(key, a_request(str(number))))
        except RateLimited:
            return False

    count = sum(await asyncio.gather(*map(one, range(1000))))
    ended: Any = await store.client.time()
    seconds = ended[0] - began[0] + (ended[1] - began[1]) / 1e6

    assert 300 <= count <= 300 + 5 * seconds + 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.012, "12ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (360, "6m0s"), (3723.5, "1h2m3.5s")],
)
def test_durations_are_formatted_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_dollars_and_days_are_written_in_full() -> None:
    assert [format_usd(n) for n in (0, 5 * PICO, PICO * 5 // 4, 250, 1_500_000)] == ["$0", "$5", "$1.25", *DUST]
    assert next_start("day", 1_798_761_599) == "2027-01-01T00:00:00Z"
    assert next_start("month", 1_798_761_599) == "2027-01-01T00:00:00Z"
    assert next_start("month", 1_767_225_600) == "2026-02-01T00:00:00Z"


DUST = ("$0.00000000025", "$0.000001")
