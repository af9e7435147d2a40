from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import pytest

from proxy.server.attempts import IdleTimeout

LONG_S, SHORT_S = 30.0, 0.05


@contextmanager
def silence(idle_s: float = LONG_S, whole_s: float = LONG_S) -> Iterator[IdleTimeout]:
    found = IdleTimeout(idle_s, monotonic() + whole_s)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize(("idle_s", "whole_s"), [(SHORT_S, LONG_S), (LONG_S, SHORT_S)])
async def test_a_wait_that_takes_too_long_ends_and_leaves_no_trace(idle_s: float, whole_s: float) -> None:
    with silence(idle_s, whole_s) as limit, pytest.raises(TimeoutError):
        await limit.wait_for(asyncio.Event().wait())
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_pieces_that_come_in_time_are_all_there() -> None:
    with silence(idle_s=4 * SHORT_S) as limit:
        for piece in range(8):  # twice as long as one may take
            assert await limit.wait_for(asyncio.sleep(SHORT_S, piece)) == piece


async def test_pieces_in_time_do_not_make_a_stream_last_for_ever() -> None:
    async def read_on(limit: IdleTimeout) -> None:
        while True:
            await limit.wait_for(asyncio.sleep(SHORT_S))

    with silence(whole_s=4 * SHORT_S) as limit, pytest.raises(TimeoutError):
        await read_on(limit)


async def test_what_happens_between_two_waits_is_not_counted() -> None:
    with silence(idle_s=SHORT_S) as limit:
        for _ in range(3):
            assert await limit.wait_for(asyncio.sleep(0, "piece")) == "piece"
            await asyncio.sleep(2 * SHORT_S)


async def test_the_wait_after_a_pause_is_limited_again() -> None:
    with silence(idle_s=SHORT_S) as limit:
        await limit.wait_for(asyncio.sleep(0))
        await asyncio.sleep(2 * SHORT_S)
        async with asyncio.timeout(60):
            with pytest.raises(TimeoutError, match=r"^$"):
                await limit.wait_for(asyncio.Event().wait())


async def until_hit_twice() -> None:
    """Cancel from elsewhere in the same moment."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise


@pytest.mark.parametrize("too", [False, True], ids=["alone", "as it strikes"])
async def test_a_cancellation_by_others_is_raised(*, too: bool) -> None:
    async def wait() -> None:
        with silence(idle_s=SHORT_S if too else LONG_S) as limit:
            await limit.wait_for(until_hit_twice())

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    if not too:
        task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_failure_of_the_work_is_its_own() -> None:
    async def fail() -> None:
        raise ValueError("of its own")

    with silence() as limit, pytest.raises(ValueError, match="of its own"):
        await limit.wait_for(fail())
