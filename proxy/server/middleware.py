from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.errors import SHUTDOWN_NOTICE_TIMEOUT_S, SHUTTING_DOWN_MESSAGE, ShuttingDown, error_body
from proxy.server.auth import PRINCIPAL, SAFE_METHODS, UNAUTHENTICATED_PATHS, is_admin_side, path_of
from proxy.server.requests import (
    APP_STATE,
    DISCONNECT,
    OVERLOADED,
    RECEIVED_AT,
    REQUEST_IDS,
    RequestIds,
    headers_of,
    request_ids_from,
)
from proxy.server.responses import error_response
from proxy.server.startup import Startup
from proxy.storage.audit_log import ANONYMOUS, Actor, action_of

log = logging.getLogger("uniroute.edge")

_ID_HEADERS = (b"x-request-id", b"traceparent")

_RETRY_AFTER_S = "1"


class RequestContextMiddleware:
    """Give each request its ids, its arrival time and the app's state, and answer for an app that fails.

    It is the outermost layer, in pure ASGI.
    """

    def __init__(self, app: ASGIApp, startup: Startup) -> None:
        self.app = app
        self._startup = startup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ids: RequestIds = request_ids_from(headers_of(scope))
        scope[REQUEST_IDS] = ids
        scope[RECEIVED_AT] = time.monotonic()
        response_started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                self._start_response(message, ids)
            await send(message)

        if OVERLOADED in scope or self._startup.app_state is None:
            await self._turn_away(scope, receive, send_with_ids)
            return
        scope[APP_STATE] = self._startup.app_state
        try:
            await self.app(scope, receive, send_with_ids)
        except asyncio.CancelledError:
            if DISCONNECT not in scope:
                raise
            # The task serves this request alone, and its cancellation means that the server ends.
            if not response_started:
                await _say_shutting_down(scope, receive, send_with_ids)
        except Exception:  # the only broad one: nothing of what failed may reach the client
            log.exception("request=%s failed", ids.request_id)
            if not response_started:
                message = f"an error of ours, logged under request id {ids.request_id}"
                body = error_body(message, "server_error", "internal_error")
                await JSONResponse(body, 500)(scope, receive, send_with_ids)

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer probes alone: a full or a starting process must not be taken for a dead one."""

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        overloaded = OVERLOADED in scope
        answer: ASGIApp = self.app
        if path_of(scope) not in UNAUTHENTICATED_PATHS:
            # Before any key is checked: while the server starts, no keys are known.
            answer = _too_many_connections() if overloaded else error_response(self._startup.refusal())
        await answer(scope, receive, send_and_close if overloaded else send)

    def _start_response(self, message: Message, ids: RequestIds) -> None:
        """Add the ids to a response's headers, and count it if it is an error."""
        headers = message.setdefault("headers", [])
        if isinstance(headers, list) and not any(name in _ID_HEADERS for name, _ in headers):
            headers += ids.raw_headers()
        else:
            MutableHeaders(scope=message).update(ids.headers())
        if message["status"] >= 400 and self._startup.app_state is not None:
            self._startup.app_state.metrics.errors.labels(str(message["status"])).inc()


async def _say_shutting_down(scope: Scope, receive: Receive, send: Send) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SHUTDOWN_NOTICE_TIMEOUT_S):
            refusal = ShuttingDown(
                SHUTTING_DOWN_MESSAGE, headers={"retry-after": _RETRY_AFTER_S, "connection": "close"}
            )
            await error_response(refusal)(scope, receive, send)


def _too_many_connections() -> JSONResponse:
    body = error_body("this server has no room for one more connection", "server_error", "too_many_connections")
    return JSONResponse(body, 503, {"retry-after": _RETRY_AFTER_S})


# Key of the scope: what an endpoint has made, which no path names yet.
TARGET_IN_SCOPE = "uniroute.target"


class AuditLogMiddleware:
    """Log every change that is asked of the admin side, also those that AuthMiddleware refuses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS or not is_admin_side(path_of(scope)):
            await self.app(scope, receive, send)
            return
        status = 500  # what is answered if nothing else was

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            action, target = action_of(scope["method"], path_of(scope))
            actor = Actor(scope.get(PRINCIPAL, ANONYMOUS), scope[REQUEST_IDS].request_id)
            actor.log(action, scope.get(TARGET_IN_SCOPE, target), status)
