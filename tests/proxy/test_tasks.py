"""A task that swallows its cancellation ends all the same."""

from __future__ import annotations

import asyncio
import contextlib

from proxy.tasks import end


async def test_a_task_that_swallows_one_cancellation_ends_at_the_next() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end(task, None)
    assert task.cancelled()
