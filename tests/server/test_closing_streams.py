from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from proxy.server.streaming import cancel_or_close


class Opened:
    def __init__(self) -> None:
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("cancellations", [0, 1, 2])
async def test_a_stream_that_opens_in_spite_of_its_cancellation_is_closed(cancellations: int) -> None:
    opened, cancelled, goes_on = Opened(), asyncio.Event(), asyncio.Event()

    async def opening() -> Any:
        with contextlib.suppress(asyncio.CancelledError):  # as redis-py may, under Python 3.11
            await asyncio.Event().wait()
        cancelled.set()
        while not goes_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await goes_on.wait()
        return opened

    task = asyncio.create_task(opening())
    await asyncio.sleep(0)
    closing = asyncio.create_task(cancel_or_close(task))
    await cancelled.wait()
    for _ in range(cancellations):
        closing.cancel()
        await asyncio.sleep(0)
    goes_on.set()
    await asyncio.wait({closing})
    assert (opened.closed, closing.cancelled()) == (True, cancellations > 0)
