"""Calls of many requests for the limits of their keys, which share a round trip."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import BudgetExceeded, RateLimited, ServiceUnavailable
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import RateLimiter
from proxy.server.reservations import Reservation, state_key
from proxy.storage.command_batcher import MAX_BATCH_SIZE
from proxy.storage.redis import Store, encode_command, pipeline
from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import CENT, a_key, a_request, reserved, until_asked_again
from tests.support.valkey import frozen
from tests.support.waiting import until


@pytest.fixture
async def limiter(store: Store) -> AsyncIterator[RateLimiter]:
    opened = RateLimiter(store, Metrics(), timeout_s=2.0)
    yield opened
    await opened.close()


async def calls(store: Store) -> int:
    """Return how many scripts the server has run."""
    stats: Any = await store.client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


async def kill_connections(store: Store) -> None:
    """Close all connections but this store's own."""
    await pipeline(store.client, [encode_command(("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))])


async def test_each_key_of_a_batch_gets_its_own_verdict(limiter: RateLimiter) -> None:
    keys = [a_key(requests_per_minute=number) for number in range(1, MAX_BATCH_SIZE)]
    poor = a_key(usd_per_day=0.01)
    asked = [limiter.reserve(key, a_request("1")) for key in keys]
    asked.insert(7, limiter.reserve(poor, a_request("1", picousd=2 * CENT)))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = answers.pop(7)

    assert isinstance(refused, BudgetExceeded)
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers if isinstance(answer, Reservation)]
    assert left == [str(number - 1) for number in range(1, MAX_BATCH_SIZE)]


async def test_a_key_gets_no_more_within_a_batch_than_it_has(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    asked = [limiter.reserve(key, a_request(str(number), picousd=CENT)) for number in range(3 * MAX_BATCH_SIZE)]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert [isinstance(answer, Reservation) for answer in answers] == [True] * 5 + [False] * (len(answers) - 5)
    assert await reserved(store, key) == 5 * CENT


async def test_what_a_request_took_counts_for_the_next_of_the_same_batch(limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=0.05)
    first = await limiter.reserve(key, a_request("1", picousd=4 * CENT))
    first.settle(None, CENT)
    assert (await limiter.reserve(key, a_request("2", picousd=4 * CENT))).id == "2"
    with pytest.raises(BudgetExceeded):
        await limiter.reserve(key, a_request("3", picousd=1))


async def test_a_client_that_leaves_takes_no_other_answer_of_its_batch_along(
    store: Store, limiter: RateLimiter
) -> None:
    key = a_key(usd_per_day=1.0)
    asking = [asyncio.create_task(limiter.reserve(key, a_request(str(n), picousd=CENT))) for n in range(10)]
    await asyncio.sleep(0)
    asking[4].cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    await until(lambda: not limiter._orphans)

    assert [place for place, answer in enumerate(answers) if not isinstance(answer, Reservation)] == [4]
    assert await reserved(store, key) == 9 * CENT


async def test_killed_connections_and_forgotten_scripts_lose_no_call_and_repeat_none(
    store: Store, second_store: Store, limiter: RateLimiter
) -> None:
    key = a_key(usd_per_day=100.0, tokens_per_minute=10**6)

    async def one(number: int) -> None:
        reservation = await limiter.reserve(key, a_request(str(number), tokens=10, picousd=CENT))
        settlement = reservation.settle(1, CENT)
        assert settlement is not None
        await settlement

    for start in range(0, 400, 40):
        asking = [asyncio.create_task(one(number)) for number in range(start, start + 40)]
        await asyncio.sleep(0)
        await second_store.client.script_flush()
        await kill_connections(second_store)
        await asyncio.gather(*asking)
    state: Any = await store.client.hgetall(state_key(key.id))

    assert (state["reserved"], state["ended"]) == ("0", str(400 * CENT))
    assert float(state["tokens"]) <= 400


async def test_redis_that_goes_away_amid_batches_leaves_no_reservation(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.ensure()
    store = Store(f"unix://{server.socket_path}")
    limiter = RateLimiter(store, Metrics())
    key = a_key(usd_per_day=100.0)
    info: Any = await store.client.info("server")
    kept = await limiter.reserve(key, a_request("kept", picousd=CENT))
    with frozen(int(info["process_id"])):
        asked = [limiter.reserve(key, a_request(str(n), picousd=CENT)) for n in range(3 * MAX_BATCH_SIZE)]
        refused = await asyncio.gather(*asked, return_exceptions=True)
    await until_asked_again(limiter)
    await until(lambda: not limiter._orphans)

    assert {type(answer) for answer in refused} == {ServiceUnavailable}
    assert await reserved(store, key) == CENT
    assert kept.settle(None, 0) is not None
    await limiter.close()
    await store.close()
    server.stop()


async def test_a_redis_that_is_gone_fails_a_whole_batch_and_rates_hold_in_this_process() -> None:
    store = Store("redis://127.0.0.1:1/0")
    limiter = RateLimiter(store, Metrics(), clock=lambda: 1000.0)
    key = a_key(requests_per_minute=3)
    answers = await asyncio.gather(
        *(limiter.reserve(key, a_request(str(number))) for number in range(2 * MAX_BATCH_SIZE)), return_exceptions=True
    )
    assert [type(answer) for answer in answers].count(Reservation) == 3
    assert {type(answer) for answer in answers} == {Reservation, RateLimited}
    await limiter.close()
    await store.close()


async def test_an_idle_limiter_whose_connection_was_closed_opens_another(
    second_store: Store, limiter: RateLimiter
) -> None:
    key = a_key(requests_per_minute=10)
    await limiter.reserve(key, a_request("1"))
    await kill_connections(second_store)
    again = await limiter.reserve(key, a_request("2"))

    assert again.headers["x-ratelimit-remaining-requests"] == "8"


async def test_a_closed_limiter_calls_nothing(store: Store, limiter: RateLimiter) -> None:
    key = a_key(usd_per_day=1.0)
    reservation = await limiter.reserve(key, a_request("1", picousd=CENT))
    await limiter.close()
    before = await calls(store)

    assert reservation.settle(None, CENT) is None
    assert await calls(store) == before
