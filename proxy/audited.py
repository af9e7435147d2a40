"""One audit line for every write on the admin side, whatever came of it: done, refused at the door, or failed."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.auth import WHO_IN_SCOPE, path_of
from proxy.edge import TRACE
from proxy.roles import READS, is_admin_side
from proxy.storage.audit_log import NOBODY, Author, act_of

TARGET_IN_SCOPE = "uniroute.target"
"""Where a route says what it made, which no path names yet."""


class Audited:
    """Pure ASGI, around the guard, so that what it refuses is seen too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READS or not is_admin_side(path_of(scope)):
            await self.app(scope, receive, send)
            return
        status = 500  # what the edge answers where nothing else did

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_seen)
        finally:
            action, target = act_of(scope["method"], path_of(scope))
            author = Author(scope.get(WHO_IN_SCOPE, NOBODY), scope[TRACE].request_id)
            author.log(action, scope.get(TARGET_IN_SCOPE, target), status)
