"""Work that stops when the client leaves. Frameworks do not cancel a request that streams nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from proxy.errors import ClientGone
from proxy.tasks import cancel_until_done

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientGone, after `work` was cancelled and has ended, when the client leaves first.

    The request's body must have been read: what else arrives can then only be the disconnect.
    """
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
