from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from proxy.errors import ServiceUnavailable
from proxy.storage.redis import Store
from proxy.storage.response_store import PREFIX, ResponseStore
from proxy.storage.valkey import EmbeddedValkey

TTL_S = 600


def a_store(store: Store, **limits: Any) -> ResponseStore:
    stated = {"max_responses_per_key": 10, "max_response_bytes": 1000, "max_stored_bytes_per_key": 10_000, **limits}
    return ResponseStore(store, TTL_S, **stated)


def a_record(text: str = "x") -> dict[str, Any]:
    return {"input": [{"role": "user", "content": text}], "response": {"id": "resp_1", "output": []}}


async def kept(responses: ResponseStore, scope: str, count: int) -> list[int]:
    """Return which of `resp_0`, `resp_1`, … are kept."""
    return [number for number in range(count) if await responses.get(scope, f"resp_{number}") is not None]


async def bytes_counted(store: Store, scope: str) -> tuple[int, int]:
    """Return the total that is counted, and the sum of what is counted of each response."""
    sizes: Any = await store.client.hgetall(f"{PREFIX}:{{{scope}}}:bytes")
    return int(sizes.pop("total")), sum(map(int, sizes.values()))


async def test_a_record_is_read_back_by_another_process(store: Store, second_store: Store) -> None:
    record = a_record("\ud83d and 𝄞")
    assert await a_store(store).save("key", "resp_1", record)
    assert await a_store(second_store).get("key", "resp_1") == record


async def test_a_scope_sees_and_deletes_only_its_own(store: Store) -> None:
    responses = a_store(store)
    await responses.save("key", "resp_1", a_record())
    assert await responses.get("", "resp_1") is None
    assert not await responses.delete("other", "resp_1")
    assert await responses.delete("key", "resp_1")
    assert await responses.get("key", "resp_1") is None
    assert not await responses.delete("key", "resp_1")


async def test_everything_that_is_kept_expires(store: Store) -> None:
    await a_store(store).save("key", "resp_1", a_record())
    keys = [key async for key in store.client.scan_iter(f"{PREFIX}:*")]
    assert len(keys) == 3
    assert all([0 < await store.client.ttl(key) <= TTL_S for key in keys])


async def test_of_one_key_the_oldest_go_when_there_are_too_many(store: Store) -> None:
    responses = a_store(store, max_responses_per_key=3)
    await responses.save("other", "resp_0", a_record())
    for number in range(5):
        await responses.save("key", f"resp_{number}", a_record())
    assert await kept(responses, "key", 5) == [2, 3, 4]
    assert await kept(responses, "other", 5) == [0]


async def test_of_one_key_the_oldest_go_when_they_are_too_large_together(store: Store) -> None:
    responses = a_store(store, max_stored_bytes_per_key=1000)
    for number in range(4):
        assert await responses.save("key", f"resp_{number}", a_record("x" * 300))
    assert await kept(responses, "key", 4) == [2, 3]
    total, summed = await bytes_counted(store, "key")
    assert total == summed <= 1000


async def test_what_is_kept_again_or_deleted_is_not_counted_twice(store: Store) -> None:
    responses = a_store(store)
    for text in ("x" * 500, "x"):
        await responses.save("key", "resp_0", a_record(text))
    await responses.save("key", "resp_1", a_record())
    await responses.delete("key", "resp_1")
    total, summed = await bytes_counted(store, "key")
    assert total == summed < 200


async def test_what_has_expired_makes_room(store: Store) -> None:
    responses = a_store(store, max_responses_per_key=2)
    for number in range(2):
        await responses.save("key", f"resp_{number}", a_record())
    await store.client.zadd(f"{PREFIX}:{{key}}:ids", {"resp_1": 1.0})
    await responses.save("key", "resp_2", a_record())
    assert await kept(responses, "key", 3) == [0, 2]


async def test_the_newest_is_kept_even_if_the_clock_of_redis_was_set_back(store: Store) -> None:
    responses = a_store(store, max_responses_per_key=1)
    await responses.save("key", "resp_0", a_record())
    await store.client.zadd(f"{PREFIX}:{{key}}:ids", {"resp_0": 1e11})
    await responses.save("key", "resp_1", a_record())
    assert 1 in await kept(responses, "key", 2)


async def test_many_at_once_keep_within_the_limits(store: Store, second_store: Store) -> None:
    ours, theirs = (a_store(each, max_responses_per_key=5) for each in (store, second_store))
    await asyncio.gather(
        *(each.save("key", f"resp_{number}", a_record()) for number in range(20) for each in (ours, theirs))
    )
    assert len(await kept(ours, "key", 20)) == 5
    total, summed = await bytes_counted(store, "key")
    assert total == summed


async def test_one_that_is_too_large_is_not_kept_and_counted(store: Store) -> None:
    dropped: list[None] = []
    responses = a_store(store, on_dropped=lambda: dropped.append(None))
    assert not await responses.save("key", "resp_0", a_record("ü" * 500))
    assert not await responses.save("key", "not an id", a_record())
    assert await kept(responses, "key", 1) == []
    assert len(dropped) == 2


@pytest.mark.parametrize("value", ["", "[1]", "{", '"x"'])
async def test_what_others_wrote_there_is_ignored(store: Store, value: str) -> None:
    await store.client.set(f"{PREFIX}:{{key}}:response:resp_1", value)
    assert await a_store(store).get("key", "resp_1") is None


@contextmanager
def frozen(server: EmbeddedValkey) -> Iterator[None]:
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


async def test_an_answer_does_not_wait_until_a_silent_redis_answers_again(valkey: EmbeddedValkey, store: Store) -> None:
    dropped: list[None] = []
    responses = a_store(store, on_dropped=lambda: dropped.append(None))
    await responses.save("key", "resp_0", a_record())
    with frozen(valkey):
        assert not await responses.save("key", "resp_1", a_record())
    assert len(dropped) == 1


async def test_without_redis_nothing_is_kept_and_readers_are_told_so() -> None:
    responses = a_store(Store("unix:///nowhere/valkey.sock"))
    assert not await responses.save("key", "resp_0", a_record())
    for call in (responses.get, responses.delete):
        with pytest.raises(ServiceUnavailable, match="cannot be reached"):
            await call("key", "resp_0")
