"""The memory of conversations, over a real Valkey: shared, expiring, and never in the way."""

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
    RETRY_INTERVAL_S,
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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def ours(store: Store, clock: Clock) -> SessionStore:
    """One process's memory, which the test flushes."""
    return SessionStore(store, 60, clock=clock)


@pytest.fixture
async def theirs(second_store: Store, clock: Clock) -> SessionStore:
    return SessionStore(second_store, 60, clock=clock)


async def asked(store: Store) -> int:
    """How many look-ups Redis has seen."""
    stats: Any = await store.client.info("commandstats")
    return int(stats.get("cmdstat_mget", {}).get("calls", 0))


async def put(store: Store, digest: str, value: Any) -> None:
    await store.client.set(f"{PREFIX}:{digest}", value if isinstance(value, str) else json.dumps(value))


async def test_what_one_process_remembers_another_recalls(ours: SessionStore, theirs: SessionStore) -> None:
    ours.remember(["call-1", "call-2"], "small")
    await ours.flush()
    assert await theirs.recall(["unknown", "call-2"], None) == Lookup("small")


async def test_a_producer_that_is_known_here_costs_no_round_trip(ours: SessionStore, store: Store) -> None:
    ours.remember(["call-1"], "small")
    before = await asked(store)
    assert await ours.recall(["call-1"], "session") == Lookup("small")
    assert await asked(store) == before


async def test_a_request_without_past_and_session_costs_no_round_trip(ours: SessionStore, store: Store) -> None:
    before = await asked(store)
    assert await ours.recall([], None) == Lookup()
    assert await asked(store) == before


async def test_what_redis_told_once_is_not_asked_again(ours: SessionStore, theirs: SessionStore, store: Store) -> None:
    ours.remember(["call-1"], "small")
    await ours.flush()
    before = await asked(store)
    assert [await theirs.recall(["call-1"], None) for _ in range(3)] == [Lookup("small")] * 3
    assert await asked(store) == before + 1


async def test_all_marks_and_the_session_are_asked_in_one_round_trip(ours: SessionStore, store: Store) -> None:
    before = await asked(store)
    assert await ours.recall(["a", "b", "c"], "session") == Lookup()
    assert await asked(store) == before + 1


async def test_the_last_turn_of_a_session_is_the_newest_wherever_it_was(
    ours: SessionStore, theirs: SessionStore, clock: Clock
) -> None:
    ours.remember(["session"], "small", 100)
    clock.now += 1
    assert await ours.recall([], "session") == Lookup(last=LastTurn("small", 100, 1.0))
    await ours.flush()
    theirs.remember(["session"], "large", 200)
    await theirs.flush()
    clock.now += 2
    assert await ours.recall([], "session") == Lookup(last=LastTurn("large", 200, 2.0))

    ours.remember(["session"], "small", None)  # not written yet
    assert await ours.recall([], "session") == Lookup(last=LastTurn("small", None, 0.0))


async def test_it_expires_here_and_in_redis(
    ours: SessionStore, theirs: SessionStore, store: Store, clock: Clock
) -> None:
    ours.remember(["call-1", "session"], "small", 5)
    await ours.flush()
    assert 0 < await store.client.ttl(f"{PREFIX}:call-1") <= 60
    clock.now += 61
    assert await ours.recall(["call-1"], "session") == Lookup()
    assert await theirs.recall(["call-1"], "session") == Lookup()


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
async def test_garbage_in_redis_is_no_memory(ours: SessionStore, store: Store, garbage: str) -> None:
    await put(store, "session", garbage)
    assert await ours.recall([], "session") == Lookup()


@pytest.mark.parametrize("tokens", [None, -1, "many", True])
async def test_a_broken_count_of_tokens_is_unknown(ours: SessionStore, store: Store, tokens: Any) -> None:
    await put(store, "session", {"model": "small", "tokens": tokens, "at": NOW})
    assert await ours.recall([], "session") == Lookup(last=LastTurn("small", None, 0.0))


