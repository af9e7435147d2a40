"""Ending asyncio tasks for certain. Starting them is their owners'."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any

log = logging.getLogger("uniroute")

AGAIN_S = 0.1


async def cancel_until_done(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel until they are over, even if we are cancelled meanwhile.

    Once is not enough: under Python 3.11 `asyncio.wait_for`, through which redis-py sends, swallows a cancellation
    that arrives together with its result.
    """
    interrupted: asyncio.CancelledError | None = None
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=AGAIN_S)
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """`work` is done when this returns, also where we are cancelled meanwhile, which is told afterwards: what is closed
    halfway stays open for ever."""
    working = asyncio.create_task(work)
    interrupted: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
    working.result()


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel until they are over. What one of them failed with before is logged, not raised."""
    started = [task for task in tasks if task is not None]
    await cancel_until_done(started)
    for task in started:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s failed", task.get_name(), exc_info=error)
