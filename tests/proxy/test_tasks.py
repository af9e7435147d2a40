"""A task that swallows its cancellation ends all the same."""

from __future__ import annotations

import asyncio
import contextlib

from proxy.tasks import end, to_its_end


async def test_a_task_that_swallows_one_cancellation_ends_at_the_next() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end(task, None)
    assert task.cancelled()


async def test_what_is_begun_comes_to_its_end_whoever_is_cancelled() -> None:
    begun, closing, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def close() -> None:
        begun.set()
        await closing.wait()
        closed.set()

    task = asyncio.create_task(to_its_end(close()))
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    closing.set()
    await asyncio.wait({task})
    assert closed.is_set()
    assert task.cancelled()
