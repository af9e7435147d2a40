from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.errors import SHUTDOWN_NOTICE_TIMEOUT_S, error_body
from proxy.json_text import decode_json, encode_json
from proxy.server.api.client_apis import CLIENT_PATHS, COMPACT, MODELS, RESPONSES, speaks_messages
from proxy.server.api.messages_errors import anthropic_error, anthropic_status
from proxy.server.auth import PRINCIPAL, SAFE_METHODS, UNAUTHENTICATED_PATHS, is_admin_side
from proxy.server.requests import (
    APP_STATE,
    DISCONNECT,
    OVERLOADED,
    RECEIVED_AT,
    REQUEST_IDS,
    RequestIds,
    headers_of,
    path_of,
    request_ids_from,
)
from proxy.server.responses import (
    RETRY_AFTER_S,
    error_response,
    http_error_body,
    internal_error_body,
    shutting_down,
    too_many_connections_body,
)
from proxy.server.startup import Startup
from proxy.storage.audit_log import ANONYMOUS, Actor, action_of
from router_core.text import closest_name

log = logging.getLogger("uniroute.edge")

# What is served beside `/v1/models/NAME`, `/v1/responses/ID` and the admin side.
FIXED_PATHS = CLIENT_PATHS | {"/", "/healthz", "/readyz", "/metrics", "/openapi.json"}

_ID_HEADERS = (b"x-request-id", b"traceparent")


class RequestIdsMiddleware:
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
            log.exception("request=%s failed", ids.request_id, extra={"fields": {"request": ids.request_id}})
            if not response_started:
                await JSONResponse(internal_error_body(ids.request_id), 500)(scope, receive, send_with_ids)

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
            full = JSONResponse(too_many_connections_body(), 503, {"retry-after": RETRY_AFTER_S})
            answer = full if overloaded else error_response(self._startup.refusal())
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
            await error_response(shutting_down())(scope, receive, send)


class MessagesMiddleware:
    """Answer clients of Anthropic's API in its shape: the request's id under its name, and errors of every layer.

    It is outside of all layers that answer with errors.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not speaks_messages(path_of(scope), headers_of(scope)):
            await self.app(scope, receive, send)
            return
        response = MessagesResponse(send)
        await self.app(scope, receive, response.send)


class MessagesResponse:
    """Pass on the messages of a response; rewrite the body of an error once it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if (request_id := headers.get("x-request-id")) is not None:
                headers["request-id"] = request_id
            if message["status"] < 400:
                await self._send(message)
            else:
                self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._start)

    async def _send_error(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        body, error = self._body, None
        if headers.get("content-type", "").startswith("application/json"):
            error = decode_json(body).get("error")  # with half characters, if an upstream's words have some
        if error is not None:
            body = encode_json(anthropic_error(error, start["status"], headers.get("x-request-id")))
            start["status"] = anthropic_status(start["status"])
            headers["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


# Key of the scope: what an endpoint has made, which no path names yet.
TARGET_IN_SCOPE = "uniroute.target"

# What it has done, where the method and the path alone do not say it.
ACTION_IN_SCOPE = "uniroute.action"


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
            action = scope.get(ACTION_IN_SCOPE, action)
            actor = Actor(scope.get(PRINCIPAL, ANONYMOUS), scope[REQUEST_IDS].request_id)
            actor.log(action, scope.get(TARGET_IN_SCOPE, target), status)


class HeadMiddleware:
    """Serve HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp, paths: ServedPaths) -> None:
        self.app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in self._paths.methods(path_of(scope)):
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


class ServedPaths:
    """The paths of some routers, with all methods of each: FastAPI itself names those of one route alone."""

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        self._routes: Sequence[APIRoute] = [
            route for router in routers for route in router.routes if isinstance(route, APIRoute)
        ]

    def methods(self, path: str) -> set[str]:
        """Return the methods that are served at `path`; none if it is unknown."""
        found = [route for route in self._routes if route.path_regex.match(path)]
        # /admin/models/{name:path} also matches what /admin/models/{name:path}/profile serves
        longest = max((route.path for route in found), key=lambda pattern: (pattern == path, len(pattern)), default="")
        methods = {method for route in found if route.path == longest for method in route.methods or ()}
        return methods | {"HEAD"} if "GET" in methods else methods

    async def handle_http_exception(self, request: Request, error: Exception) -> Response:
        """Answer what the framework refuses: unknown paths (404) and methods (405)."""
        if not isinstance(error, HTTPException):
            raise error
        method, path = request.scope["method"], path_of(request.scope)
        if error.status_code == 404:
            message = unknown_path_message(method, path)
            request_id = request.scope[REQUEST_IDS].request_id
            fields = {"request": request_id, "status": 404}
            log.info("request=%s status=404: %s", request_id, message, extra={"fields": fields})
            return JSONResponse(error_body(message, "invalid_request_error", "unknown_path"), 404)
        if error.status_code == 405:
            allowed = ", ".join(sorted(self.methods(path)))
            message = f"{method[:20]} is not served at {path[:200]}; {allowed} is"
            return JSONResponse(http_error_body(405, message), 405, {"allow": allowed})
        return JSONResponse(http_error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


_SERVED = (
    f"POST {', '.join(sorted(CLIENT_PATHS - {MODELS}))}; GET {MODELS}, {MODELS}/NAME, {RESPONSES.path}/ID, /healthz,"
    " /readyz, /metrics and /openapi.json; and the admin side under /admin"
)

# Start of a path that another API or a wrong base URL has, and what to do.
_HINTS = {
    "/openai/deployments": "this is Azure's path: use the client for OpenAI itself, with the deployment as `model`",
    "/openai": "the base URL of this server ends in /v1, without /openai",
    "/v1beta": "this is Gemini's API: use a client of OpenAI's or Anthropic's",
    "/api": "this is Ollama's API: use a client of OpenAI's or Anthropic's",
    COMPACT: "only the model that compacts a conversation can read the result; ask for a summary at /v1/responses",
}


def corrected_path(path: str) -> str | None:
    """Return the served path that `path` is, but for doubled slashes, a last slash, and no /v1 or two; else None.

    Admin paths are not corrected: they have one spelling. Dots and encoded slashes are parts of a name.
    """
    if path.startswith(_NAMING_PATHS) and not path.endswith("/"):
        return None
    parts = [part for part in path.split("/") if part]
    plain = "/" + "/".join(parts)
    if plain in FIXED_PATHS:
        return plain
    while parts[:1] == ["v1"]:
        parts = parts[1:]
    if parts[:1] == ["models"] and len(parts) > 1:
        name = path.partition("models")[2].strip("/")
        return f"{MODELS}/{name}"
    versioned = "/v1/" + "/".join(parts)
    return versioned if versioned in CLIENT_PATHS or versioned.startswith(_NAMING_PATHS) else None


# Paths that end in a name or an id.
_NAMING_PATHS = (f"{MODELS}/", f"{RESPONSES.path}/")


def unknown_path_message(method: str, path: str) -> str:
    """Name what was asked for, what is served, and what was probably meant."""
    plain = "/" + "/".join(part for part in path.split("/") if part)
    mistake = next((text for start, text in _HINTS.items() if f"{plain}/".startswith(f"{start}/")), None)
    closest = closest_name(plain, FIXED_PATHS, min_similarity=0.7)
    hint = f"; {mistake}" if mistake else f"; did you mean {closest}?" if closest else ""
    return f"nothing is served at {method[:20]} {path[:200]}{hint}. Served are {_SERVED}"