async def test_another_type_under_its_key_is_no_memory_and_is_written_over(
    ours: SessionStore, theirs: SessionStore, store: Store
) -> None:
    await store.client.rpush(f"{PREFIX}:session", "x")
    await put(store, "call-1", {"model": "small", "tokens": None, "at": NOW})
    assert await ours.recall(["call-1"], "session") == Lookup("small")
    assert await ours.recall([], "session") == Lookup()
    ours.remember(["session"], "small")
    await ours.flush()
    assert (await theirs.recall([], "session")).last == LastTurn("small", None, 0.0)


async def test_an_emptied_redis_leaves_what_this_process_knows(
    ours: SessionStore, theirs: SessionStore, store: Store
) -> None:
    ours.remember(["call-1", "session"], "small", 5)
    await ours.flush()
    await store.client.flushall()
    assert await theirs.recall(["call-1"], "session") == Lookup()
    assert (await ours.recall([], "session")).last == LastTurn("small", 5, 0.0)


async def test_an_older_copy_of_redis_does_not_turn_a_session_back(
    ours: SessionStore, store: Store, clock: Clock
) -> None:
    await put(store, "session", {"model": "old", "tokens": 1, "at": NOW})
    clock.now += 10
    ours.remember(["session"], "new", 2)
    assert (await ours.recall([], "session")).last == LastTurn("new", 2, 0.0)


@contextmanager
def frozen(server: EmbeddedValkey) -> Iterator[None]:
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


async def test_a_frozen_redis_is_waited_for_once_a_second_by_one_request(valkey: EmbeddedValkey, store: Store) -> None:
    missed: list[None] = []
    memory = SessionStore(store, 60, on_missed=lambda: missed.append(None))
    memory.remember(["session"], "small", 5)
    assert (await memory.recall([], "session")).last is not None
    with frozen(valkey):
        started = time.monotonic()
        recalled = [await memory.recall(["call"], "session") for _ in range(50)]
        within = time.monotonic() - started
        # from this process's own memory, without asking again
        assert [turn.last.model for turn in recalled if turn.last] == ["small"] * 50
        assert len(missed) <= 1 + within / RETRY_INTERVAL_S

        memory._ask_after = 0.0  # the second has passed
        many = await asyncio.gather(*(memory.recall([], f"other-{number}") for number in range(50)))
        assert many == [Lookup()] * 50
        assert len(missed) <= 2 + (time.monotonic() - started) / RETRY_INTERVAL_S
    memory._ask_after = 0.0
    for call in ("call-1", "call-2"):  # it answers again, and is asked as before
        await put(store, call, {"model": "large", "tokens": None, "at": time.time()})
        assert await memory.recall([call], None) == Lookup("large")


async def test_while_redis_is_away_what_is_to_be_written_waits_within_bounds() -> None:
    dropped: list[None] = []
    away = Store("unix:///nowhere/valkey.sock")
    memory = SessionStore(away, 60, on_dropped=lambda: dropped.append(None))
    memory.start()
    memory.remember([f"call-{number}" for number in range(MAX_QUEUED + 3)], "small")
    assert len(dropped) == 3
    assert (len(memory._queue), len(memory._local)) == (MAX_QUEUED, MAX_LOCAL)
    assert await memory.recall([f"call-{MAX_QUEUED}"], None) == Lookup("small")
    assert await memory.recall(["call-1"], None) == Lookup()
    await memory.stop()
    await away.close()


async def test_answers_are_written_in_the_background_as_they_come(ours: SessionStore, theirs: SessionStore) -> None:
    ours.start()
    for number in range(3):
        ours.remember([f"call-{number}"], "small")
        await until(lambda: not ours._queue)
        assert await theirs.recall([f"call-{number}"], None) == Lookup("small")
    ours.remember(["last"], "small")
    await ours.stop()
    assert await theirs.recall(["last"], None) == Lookup("small")


def test_what_is_remembered_is_a_digest_of_its_own_for_every_key() -> None:
    digests = {scoped_key(key, mark) for key in ("", "k1", "k2") for mark in ("session:a", "call:a")}
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {64}
    assert scoped_key("", "\ud800")
