"""A server that cannot start says why in one line; only what nobody foresaw keeps its traceback. Starts nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from proxy.settings import SettingsError
from proxy.state.store import StoreUnavailable
from router_core.errors import RouterCoreError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("uniroute")

FORESEEN = (SettingsError, StoreUnavailable, RouterCoreError)


class PlainStart:
    """The app, whose refusal to start is told to uvicorn without the traceback that Starlette puts there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        held: list[Message] = []

        async def hold_failure(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                held.append(message)
            else:
                await send(message)

        try:
            await self._app(scope, receive, hold_failure)
        except FORESEEN as refusal:
            log.error("%s", " ".join(str(refusal).split()))
            await send({"type": "lifespan.startup.failed", "message": ""})
        except BaseException:
            for message in held:
                await send(message)
            raise
