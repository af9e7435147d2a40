from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import NoScriptError, RedisError, ResponseError

from proxy.storage.redis import MAX_CONNECTIONS, Store, encode_command, pipeline
from proxy.storage.redis_connections import PipelinedConnection


@pytest.fixture
async def connection(store: Store) -> AsyncIterator[PipelinedConnection]:
    opened = await PipelinedConnection.open(store.client)
    yield opened
    await opened.dispose()


async def ask(connection: PipelinedConnection, *commands: str) -> Any:
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    encoded = [encode_command(command.split()) for command in commands]
    connection.send(b"".join(encoded), len(encoded), answered.set_result)
    async with asyncio.timeout(10):
        return await answered


async def test_every_command_has_its_reply_or_its_error(connection: PipelinedConnection) -> None:
    replies = await ask(connection, "SET a größe", "GET a", "GET none", "INCR n", "LPUSH a 1", "EVALSHA x 0", "KEYS n")
    done, text, missing, number, wrong, unknown, listed = replies
    assert (done, text, missing, number, listed) == ("OK", "größe", None, 1, ["n"])
    assert isinstance(wrong, ResponseError)
    assert isinstance(unknown, NoScriptError)


async def test_replies_may_be_cut_anywhere(connection: PipelinedConnection) -> None:
    raw = b"$5\r\na\r\nbc\r\n:-42\r\n-ERR no\r\n>2\r\n+news\r\n:1\r\n"  # news are no reply
    raw += b"$-1\r\n*2\r\n:1\r\n*1\r\n$0\r\n\r\n_\r\n+OK\r\n"
    for cut in range(1, len(raw)):
        got: list[Any] = []
        connection.send(b"", 7, got.append)
        connection.data_received(raw[:cut])
        connection.data_received(raw[cut:])
        (replies,) = got
        assert [str(reply) for reply in replies] == ["a\r\nbc", "-42", "no", "None", "[1, ['']]", "None", "OK"]


@pytest.mark.parametrize("raw", [b"$x\r\n", b"!5\r\nhello\r\n", b"\r\n", b"*1\r\n" * 20, b":\r\n"])
async def test_what_is_no_reply_ends_the_connection(connection: PipelinedConnection, raw: bytes) -> None:
    got: list[Any] = []
    connection.send(b"", 1, got.append)
    connection.data_received(raw)
    assert [type(reply) for reply in got] == [ConnectionFailed]
    assert not connection.is_open


async def test_a_reply_that_answers_nothing_ends_the_connection(connection: PipelinedConnection) -> None:
    assert await ask(connection, "ECHO x") == ["x"]
    connection.data_received(b"+OK\r\n")
    assert not connection.is_open


async def test_a_lost_connection_answers_with_its_error(connection: PipelinedConnection, second_store: Store) -> None:
    (own,) = await ask(connection, "CLIENT ID")
    asking = asyncio.create_task(ask(connection, "BLPOP nothing 9"))
    await asyncio.sleep(0)
    await pipeline(second_store.client, [encode_command(("CLIENT", "KILL", "ID", str(own)))])
    assert isinstance(await asking, RedisError)
    assert not connection.is_open


async def test_a_disposed_connection_leaves_its_place_in_the_pool(store: Store) -> None:
    async with asyncio.timeout(20):
        for _ in range(MAX_CONNECTIONS + 1):
            connection = await PipelinedConnection.open(store.client)
            assert await ask(connection, "ECHO x") == ["x"]
            await connection.dispose()
        assert await store.available()
