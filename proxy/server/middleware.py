from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.errors import LAST_WORDS_S, SHUTTING_DOWN, ShuttingDown, error_object
from proxy.server.auth import PRINCIPAL, SAFE_METHODS, UNAUTHENTICATED_PATHS, is_admin_side, path_of
from proxy.server.requests import DISCONNECT, RequestIds, headers_of, request_ids_from
from proxy.server.responses import error_response
from proxy.storage.audit_log import ANONYMOUS, Actor, action_of

if TYPE_CHECKING:
    from proxy.server.dependencies import ServicesHolder


log = logging.getLogger("uniroute.edge")

REQUEST_IDS = "uniroute.trace"

RECEIVED_AT = "uniroute.arrived"
"""Monotonic seconds."""

OVERLOADED = "uniroute.crowded"
"""In the scope where the connection is one more than this process has room for."""

_IDS = (b"x-request-id", b"traceparent")

_RETRY_AFTER_S = "1"


def _state(message: Message, trace: RequestIds) -> None:
    headers = message.setdefault("headers", [])
    if isinstance(headers, list) and not any(name in _IDS for name, _ in headers):
        headers += trace.raw_headers
    else:
        MutableHeaders(scope=message).update(trace.headers())


class RequestContextMiddleware:
    """Pure ASGI."""

    def __init__(self, app: ASGIApp, holder: ServicesHolder) -> None:
        self.app = app
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = scope[REQUEST_IDS] = request_ids_from(headers_of(scope))
        scope[RECEIVED_AT] = time.monotonic()
        started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _state(message, trace)
                self._count(message["status"])
            await send(message)

        if scope.get(OVERLOADED) or not self._holder.is_open:
            await self._turned_away(scope, receive, send_with_ids)
            return
        try:
            await self.app(scope, receive, send_with_ids)
        except asyncio.CancelledError:
            if DISCONNECT not in scope:
                raise
            # of a task that is all this request's: the server ends, and this is the last that it does
            if not started:
                await _last_words(scope, receive, send_with_ids)
        except Exception:  # the outermost, and the only one: nothing of it may reach the caller
            log.exception("request=%s failed", trace.request_id)
            if not started:
                message = f"an error of ours, logged under request id {trace.request_id}"
                body = error_object(message, "server_error", "internal_error")
                await JSONResponse(body, 500)(scope, receive, send_with_ids)

    async def _turned_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Probes are answered: a full process must not be taken for a dead one, nor one that starts."""

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        crowded = bool(scope.get(OVERLOADED))
        answer: ASGIApp = self.app
        if path_of(scope) not in UNAUTHENTICATED_PATHS:
            # before any key is looked at: while the server starts nobody knows which there are
            answer = _busy() if crowded else error_response(self._holder.startup.refusal())
        await answer(scope, receive, send_and_close if crowded else send)

    def _count(self, status: int) -> None:
        if status >= 400 and self._holder.is_open:
            self._holder.services.metrics.errors.labels(str(status)).inc()


async def _last_words(scope: Scope, receive: Receive, send: Send) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            refusal = ShuttingDown(SHUTTING_DOWN, headers={"retry-after": _RETRY_AFTER_S, "connection": "close"})
            await error_response(refusal)(scope, receive, send)


def _busy() -> JSONResponse:
    body = error_object("this server has no room for one more connection", "server_error", "too_many_connections")
    return JSONResponse(body, 503, {"retry-after": _RETRY_AFTER_S})


TARGET_IN_SCOPE = "uniroute.target"
"""Where a route says what it made, which no path names yet."""


class AuditLogMiddleware:
    """Pure ASGI, around the guard, so that what it refuses is seen too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS or not is_admin_side(path_of(scope)):
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
            action, target = action_of(scope["method"], path_of(scope))
            author = Actor(scope.get(PRINCIPAL, ANONYMOUS), scope[REQUEST_IDS].request_id)
            author.log(action, scope.get(TARGET_IN_SCOPE, target), status)
