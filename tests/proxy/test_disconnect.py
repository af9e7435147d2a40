"""Work for a client that may leave: cancelled with it, and with nobody else's cancellation taken for that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from proxy.errors import ClientGone
from proxy.relay.disconnect import until_gone


class Client:
    """Leaves when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def value(held: Any) -> Any:
    await asyncio.sleep(0)
    return held


async def test_what_the_work_gives_is_given() -> None:
    assert await until_gone(Client().receive, value(3)) == 3


async def test_what_the_work_raises_is_raised() -> None:
    async def failing() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await until_gone(Client().receive, failing())


async def test_the_work_has_ended_when_the_client_is_said_to_be_gone() -> None:
    client, ended = Client(), asyncio.Event()

    async def work() -> None:
        client.leaves.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # closing takes a moment
            ended.set()

    with pytest.raises(ClientGone):
        await until_gone(client.receive, work())
    assert ended.is_set()
    await asyncio.sleep(0)  # and nothing of the cancellation is left in this task


@pytest.mark.parametrize("then", ["return", "raise"])
async def test_work_that_makes_nothing_of_its_cancellation_is_cancelled_again(then: str) -> None:
    client, tries = Client(), 0

    async def work() -> None:
        nonlocal tries
        client.leaves.set()
        while tries < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                tries += 1
        if then == "raise":
            raise OSError("the connection was closed")

    async with asyncio.timeout(5):
        with pytest.raises(ClientGone):
            await until_gone(client.receive, work())
    assert tries == 2


async def test_a_cancellation_from_outside_is_not_taken_for_a_client_that_left() -> None:
    waiting = asyncio.create_task(until_gone(Client().receive, asyncio.Event().wait()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    client = Client()
    both = asyncio.create_task(until_gone(client.receive, asyncio.Event().wait()))
    await asyncio.sleep(0)
    client.leaves.set()
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_a_time_limit_around_it_is_told_as_one() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await until_gone(Client().receive, asyncio.Event().wait())


async def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_that_follows() -> None:
    client = Client()

    async def work() -> None:
        client.leaves.set()
        for _ in range(turns):
            await asyncio.sleep(0)

    for turns in range(6):
        client.leaves.clear()
        try:
            await until_gone(client.receive, work())
        except ClientGone:
            assert turns > 0
        for _ in range(3):
            await asyncio.sleep(0)
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_nobody_watches_any_more_when_the_work_has_ended() -> None:
    await until_gone(Client().receive, value(1))
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == {asyncio.current_task()}
