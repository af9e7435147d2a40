from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from proxy.storage.redis import Store
from proxy.storage.sessions import (
    MAX_LOCAL,
    MAX_QUEUED,
    PREFIX,
    LastTurn,
    Lookup,
    SessionStore,
    scoped_key,
)
from proxy.storage.valkey import EmbeddedValkey
from tests.support.waiting import until

NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer for Redis than a request may, which is not long enough on a busy machine."""
    monkeypatch.setattr("proxy.storage.sessions.LOOKUP_TIMEOUT_S", 5.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def ours(store: Store, clock: Clock) -> SessionStore:
    """Open one process's memory, which the test flushes."""
    return SessionStore(store, 60, clock=clock)


@pytest.fixture
async def theirs(second_store: Store, clock: Clock) -> SessionStore:
    return SessionStore(second_store, 60, clock=clock)


async def lookups(store: Store) -> int:
    """Count the look-ups that Redis has seen."""
    stats: Any = await store.client.info("commandstats")
    return int(stats.get("cmdstat_mget", {}).get("calls", 0))


async def put(store: Store, digest: str, value: Any) -> None:
    await store.client.set(f"{PREFIX}:{digest}", value if isinstance(value, str) else json.dumps(value))


async def test_one_process_looks_up_what_another_recorded(ours: SessionStore, theirs: SessionStore) -> None:
    ours.record(["call-1", "call-2"], "small")
    await ours.flush()
    assert await theirs.lookup(["unknown", "call-2"], None) == Lookup("small")


async def test_a_producer_known_to_this_process_costs_no_round_trip(ours: SessionStore, store: Store) -> None:
    ours.record(["call-1"], "small")
    before = await lookups(store)
    assert await ours.lookup(["call-1"], "session") == Lookup("small")
    assert await lookups(store) == before


async def test_a_request_without_history_and_session_costs_no_round_trip(ours: SessionStore, store: Store) -> None:
    before = await lookups(store)
    assert await ours.lookup([], None) == Lookup()
    assert await lookups(store) == before


async def test_a_producer_found_in_redis_is_not_looked_up_again(
    ours: SessionStore, theirs: SessionStore, store: Store
) -> None:
    ours.record(["call-1"], "small")
    await ours.flush()
    before = await lookups(store)
    assert [await theirs.lookup(["call-1"], None) for _ in range(3)] == [Lookup("small")] * 3
    assert await lookups(store) == before + 1


async def test_all_fingerprints_and_the_session_cost_one_round_trip(ours: SessionStore, store: Store) -> None:
    before = await lookups(store)
    assert await ours.lookup(["a", "b", "c"], "session") == Lookup()
    assert await lookups(store) == before + 1


async def test_the_last_turn_of_a_session_is_the_newest_of_any_process(
    ours: SessionStore, theirs: SessionStore, clock: Clock
) -> None:
    ours.record(["session"], "small", 100)
    clock.now += 1
    assert await ours.lookup([], "session") == Lookup(last=LastTurn("small", 100, 1.0))
    await ours.flush()
    theirs.record(["session"], "large", 200)
    await theirs.flush()
    clock.now += 2
    assert await ours.lookup([], "session") == Lookup(last=LastTurn("large", 200, 2.0))

    ours.record(["session"], "small", None)  # not written yet
    assert await ours.lookup([], "session") == Lookup(last=LastTurn("small", None, 0.0))


async def test_records_expire_in_the_process_and_in_redis(
    ours: SessionStore, theirs: SessionStore, store: Store, clock: Clock
) -> None:
    ours.record(["call-1", "session"], "small", 5)
    await ours.flush()
    assert 0 < await store.client.ttl(f"{PREFIX}:call-1") <= 60
    clock.now += 61
    assert await ours.lookup(["call-1"], "session") == Lookup()
    assert await theirs.lookup(["call-1"], "session") == Lookup()


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "nonsense",
        "[]",
        '{"model": 7, "tokens": 1, "at": 1800000000}',
        '{"model": "no such\\nname", "tokens": 1, "at": 1800000000}',
        '{"model": "auto", "tokens": 1, "at": 1800000000}',
        '{"model": "small", "tokens": 1}',
        '{"model": "small", "tokens": 1, "at": NaN}',
        '{"model": "small", "tokens": 1, "at": true}',
        '{"model": "small", "tokens": 1, "at": 1e400}',
        '{"model": "small", "tokens": 1, "at": 1900000000}',
        '{"model": "small", "tokens": 1, "at": 1}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:50],
)
async def test_garbage_in_redis_is_ignored(ours: SessionStore, store: Store, garbage: str) -> None:
    await put(store, "session", garbage)
    assert await ours.lookup([], "session") == Lookup()


