from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from proxy.errors import (
    SHUTDOWN_NOTICE_TIMEOUT_S,
    APIError,
    ClientDisconnected,
    release_frames,
)
from proxy.json_text import encode_json
from proxy.server.api.messages_errors import anthropic_error, anthropic_status
from proxy.server.auth import RequestAuthorizer, check_role
from proxy.server.completions import Answer, Handler
from proxy.server.exchange import JSON, ASGIExchange, Exchange
from proxy.server.requests import OVERLOADED
from proxy.server.responses import (
    HANDLED_EXCEPTIONS,
    RETRY_AFTER_S,
    internal_error_body,
    render_error,
    shutting_down,
    too_many_connections_body,
)
from proxy.server.startup import Startup

log = logging.getLogger("uniroute.edge")


class ModelEndpoints:
    """Serve requests at the paths of `endpoints`: `__call__` those under ASGI, and `serve` whatever carries them."""

    def __init__(self, endpoints: Mapping[str, Handler], startup: Startup, authorizer: RequestAuthorizer) -> None:
        self._endpoints = endpoints
        self.startup = startup
        self._authorizer = authorizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = ASGIExchange(scope, receive, send)
        if OVERLOADED in scope:
            # Before any key is checked, as for all paths but those of probes.
            headers = {"retry-after": RETRY_AFTER_S, "connection": "close"}
            await self._refuse(exchange, 503, too_many_connections_body(), headers)
            return
        await self.serve(exchange)

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request; whatever fails on the way is answered too."""
        try:
            answer = await self._answer(exchange)
            if answer is not None:
                await answer.send(exchange)
        except asyncio.CancelledError:
            if exchange.disconnect is None:
                raise
            # The task serves this request alone, and its cancellation means that the server ends.
            if not exchange.started:
                await self._say_shutting_down(exchange)
        except Exception:  # the only broad one: nothing of what failed may reach the client
            request_id = exchange.ids.request_id
            log.exception("request=%s failed", request_id, extra={"fields": {"request": request_id}})
            if not exchange.started:
                await self._refuse(exchange, 500, internal_error_body(request_id))

    async def _answer(self, exchange: Exchange) -> Answer | None:
        """Let the request in, and return what is left to be sent; None: it was answered, maybe with an error."""
        app = self.startup.app_state
        try:
            if app is None:  # before any key is checked: no keys are known yet
                raise self.startup.refusal()
            caller = self._authorizer.authenticate(exchange.path, exchange.headers)
            check_role(caller, "POST", exchange.path)
        except APIError as error:
            await self._refuse(exchange, *await self._authorizer.refusal(error))
            return None
        try:
            return await self._endpoints[exchange.path](exchange, app, caller.key)
        except ClientDisconnected:
            if not exchange.started:
                self._count(499)
                await exchange.send(499, {}, b"")  # for servers that do not notice
        except HANDLED_EXCEPTIONS as error:
            if exchange.started:
                raise
            await self._refuse(exchange, *render_error(error))
            release_frames(error)
        return None

    async def _refuse(
        self, exchange: Exchange, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """Send an error, in the shape of the client's API."""
        self._count(status)
        if exchange.expects_messages and (error := body.get("error")) is not None:
            body = anthropic_error(error, status, exchange.ids.request_id)
            status = anthropic_status(status)
        await exchange.send(status, {"content-type": JSON, **(headers or {})}, encode_json(body))

    def _count(self, status: int) -> None:
        if (app := self.startup.app_state) is not None:
            app.metrics.errors.labels(str(status)).inc()

    async def _say_shutting_down(self, exchange: Exchange) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_NOTICE_TIMEOUT_S):
                await self._refuse(exchange, *render_error(shutting_down()))
