"""The outermost layer: request ids on every response, 503 to whoever is one too many, and any failure as a 500."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.auth import OPEN_PATHS, path_of
from proxy.errors import error_object
from proxy.head import head_of
from proxy.refusing import response_of
from proxy.trace import Trace, trace_of

if TYPE_CHECKING:
    from proxy.services import ServicesHolder

log = logging.getLogger("uniroute.edge")

TRACE = "uniroute.trace"
ARRIVED = "uniroute.arrived"
"""Monotonic seconds."""
CROWDED = "uniroute.crowded"
"""In the scope where the connection is one more than this process has room for."""
_IDS = (b"x-request-id", b"traceparent")
_RETRY_AFTER_S = "1"


def _state(message: Message, trace: Trace) -> None:
    headers = message.setdefault("headers", [])
    if isinstance(headers, list) and not any(name in _IDS for name, _ in headers):
        headers += trace.raw_headers
    else:
        MutableHeaders(scope=message).update(trace.headers())


class Edge:
    """Pure ASGI."""

    def __init__(self, app: ASGIApp, holder: ServicesHolder) -> None:
        self.app = app
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = scope[TRACE] = trace_of(head_of(scope))
        scope[ARRIVED] = time.monotonic()
        started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _state(message, trace)
                self._count(message["status"])
            await send(message)

        if scope.get(CROWDED):
            await self._crowded(scope, receive, send_with_ids)
            return
        if not self._holder.is_open and path_of(scope) not in OPEN_PATHS:
            # before any key is looked at: nobody knows yet which there are
            await response_of(self._holder.startup.refusal())(scope, receive, send_with_ids)
            return
        try:
            await self.app(scope, receive, send_with_ids)
        except Exception:  # the outermost, and the only one: nothing of it may reach the caller
            log.exception("request=%s failed", trace.request_id)
            if not started:
                message = f"an error of ours, logged under request id {trace.request_id}"
                body = error_object(message, "server_error", "internal_error")
                await JSONResponse(body, 500)(scope, receive, send_with_ids)

    async def _crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A probe must not take a full process for a dead one."""

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send_and_close)
            return
        body = error_object("this server has no room for one more connection", "server_error", "too_many_connections")
        busy = JSONResponse(body, 503, {"retry-after": _RETRY_AFTER_S})
        await busy(scope, receive, send_and_close)

    def _count(self, status: int) -> None:
        if status >= 400 and self._holder.is_open:
            self._holder.services.metrics.errors.labels(str(status)).inc()
