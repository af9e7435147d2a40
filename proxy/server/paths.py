from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import error_body
from proxy.server.auth import path_of
from proxy.server.requests import REQUEST_IDS
from proxy.server.responses import http_error_body
from router_core.text import closest_name

log = logging.getLogger("uniroute.edge")

CHAT, MODELS, ROUTE = "/v1/chat/completions", "/v1/models", "/v1/route"

# What is served beside `/v1/models/NAME` and the admin side.
FIXED_PATHS = frozenset({CHAT, MODELS, ROUTE, "/healthz", "/readyz", "/metrics", "/openapi.json"})

_SERVED = (
    f"POST {CHAT} and {ROUTE}; GET {MODELS}, {MODELS}/NAME, /healthz, /readyz, /metrics and /openapi.json;"
    " and the admin side under /admin"
)

# Start of a path that another API or a wrong base URL has, and what to do.
_HINTS = {
    "/openai/deployments": "this is Azure's path: use the client for OpenAI itself, with the deployment as `model`",
    "/openai": "the base URL of this server ends in /v1, without /openai",
    "/v1/v1": "the client adds /v1 to a base URL that has it already: give it once",
    "/v1/messages": "this is Anthropic's API: use a client of OpenAI's chat completions",
    "/v1/responses": "only OpenAI's chat completions are served: choose that API in the client",
    "/v1/completions": "only OpenAI's chat completions are served: choose that API in the client",
    "/v1/embeddings": "models are asked for chat completions alone; embeddings need another server",
    "/v1beta": "this is Gemini's API: use a client of OpenAI's chat completions",
    "/api": "this is Ollama's API: use a client of OpenAI's chat completions",
}


def corrected_path(path: str) -> str | None:
    """Return the served path that `path` is, but for doubled slashes, a last slash or a missing /v1; else None.

    Admin paths are not corrected: they have one spelling. Dots and encoded slashes are parts of a name.
    """
    if path.startswith(f"{MODELS}/") and not path.endswith("/"):
        return None
    parts = [part for part in path.split("/") if part]
    plain = "/" + "/".join(parts)
    if plain in FIXED_PATHS:
        return plain
    below_v1 = parts[1:] if parts[:1] == ["v1"] else parts
    if below_v1[:1] == ["models"] and len(below_v1) > 1:
        name = path.partition("models")[2].strip("/")
        return f"{MODELS}/{name}"
    versioned = "/v1/" + "/".join(below_v1)
    return versioned if versioned in (CHAT, MODELS, ROUTE) else None


def unknown_path_message(method: str, path: str) -> str:
    """Name what was asked for, what is served, and what was probably meant."""
    plain = "/" + "/".join(part for part in path.split("/") if part)
    mistake = next((text for start, text in _HINTS.items() if f"{plain}/".startswith(f"{start}/")), None)
    closest = closest_name(plain, FIXED_PATHS, min_similarity=0.7)
    hint = f"; {mistake}" if mistake else f"; did you mean {closest}?" if closest else ""
    return f"nothing is served at {method[:20]} {path[:200]}{hint}. Served are {_SERVED}"


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
        longest = max((route.path for route in found), key=len, default="")
        methods = {method for route in found if route.path == longest for method in route.methods or ()}
        return methods | {"HEAD"} if "GET" in methods else methods

    async def handle_http_exception(self, request: Request, error: Exception) -> Response:
        """Answer what the framework refuses: unknown paths (404) and methods (405)."""
        if not isinstance(error, HTTPException):
            raise error
        method, path = request.scope["method"], path_of(request.scope)
        if error.status_code == 404:
            message = unknown_path_message(method, path)
            log.info("request=%s status=404: %s", request.scope[REQUEST_IDS].request_id, message)
            return JSONResponse(error_body(message, "invalid_request_error", "unknown_path"), 404)
        if error.status_code == 405:
            allowed = ", ".join(sorted(self.methods(path)))
            message = f"{method[:20]} is not served at {path[:200]}; {allowed} is"
            return JSONResponse(http_error_body(405, message), 405, {"allow": allowed})
        return JSONResponse(http_error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


class HeadMiddleware:
    """Serve HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp, paths: ServedPaths) -> None:
        self.app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in self._paths.methods(path_of(scope)):
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)