@pytest.mark.parametrize("tokens", [None, -1, "many", True])
async def test_a_broken_count_of_tokens_is_unknown(ours: SessionStore, store: Store, tokens: Any) -> None:
    await put(store, "session", {"model": "small", "tokens": tokens, "at": NOW})
    assert await ours.lookup([], "session") == Lookup(last=LastTurn("small", None, 0.0))


async def test_a_redis_key_of_another_type_is_ignored_and_overwritten(
    ours: SessionStore, theirs: SessionStore, store: Store
) -> None:
    await store.client.rpush(f"{PREFIX}:session", "x")
    await put(store, "call-1", {"model": "small", "tokens": None, "at": NOW})
    assert await ours.lookup(["call-1"], "session") == Lookup("small")
    assert await ours.lookup([], "session") == Lookup()
    ours.record(["session"], "small")
    await ours.flush()
    assert (await theirs.lookup([], "session")).last == LastTurn("small", None, 0.0)


async def test_an_emptied_redis_leaves_the_memory_of_this_process(
    ours: SessionStore, theirs: SessionStore, store: Store
) -> None:
    ours.record(["call-1", "session"], "small", 5)
    await ours.flush()
    await store.client.flushall()
    assert await theirs.lookup(["call-1"], "session") == Lookup()
    assert (await ours.lookup([], "session")).last == LastTurn("small", 5, 0.0)


async def test_an_older_copy_of_redis_does_not_reset_a_session(ours: SessionStore, store: Store, clock: Clock) -> None:
    await put(store, "session", {"model": "old", "tokens": 1, "at": NOW})
    clock.now += 10
    ours.record(["session"], "new", 2)
    assert (await ours.lookup([], "session")).last == LastTurn("new", 2, 0.0)


@contextmanager
def frozen(server: EmbeddedValkey) -> Iterator[None]:
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


async def test_no_request_waits_for_a_redis_that_was_silent_a_moment_ago(
    valkey: EmbeddedValkey, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.storage.sessions.LOOKUP_TIMEOUT_S", 0.04)
    missed: list[None] = []
    memory = SessionStore(store, 60, on_missed=lambda: missed.append(None))
    memory.record(["session"], "small", 5)
    assert (await memory.lookup([], "session")).last is not None
    with frozen(valkey):
        found = [await memory.lookup(["call"], "session") for _ in range(50)]
        # from this process's own memory, without asking again
        assert [turn.last.model for turn in found if turn.last] == ["small"] * 50
        many = await asyncio.gather(*(memory.lookup([], f"other-{number}") for number in range(50)))
        assert many == [Lookup()] * 50
        assert len(missed) <= 2  # a busy machine may have missed the first one too
    await put(store, "call", {"model": "large", "tokens": None, "at": time.time()})
    for _ in range(600):
        if (found_again := await memory.lookup(["call"], None)) == Lookup("large"):
            break
        await asyncio.sleep(0.1)
    assert found_again == Lookup("large")
    await memory.stop()


async def test_what_is_recalled_at_once_goes_to_redis_in_one_write(store: Store) -> None:
    memory = SessionStore(store, 60)
    for number in range(40):
        await put(store, f"s{number}", {"model": f"m{number}", "tokens": None, "at": time.time()})
    found = await asyncio.gather(*(memory.lookup([], f"s{number}") for number in range(40)))
    assert [each.last.model for each in found if each.last] == [f"m{number}" for number in range(40)]
    await memory.stop()


async def test_while_redis_is_away_the_write_queue_is_bounded() -> None:
    dropped: list[None] = []
    away = Store("unix:///nowhere/valkey.sock")
    memory = SessionStore(away, 60, on_dropped=lambda: dropped.append(None))
    memory.start()
    memory.record([f"call-{number}" for number in range(MAX_QUEUED + 3)], "small")
    assert len(dropped) == 3
    assert (len(memory._queue), len(memory._local)) == (MAX_QUEUED, MAX_LOCAL)
    assert await memory.lookup([f"call-{MAX_QUEUED}"], None) == Lookup("small")
    assert await memory.lookup(["call-1"], None) == Lookup()
    await memory.stop()
    await away.close()


async def test_records_are_written_in_the_background(ours: SessionStore, theirs: SessionStore) -> None:
    ours.start()
    for number in range(3):
        ours.record([f"call-{number}"], "small")
        await until(lambda: not ours._queue)
        assert await theirs.lookup([f"call-{number}"], None) == Lookup("small")
    ours.record(["last"], "small")
    await ours.stop()
    assert await theirs.lookup(["last"], None) == Lookup("small")


def test_each_client_key_has_digests_of_its_own() -> None:
    digests = {scoped_key(key, mark) for key in ("", "k1", "k2") for mark in ("session:a", "call:a")}
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {64}
    assert scoped_key("", "\ud800")
