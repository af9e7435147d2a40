from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from proxy.concurrency import CANCEL_INTERVAL_S
from proxy.errors import ClientDisconnected

T = TypeVar("T")

# Of the request that the current task serves.
_current: ContextVar[DisconnectEvent | None] = ContextVar("uniroute_client", default=None)


class DisconnectEvent:
    """A client's connection was lost: a flag, and callbacks for the moment when it is set."""

    def __init__(self) -> None:
        self.is_set = False
        self.callbacks: set[Callable[[], None]] = set()

    def set(self) -> None:
        self.is_set = True
        for callback in tuple(self.callbacks):
            callback()


class Client(Protocol):
    """Who waits for an answer."""

    disconnect: DisconnectEvent | None
    """None: only `wait_for_disconnect` tells."""

    async def wait_for_disconnect(self) -> None: ...


def cancel_on_disconnect(client: Client, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return the result of `work`, which is cancelled when the client leaves.

    The request's body must have been read: what else arrives can then only be the disconnect. `work` runs in the
    caller's own task. On another server than ours, a second task watches the connection.

    Raises:
        ClientDisconnected: after `work` was cancelled and has ended.
    """
    if client.disconnect is not None:
        return _run(client.disconnect, work)
    return _run_watched(client, work)


async def _run_watched(client: Client, work: Coroutine[Any, Any, T]) -> T:
    disconnect = DisconnectEvent()
    watching = asyncio.create_task(_watch(client, disconnect))
    try:
        return await _run(disconnect, work)
    finally:
        watching.cancel()


async def _run(disconnect: DisconnectEvent, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    if task is None or disconnect.is_set:
        work.close()
        raise ClientDisconnected("the client closed its connection")
    _current.set(disconnect)
    canceller = _Canceller(task)
    disconnect.callbacks.add(canceller.cancel)
    try:
        result = await work
    except BaseException:
        if canceller.stop():
            raise ClientDisconnected("the client closed its connection") from None
        raise
    finally:
        disconnect.callbacks.discard(canceller.cancel)
    if canceller.stop():  # `work` has ended well in spite of it
        raise ClientDisconnected("the client closed its connection")
    return result


def cancelled_ending() -> str:
    """Return the ending of a request whose task was cancelled: by its client's disconnect, or else by the shutdown."""
    disconnect = _current.get()
    return "client_gone" if disconnect is None or disconnect.is_set else "shutdown"


class _Canceller:
    """Cancel a task once its client has left, and again until the task notices.

    Under Python 3.11 `asyncio.wait_for`, through which redis-py sends, swallows a cancellation that arrives together
    with its result.
    """

    __slots__ = ("_before", "_cancelled", "_stopped", "_task", "_timer")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._before = task.cancelling()
        self._cancelled = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def cancel(self) -> None:
        if self._stopped:  # the client left after the work had ended
            return
        self._cancelled += 1
        self._task.cancel()
        self._timer = asyncio.get_running_loop().call_later(CANCEL_INTERVAL_S, self.cancel)

    def stop(self) -> bool:
        """Take back the cancellations. Return whether the client had left, and nobody else cancels this task."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._cancelled):
            self._task.uncancel()
        return self._cancelled > 0 and self._task.cancelling() <= self._before


async def _watch(client: Client, disconnect: DisconnectEvent) -> None:
    await client.wait_for_disconnect()
    disconnect.set()
