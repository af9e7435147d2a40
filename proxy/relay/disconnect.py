"""Work that stops when the client leaves. Frameworks do not cancel a request that streams nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from proxy.errors import ClientGone
from proxy.tasks import AGAIN_S

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientGone, after `work` was cancelled and has ended, when the client leaves first.

    The request's body must have been read: what else arrives can then only be the disconnect. `work` runs in the task
    of whoever calls, so that a request has one task, and one that watches.
    """
    working = asyncio.current_task()
    assert working is not None
    watch = _Watch(working)
    watching = asyncio.create_task(_gone(receive))
    watching.add_done_callback(watch.left)
    try:
        result = await work
    except BaseException:
        if watch.over():
            raise ClientGone("the client closed its connection") from None
        raise
    finally:
        watching.cancel()
    if watch.over():  # `work` made nothing of being cancelled
        raise ClientGone("the client closed its connection")
    return result


class _Watch:
    """Cancels once the client has left, and again until that is noticed: under Python 3.11 `asyncio.wait_for`, through
    which redis-py sends, swallows a cancellation that arrives together with its result."""

    def __init__(self, working: asyncio.Task[Any]) -> None:
        self._working = working
        self._before = working.cancelling()
        self._cancelled = 0
        self._again: asyncio.TimerHandle | None = None
        self._over = False

    def left(self, _: asyncio.Task[None] | None = None) -> None:
        if self._over:  # it was told of after the work had ended
            return
        self._cancelled += 1
        self._working.cancel()
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self.left)

    def over(self) -> bool:
        """Whether the client had left, and nobody else wants this task to end. What was asked here is taken back."""
        self._over = True
        if self._again is not None:
            self._again.cancel()
        for _ in range(self._cancelled):
            self._working.uncancel()
        return self._cancelled > 0 and self._working.cancelling() <= self._before


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
