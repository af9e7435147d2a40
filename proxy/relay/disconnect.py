"""Work that stops when the client leaves. Frameworks do not cancel a request that streams nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from proxy.concurrency import AGAIN_S
from proxy.errors import ClientGone

T = TypeVar("T")
LetGo = Callable[[T], Awaitable[None]]

LEAVING = "uniroute.leaving"
"""In the scope of a request whose connection says by itself that it was lost."""


_client: ContextVar[Leaving | None] = ContextVar("uniroute_client", default=None)


def cut_ending() -> str:
    """The ending of a request whose task was cancelled: `client_gone`, or `shutdown`: nobody else does that."""
    leaving = _client.get()
    return "client_gone" if leaving is None or leaving.gone else "shutdown"


class Leaving:
    """One connection, and whoever wants to know that it is no more."""

    def __init__(self) -> None:
        self.gone = False
        self.told: set[Callable[[], None]] = set()

    def left(self) -> None:
        self.gone = True
        for tell in tuple(self.told):
            tell()


async def until_gone(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T], let_go: LetGo[T] | None = None) -> T:
    """The result of `work`. Raises ClientGone, after `work` was cancelled and has ended, when the client leaves first.

    The request's body must have been read: what else arrives can then only be the disconnect. `work` runs in the task
    of whoever calls; only under another server than ours a second one watches. `let_go` is given a result that is there
    in spite of its cancellation, and that nobody will see.
    """
    leaving: Leaving | None = scope.get(LEAVING)
    if leaving is not None:
        return await _during(leaving, work, let_go)
    leaving = Leaving()
    watching = asyncio.create_task(_watch(receive, leaving))
    try:
        return await _during(leaving, work, let_go)
    finally:
        watching.cancel()


async def _during(leaving: Leaving, work: Coroutine[Any, Any, T], let_go: LetGo[T] | None) -> T:
    working = asyncio.current_task()
    if working is None or leaving.gone:
        work.close()
        raise ClientGone("the client closed its connection")
    _client.set(leaving)
    ending = _Ending(working)
    leaving.told.add(ending.begin)
    try:
        result = await work
    except BaseException:
        if ending.over():
            raise ClientGone("the client closed its connection") from None
        raise
    finally:
        leaving.told.discard(ending.begin)
    if ending.over():  # `work` made nothing of being cancelled
        if let_go is not None:
            await let_go(result)
        raise ClientGone("the client closed its connection")
    return result


class _Ending:
    """Cancels once the client has left, and again until that is noticed: under Python 3.11 `asyncio.wait_for`, through
    which redis-py sends, swallows a cancellation that arrives together with its result."""

    def __init__(self, working: asyncio.Task[Any]) -> None:
        self._working = working
        self._before = working.cancelling()
        self._cancelled = 0
        self._again: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self) -> None:
        if self._over:  # it was told of after the work had ended
            return
        self._cancelled += 1
        self._working.cancel()
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self.begin)

    def over(self) -> bool:
        """Whether the client had left, and nobody else wants this task to end. What was asked here is taken back."""
        self._over = True
        if self._again is not None:
            self._again.cancel()
        for _ in range(self._cancelled):
            self._working.uncancel()
        return self._cancelled > 0 and self._working.cancelling() <= self._before


async def _watch(receive: Receive, leaving: Leaving) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leaving.left()
