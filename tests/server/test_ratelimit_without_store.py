from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import RateLimited, ServiceUnavailable
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import RateLimiter
from proxy.server.reservations import state_key
from proxy.server.responses import render_error
from proxy.storage.redis import Store
from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import CENT, a_key, a_request, reserved, settle, until_asked_again
from tests.support.valkey import frozen
from tests.support.waiting import until


def unchecked(metrics: Metrics, outcome: str) -> float:
    return metrics.registry.get_sample_value("uniroute_limits_unchecked_total", {"outcome": outcome}) or 0


@pytest.fixture
async def away() -> AsyncIterator[Store]:
    opened = Store("redis://127.0.0.1:1/0")
    yield opened
    await opened.close()


async def test_without_redis_keys_with_a_spend_limit_are_refused(away: Store) -> None:
    metrics = Metrics()
    limiter = RateLimiter(away, metrics)
    for number in range(3):
        with pytest.raises(ServiceUnavailable) as refused:
            await limiter.reserve(
                a_key(usd_per_month=5.0, requests_per_minute=10), a_request(str(number), picousd=CENT)
            )
        status, body, headers = render_error(refused.value)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
        assert "budget of this key cannot be checked" in body["error"]["message"]

    assert unchecked(metrics, "refused") == 3
    await limiter.close()


async def test_without_redis_rates_hold_in_this_process(away: Store) -> None:
    metrics = Metrics()
    limiter = RateLimiter(away, metrics, clock=lambda: 1000.0)
    key = a_key(requests_per_minute=3, tokens_per_minute=1000)
    first = await limiter.reserve(key, a_request("1", tokens=900))
    with pytest.raises(RateLimited, match="tokens per minute"):
        await limiter.reserve(key, a_request("2", tokens=200))
    first.settle(100, None)
    second = await limiter.reserve(key, a_request("3", tokens=200))
    await limiter.reserve(key, a_request("4", tokens=200))
    with pytest.raises(RateLimited, match="requests per minute"):
        await limiter.reserve(key, a_request("5", tokens=1))

    assert second.headers["x-ratelimit-remaining-tokens"] == "700"
    assert second.headers["x-ratelimit-remaining-requests"] == "1"
    assert unchecked(metrics, "local") == 5
    await limiter.close()


async def test_a_setting_serves_keys_with_a_spend_limit_and_their_rates_still_hold(
    away: Store, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    limiter = RateLimiter(away, metrics, open_without_store=True)
    key = a_key(usd_per_day=0.01, requests_per_minute=2)
    for number in range(2):
        assert (await limiter.reserve(key, a_request(str(number), picousd=5 * CENT))).key_id == key.id
    with pytest.raises(RateLimited):
        await limiter.reserve(key, a_request("3", picousd=5 * CENT))

    assert unchecked(metrics, "open") == 3
    assert [record.message.count("served unchecked") for record in caplog.records] == [1]
    await limiter.close()


def without_waiting(work: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine to its end, which must not give the event loop a turn."""
    with pytest.raises(StopIteration):
        work.send(None)


async def test_only_the_first_request_waits_for_a_frozen_redis_and_limits_resume_when_it_wakes(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.ensure()
    store = Store(f"unix://{server.socket_path}")
    limiter = RateLimiter(store, Metrics())
    key, rated = a_key(usd_per_day=0.05), a_key(requests_per_minute=1000)
    info: Any = await store.client.info("server")
    before = await limiter.reserve(key, a_request("before", picousd=CENT))
    with frozen(int(info["process_id"])):
        with pytest.raises(ServiceUnavailable):
            await limiter.reserve(key, a_request("first", picousd=CENT))
        assert before.settle(None, CENT) is None  # an answer ends without waiting, and its record settles it
        for number in range(200):
            without_waiting(limiter.reserve(rated, a_request(str(number))))
            with pytest.raises(ServiceUnavailable):
                await limiter.reserve(key, a_request(f"later-{number}", picousd=CENT))
    await until_asked_again(limiter)
    await until(lambda: not limiter._orphans)

    assert (await limiter.reserve(key, a_request("after", picousd=CENT))).id == "after"
    assert await reserved(store, key) == 2 * CENT
    await limiter.close()
    await store.close()
    server.stop()


async def test_an_emptied_redis_starts_again_without_debts(store: Store) -> None:
    limiter = RateLimiter(store, Metrics(), timeout_s=1.0)
    key = a_key(usd_per_day=0.05, tokens_per_minute=100)
    reservation = await limiter.reserve(key, a_request("1", tokens=100, picousd=5 * CENT))
    await store.client.flushall()
    await store.client.script_flush()
    await limiter.reserve(key, a_request("2", tokens=50, picousd=5 * CENT))
    await settle(store, reservation, tokens=0, picousd=0)

    assert await reserved(store, key) == 5 * CENT
    await limiter.close()


async def test_an_unreadable_entry_of_one_key_affects_no_other_key(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = RateLimiter(store, Metrics(), timeout_s=1.0)
    spoilt, good = a_key(usd_per_day=1.0), a_key(usd_per_day=1.0)
    await store.client.set(state_key(spoilt.id), "not a hash")
    for number in range(3):
        with pytest.raises(ServiceUnavailable):
            await limiter.reserve(spoilt, a_request(f"s{number}", picousd=CENT))
        assert (await limiter.reserve(good, a_request(f"g{number}", picousd=CENT))).id == f"g{number}"

    assert [spoilt.id in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]
    await limiter.close()
