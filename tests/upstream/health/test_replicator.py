from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.settings.schema import CircuitBreakerSettings
from proxy.storage.redis import Store
from proxy.upstream.health import CHANNEL, UNKNOWN_REASON, CooldownReplicator, HealthRegistry, health_key
from tests.support.waiting import until
from tests.upstream.health.makers import a_replicator, fail


@asynccontextmanager
async def two_processes(store: Store, second_store: Store) -> AsyncIterator[tuple[HealthRegistry, HealthRegistry]]:
    async with a_replicator(store) as here, a_replicator(second_store) as there:
        yield here, there


def state(health: HealthRegistry, model: str = "small") -> Any:
    return health.status(model)["state"]


async def listening(store: Store, processes: int) -> None:
    async def subscribers() -> int:
        return int((await store.client.pubsub_numsub(CHANNEL))[0][1])

    seen = [0]
    while seen[-1] < processes:
        seen.append(await subscribers())
        assert len(seen) < 10_000


async def test_a_circuit_opened_here_is_open_in_other_processes_for_the_same_time_and_reason(
    store: Store, second_store: Store
) -> None:
    async with two_processes(store, second_store) as (here, there):
        await listening(store, 2)
        fail(here, times=1, status=429, headers={"retry-after": "60"})
        await until(lambda: state(there) == "resting")
        assert there.status("small")["why"] == here.status("small")["why"]
        assert there.cooling_down()["small"] == pytest.approx(here.cooling_down()["small"], abs=2)
        assert 55_000 < await store.client.pttl(health_key("small")) <= 60_000
        assert (there.local_cooldown("small"), state(there, "large")) == (None, "well")


async def test_a_process_that_starts_learns_what_is_known(store: Store, second_store: Store) -> None:
    async with a_replicator(store) as here:
        fail(here)
        await until_stored(store)
        async with a_replicator(second_store) as later:
            await until(lambda: state(later) == "resting")


async def until_stored(store: Store, model: str = "small") -> None:
    for _ in range(10_000):
        if await store.client.exists(health_key(model)):
            return
    raise AssertionError("it was never told")


async def test_a_recovery_is_published_and_its_key_is_deleted(store: Store, second_store: Store) -> None:
    async with two_processes(store, second_store) as (here, there):
        await listening(store, 2)
        here.open("small", 30, "found")
        await until(lambda: state(there) == "resting")
        here.reset("small")
        await until(lambda: state(there) == "well")
        assert await store.client.exists(health_key("small")) == 0


async def test_a_peers_cooldown_ends_with_a_probe_here(store: Store, second_store: Store) -> None:
    async with two_processes(store, second_store) as (here, there):
        await listening(store, 2)
        here.open("small", 0.4, "found")
        await until(lambda: state(there) == "resting")
        await until(lambda: state(there) == "probing")
        assert there.start_attempt("small").is_probe


async def test_a_probe_in_one_process_closes_the_circuits_that_were_adopted_and_not_the_one_that_was_found(
    store: Store, second_store: Store
) -> None:
    async with two_processes(store, second_store) as (here, there), a_replicator(store) as third:
        await listening(store, 3)
        here.open("small", 0.4, "found")
        await until(lambda: state(there) == state(third) == "resting")
        await until(lambda: state(there) == state(third) == "probing")
        there.start_attempt("small").succeeded()
        await until(lambda: state(third) == "well")
        assert state(here) == "probing"


async def test_what_another_found_too_is_not_ended_by_one_recovery(store: Store, second_store: Store) -> None:
    async with two_processes(store, second_store) as (here, there):
        await listening(store, 2)
        here.open("small", 30, "found")
        await until(lambda: state(there) == "resting")
        there.open("small", 40, "found there too")
        here.reset("small")
        here.open("large", 30, "said after it")
        await until(lambda: state(there, "large") == "resting")
        assert state(there) == "resting"


async def test_a_quick_end_is_not_undone_by_what_was_told_before(store: Store, second_store: Store) -> None:
    async with two_processes(store, second_store) as (here, there):
        await listening(store, 2)
        for _ in range(50):
            here.open("small", 30, "found")
            here.reset("small")
        here.open("large", 30, "said after it")
        await until(lambda: state(there, "large") == "resting")
        await until(lambda: state(there) == "well")
        assert state(here) == "well"


async def test_a_key_that_waits_to_be_deleted_is_not_adopted_again(store: Store) -> None:
    health = HealthRegistry(CircuitBreakerSettings())
    sharing = CooldownReplicator(store, health, lambda: ("small",))
    await store.client.set(health_key("small"), "told before it ended", px=9000)
    health.open("small", 9, "found")
    health.reset("small")
    await sharing._read(("small",), announced=False)
    assert state(health) == "well"
    sharing.start()
    await until(lambda: sharing._pending == {})
    await sharing._read(("small",), announced=False)
    await sharing.stop()
    assert state(health) == "well"


