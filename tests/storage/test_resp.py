from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Connection
from redis.exceptions import ResponseError

from proxy.storage.redis import MAX_CONNECTIONS, Store, encode_command, pipeline


@given(st.lists(st.text(max_size=20) | st.just("größe\r\n$3\r\n"), max_size=9))
def test_a_command_is_encoded_as_redis_py_encodes_it(words: list[str]) -> None:
    theirs = Connection(encoding_errors="replace").pack_command("EVALSHA", *words)
    assert encode_command(["EVALSHA", *words]) == b"".join(theirs)


async def test_each_command_has_its_reply_or_its_error(store: Store) -> None:
    commands = [encode_command(words.split()) for words in ("SET a 1", "LPUSH a 2", "GET a")]
    done, refused, found = await pipeline(store.client, commands)
    assert (done, found) == ("OK", "1")
    assert isinstance(refused, ResponseError)
    assert "WRONGTYPE" in str(refused)


async def test_a_connection_that_went_stale_is_opened_again(store: Store, second_store: Store) -> None:
    await pipeline(store.client, [encode_command(("SET", "a", "1"))])
    killed = await pipeline(
        second_store.client, [encode_command(["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"])]
    )
    assert killed[0] >= 1
    assert await pipeline(store.client, [encode_command(("GET", "a"))]) == ["1"]


async def test_a_lost_connection_is_retried(store: Store, second_store: Store) -> None:
    waiting = asyncio.create_task(pipeline(store.client, [encode_command(["BLPOP", "queue", "9"])]))
    await _blocked(second_store)
    await pipeline(second_store.client, [encode_command(["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"])])
    await _blocked(second_store)
    await pipeline(second_store.client, [encode_command(["RPUSH", "queue", "found"])])
    assert await waiting == [["queue", "found"]]


async def test_connections_are_released_to_the_pool(store: Store) -> None:
    async with asyncio.timeout(60):
        for _ in range(MAX_CONNECTIONS + 1):
            await pipeline(store.client, [encode_command(("ECHO", "x"))])


async def test_the_reply_of_a_cancelled_call_reaches_no_other_call(store: Store) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await pipeline(store.client, [encode_command(("BLPOP", "nothing", "1"))])
    assert await pipeline(store.client, [encode_command(("ECHO", str(number))) for number in range(3)]) == [
        "0",
        "1",
        "2",
    ]


async def _blocked(store: Store) -> None:
    """Wait until a client blocks in Redis."""
    async with asyncio.timeout(60):
        while not (await pipeline(store.client, [encode_command(("CLIENT", "LIST", "FLAGS", "b"))]))[0]:
            pass
