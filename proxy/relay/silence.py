"""How long a stream may say nothing, and how long it may last. One timer for all of it, not one for each piece."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


class Silence:
    """Ends waits that take too long, as `asyncio.timeout` does for one. To be closed."""

    def __init__(self, idle_s: float, until: float) -> None:
        """`until`: monotonic seconds after which every wait is too long."""
        self._idle_s = idle_s
        self._until = until
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._since = 0.0
        self._struck = False

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises TimeoutError where it is not there in time."""
        task = asyncio.current_task()
        assert task is not None  # a coroutine runs in one
        before = task.cancelling()
        self._waiting, self._since = task, monotonic()
        if self._timer is None:
            self._look()
        try:
            return await work
        except asyncio.CancelledError:
            if self._struck and task.cancelling() - 1 <= before:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None
            if self._struck:
                task.uncancel()
                self._struck = False

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether a wait takes too long by now, and when it would."""
        self._timer = None
        if self._waiting is None or self._struck:
            return  # the next wait looks again
        left_s = min(self._since + self._idle_s, self._until) - monotonic()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._struck = True
        self._waiting.cancel()
