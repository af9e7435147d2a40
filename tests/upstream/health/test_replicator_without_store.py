from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.storage.redis import Store
from proxy.storage.valkey import EmbeddedValkey
from proxy.upstream.health import health_key
from tests.support.waiting import until
from tests.upstream.health.makers import a_replicator, fail


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    """Start a server of the test's own, to stop and to freeze."""
    started = EmbeddedValkey(tmp_path)
    await asyncio.to_thread(started.ensure)
    yield started
    await asyncio.to_thread(started.stop)


@pytest.fixture
async def stores(server: EmbeddedValkey) -> AsyncIterator[tuple[Store, Store]]:
    opened = (Store(f"unix://{server.socket_path}"), Store(f"unix://{server.socket_path}"))
    yield opened
    for store in opened:
        await store.close()


async def test_without_redis_each_process_goes_by_itself_and_publishes_when_it_is_back(
    server: EmbeddedValkey, stores: tuple[Store, Store]
) -> None:
    async with a_replicator(stores[0]) as here, a_replicator(stores[1]) as there:
        here.open("large", 60, "told before")
        await until(lambda: there.cooling_down())
        await asyncio.to_thread(server.stop)
        fail(here, times=1, status=429, headers={"retry-after": "60"})
        here.reset("large")
        assert set(here.cooling_down()) == {"small"}
        assert set(there.cooling_down()) == {"large"}
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.ensure)
        await until(lambda: set(there.cooling_down()) == {"small"})


async def test_a_frozen_redis_holds_up_nobody_and_hears_it_once_it_thaws(
    server: EmbeddedValkey, stores: tuple[Store, Store]
) -> None:
    pid = int((await stores[0].client.info("server"))["process_id"])
    async with a_replicator(stores[0]) as here, a_replicator(stores[1]) as there:
        here.open("large", 60, "told before")
        await until(lambda: there.cooling_down())
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(1000):
                fail(here, "small", times=5)
                here.cooling_down()
                here.status("small")
                await asyncio.sleep(0)
            assert set(here.cooling_down()) == {"small", "large"}
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: set(there.cooling_down()) == {"small", "large"})


async def test_a_process_ends_while_redis_is_frozen(server: EmbeddedValkey, stores: tuple[Store, Store]) -> None:
    pid = int((await stores[0].client.info("server"))["process_id"])
    try:
        async with asyncio.timeout(60), a_replicator(stores[0]) as here:
            os.kill(pid, signal.SIGSTOP)
            fail(here)
            await asyncio.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_cooldown_that_is_over_when_redis_is_back_is_not_published(
    server: EmbeddedValkey, stores: tuple[Store, Store]
) -> None:
    await asyncio.to_thread(server.stop)
    async with a_replicator(stores[0]) as here, a_replicator(stores[1]) as there:
        here.open("small", 0.05, "over soon")
        await until(lambda: here.status("small")["state"] == "probing")
        here.open("large", 60, "still on")
        await asyncio.to_thread(server.ensure)
        await until(lambda: there.cooling_down())
        assert set(there.cooling_down()) == {"large"}
        assert await stores[1].client.exists(health_key("small")) == 0


async def test_a_full_redis_is_said_and_breaks_nothing(
    server: EmbeddedValkey, stores: tuple[Store, Store], caplog: pytest.LogCaptureFixture
) -> None:
    async with a_replicator(stores[0]) as here, a_replicator(stores[1]) as there:
        await stores[0].client.config_set("maxmemory", "1")
        fail(here)
        await until(lambda: "the health of models is not shared: " in caplog.text)
        assert set(here.cooling_down()) == {"small"}
        await stores[0].client.config_set("maxmemory", "0")
        here.open("large", 60, "there is room again")
        await until(lambda: set(there.cooling_down()) == {"large"})