async def test_reading_again_after_the_cooldown_does_not_replace_the_probe(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.upstream.health.REREAD_INTERVAL_S", 0.0)
    monkeypatch.setattr("proxy.upstream.health.LISTEN_TIMEOUT_S", 0.01)
    async with a_replicator(store) as health:
        await store.client.set(health_key("small"), "over soon", px=300)
        await until(lambda: state(health) == "resting")
        await until(lambda: state(health) != "resting")
        await store.client.set(health_key("large"), "read after it", px=9000)
        await until(lambda: state(health, "large") == "resting")
        assert state(health) == "probing"


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("bad \x00\x1b[31m\u2028why", "bad [31mwhy"),
        ("w" * 10_000, "w" * 200),
        ("", UNKNOWN_REASON),
        (["a list"], UNKNOWN_REASON),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
async def test_garbage_in_a_key_is_at_worst_a_cooldown_with_a_printable_reason(
    store: Store, written: str | bytes | list[str], why: str
) -> None:
    if isinstance(written, list):
        await store.client.rpush(health_key("small"), *written)
    else:
        await store.client.set(health_key("small"), written)
    await store.client.pexpire(health_key("small"), 20_000)
    async with a_replicator(store) as health:
        await until(lambda: state(health) == "resting")
        assert health.status("small")["why"] == why


@pytest.mark.parametrize("left_ms", [None, 10**12, 301_000])
async def test_a_key_that_does_not_expire_in_time_is_ignored_with_one_warning(
    store: Store, left_ms: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.upstream.health.REREAD_INTERVAL_S", 0.0)
    monkeypatch.setattr("proxy.upstream.health.LISTEN_TIMEOUT_S", 0.01)
    await store.client.set(health_key("small"), "for ever", px=left_ms)
    with caplog.at_level(logging.WARNING):
        async with a_replicator(store) as health:
            await store.client.set(health_key("large"), "for a while", px=9000)
            await until(lambda: state(health, "large") == "resting")
            await store.client.publish(CHANNEL, "small")
            await store.client.delete(health_key("large"))
            await until(lambda: state(health, "large") == "well")
            assert state(health) == "well"
    assert caplog.text.count("uniroute:health:small is ignored") == 1


async def test_names_of_no_model_on_the_channel_take_no_memory(store: Store) -> None:
    async with a_replicator(store) as health:
        await listening(store, 1)
        for number in range(50):
            await store.client.set(health_key(f"stranger-{number}"), "x", px=9000)
            await store.client.publish(CHANNEL, f"stranger-{number}")
        await store.client.set(health_key("small"), "known", px=9000)
        await store.client.publish(CHANNEL, "small")
        await until(lambda: state(health) == "resting")
        assert list(health.open_counts()) == ["small"]


async def test_an_emptied_store_ends_what_was_adopted_and_not_what_was_found(
    store: Store, second_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.upstream.health.REREAD_INTERVAL_S", 0.0)
    monkeypatch.setattr("proxy.upstream.health.LISTEN_TIMEOUT_S", 0.01)
    async with two_processes(store, second_store) as (here, there):
        here.open("small", 30, "found")
        await until(lambda: state(there) == "resting")
        await store.client.flushall()
        await until(lambda: state(there) == "well")
        assert state(here) == "resting"
        here.open("large", 30, "found later")
        await until(lambda: state(there, "large") == "resting")


async def test_a_lost_message_is_made_up_for_by_reading_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.health.REREAD_INTERVAL_S", 0.0)
    monkeypatch.setattr("proxy.upstream.health.LISTEN_TIMEOUT_S", 0.01)
    async with a_replicator(store) as health:
        await listening(store, 1)
        await store.client.set(health_key("small"), "nobody published it", px=9000)
        await until(lambda: state(health) == "resting")


async def test_what_waits_to_be_published_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.health.MAX_QUEUED", 10)
    nowhere = Store("redis://127.0.0.1:1")
    names = [f"model-{number}" for number in range(100)]
    health = HealthRegistry(CircuitBreakerSettings())
    async with a_replicator(nowhere, health, names) as health:
        for name in names:
            fail(health, name)
        assert len(health.cooling_down()) == 100
        (sharing,) = [listener.__self__ for listener in health._listeners if hasattr(listener, "__self__")]
        assert list(sharing._pending) == names[-10:]
    await nowhere.close()
