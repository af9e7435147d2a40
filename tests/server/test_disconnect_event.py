from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from proxy.errors import ClientDisconnected
from proxy.server.disconnects import DisconnectEvent, cancel_on_disconnect


class Client:
    """Disconnect on demand; its server announces it, or sends the event of every ASGI server."""

    def __init__(self, *, announces: bool) -> None:
        self._leaves = asyncio.Event()
        self._leaving = DisconnectEvent()
        self.disconnect = self._leaving if announces else None

    def leave(self) -> None:
        self._leaves.set()
        asyncio.get_running_loop().call_soon(self._leaving.set)  # as a connection is lost: between two steps of tasks

    async def wait_for_disconnect(self) -> None:
        await self._leaves.wait()

    async def during(self, work: Any) -> Any:
        return await cancel_on_disconnect(self, work)


@pytest.fixture(params=[True, False], ids=["told", "received"])
def client(request: pytest.FixtureRequest) -> Client:
    return Client(announces=request.param)


async def value(result: Any) -> Any:
    await asyncio.sleep(0)
    return result


async def test_the_result_of_the_work_is_returned(client: Client) -> None:
    assert await client.during(value(3)) == 3


async def test_an_exception_of_the_work_is_raised(client: Client) -> None:
    async def failing() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await client.during(failing())


async def test_the_work_has_ended_when_the_disconnect_is_raised(client: Client) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        client.leave()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # closing takes a moment
            ended.set()

    with pytest.raises(ClientDisconnected):
        await client.during(work())
    assert ended.is_set()
    await asyncio.sleep(0)  # and nothing of the cancellation is left in this task


@pytest.mark.parametrize("then", ["return", "raise"])
async def test_work_that_makes_nothing_of_its_cancellation_is_cancelled_again(client: Client, then: str) -> None:
    tries = 0

    async def work() -> None:
        nonlocal tries
        client.leave()
        while tries < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                tries += 1
        if then == "raise":
            raise OSError("the connection was closed")

    async with asyncio.timeout(60):
        with pytest.raises(ClientDisconnected):
            await client.during(work())
    assert tries == 2


async def test_a_cancellation_from_outside_is_not_taken_for_a_client_that_left(client: Client) -> None:
    waiting = asyncio.create_task(client.during(asyncio.Event().wait()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    both = asyncio.create_task(client.during(asyncio.Event().wait()))
    await asyncio.sleep(0)
    client.leave()
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_a_time_limit_around_it_is_told_as_one(client: Client) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await client.during(asyncio.Event().wait())


async def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_that_follows(client: Client) -> None:
    async def work() -> None:
        client.leave()
        for _ in range(turns):
            await asyncio.sleep(0)

    for turns in range(6):  # noqa: B007  # the work reads it
        client = Client(announces=client.disconnect is not None)
        with contextlib.suppress(ClientDisconnected):
            await client.during(work())
        for _ in range(3):
            await asyncio.sleep(0)
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_nobody_watches_any_more_when_the_work_has_ended(client: Client) -> None:
    await client.during(value(1))
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == {asyncio.current_task()}
