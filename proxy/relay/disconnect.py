"""Work that stops when the client leaves. Frameworks do not cancel a request that streams nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from proxy.errors import ClientGone
from proxy.tasks import cancel_until_done

T = TypeVar("T")

LEAVING = "uniroute.leaving"
"""In the scope of a request whose connection says by itself that it was lost."""
AGAIN_S = 0.1


class Leaving:
    """One connection, and the tasks that work for whoever is at its other end."""

    def __init__(self) -> None:
        self.gone = False
        self._cancellations = 0
        self._working: set[asyncio.Task[Any]] = set()

    def left(self) -> None:
        """Cancels them until they are over: some libraries swallow a cancellation that comes with a result."""
        self.gone = True
        self._cancellations += 1
        for task in self._working:
            task.cancel()
        if self._working:
            asyncio.get_running_loop().call_later(AGAIN_S, self.left)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, within this task. Raises ClientGone."""
        task = asyncio.current_task()
        if task is None or self.gone:
            work.close()
            raise ClientGone("the client closed its connection")
        self._working.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if self._took_back(task):
                raise ClientGone("the client closed its connection") from None
            raise
        finally:
            self._working.discard(task)

    def _took_back(self, task: asyncio.Task[Any]) -> bool:
        """Whether nobody else wants the task to end."""
        for _ in range(self._cancellations):
            task.uncancel()
        return self.gone and task.cancelling() == 0


async def until_gone(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientGone, after `work` was cancelled and has ended, when the client leaves first.

    The request's body must have been read: what else arrives can then only be the disconnect.
    """
    leaving: Leaving | None = scope.get(LEAVING)
    return await (_watching(receive, work) if leaving is None else leaving.during(work))


async def _watching(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Under another server than ours."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client closed its connection")
        return working.result()
    finally:
        await cancel_until_done((working, watching))
        _ = working.cancelled() or working.exception()  # looked at, so that asyncio does not log it as forgotten


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
