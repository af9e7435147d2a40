"""Ending asyncio tasks for certain. Starting them is their owners'."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine
from typing import Any, TypeVar

log = logging.getLogger("uniroute")

AGAIN_S = 0.1
PATIENCE_S = 5.0
"""With a library that was cancelled, until it is once more."""

T = TypeVar("T")


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


async def to_its_end(work: Coroutine[Any, Any, T], *, cancelled_again_s: float | None = None) -> T:
    """What came of `work`, which is over when this returns, however often we are cancelled meanwhile: that is told
    afterwards. What is closed halfway stays open for ever.

    Args:
        cancelled_again_s: `work` is cancelled with us, once, and once more when this has passed. None: never.
    """
    working = asyncio.create_task(work)
    interrupted: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait({working}, timeout=cancelled_again_s if interrupted else None)
            again = cancelled_again_s is not None
        except asyncio.CancelledError as error:
            again = cancelled_again_s is not None and interrupted is None
            interrupted = error
        if again:
            working.cancel()
    if interrupted is None:
        return working.result()
    if not working.cancelled():
        working.exception()  # nobody is left to tell
    raise interrupted


async def read_gently(source: AsyncIterator[T]) -> AsyncGenerator[T]:
    """`source`, each reading of which is cancelled once: most libraries then close what they hold, and are interrupted
    in that by a second time."""
    while True:
        try:
            item = await to_its_end(_next(source), cancelled_again_s=PATIENCE_S)
        except StopAsyncIteration:
            return
        yield item


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel until they are over. What one of them failed with before is logged, not raised."""
    started = [task for task in tasks if task is not None]
    await cancel_until_done(started)
    for task in started:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s failed", task.get_name(), exc_info=error)
