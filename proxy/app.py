"""The ASGI app: routes, the guard before them, and every error as JSON. Collaborators come in through Services."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.audited import Audited
from proxy.auth import Guard, path_of
from proxy.edge import TRACE, Edge
from proxy.errors import error_object, plain_error
from proxy.log_lines import LineHandler
from proxy.opening import opened_beside
from proxy.paths import PLAIN_PATHS, meant_path, unknown_path
from proxy.refusing import TOLD, response_of
from proxy.routes.admin import models_router
from proxy.routes.admin_audit import audit_router
from proxy.routes.admin_jobs import jobs_router
from proxy.routes.admin_keys import keys_router
from proxy.routes.chat import Chat
from proxy.routes.chat import router as completions_router
from proxy.routes.models import router as public_router
from proxy.services import Services, ServicesHolder
from proxy.settings.schema import Settings, load_settings

edge_log = logging.getLogger("uniroute.edge")

ROUTERS = (
    *(public_router, completions_router),
    *(models_router, jobs_router, keys_router, audit_router),
)
EXPOSED = (
    *("x-request-id", "x-uniroute-model", "x-uniroute-decision", "x-uniroute-reason", "x-uniroute-overhead-ms"),
    "x-uniroute-max-tokens",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    "retry-after",
)


def create_app(services: Services) -> FastAPI:
    """Over services that somebody else opened and will close."""
    return _build(services.settings, ServicesHolder(services))


def from_environment(environ: Mapping[str, str] | None = None) -> FastAPI:
    """For `uvicorn proxy.app:from_environment --factory`: settings now, services with the app's lifespan."""
    environ = os.environ if environ is None else environ
    configure_logs()
    config = environ.get("UNIROUTE_CONFIG")
    return from_settings(load_settings(Path(config) if config else None, environ), environ)


def from_settings(settings: Settings, environ: Mapping[str, str] | None = None, counts: Path | None = None) -> FastAPI:
    """Services are opened beside the serving, once the server has started it. What was never measured is measured.

    Args:
        environ: where os.environ/NAME is looked up.
        counts: the folder in which several workers count.
    """
    return _build(settings, ServicesHolder(counts=counts), os.environ if environ is None else environ)


def _build(settings: Settings, holder: ServicesHolder, environ: Mapping[str, str] | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if holder.is_open:
            yield
            return
        async with opened_beside(holder, settings, environ or {}):
            yield

    app = Layered(
        title="UniRoute",
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            **dict.fromkeys(TOLD, _told),
            HTTPException: _plain,
        },
    )
    app.state.holder = holder
    app.outermost = _layers(app.framework, settings, holder)
    for router in ROUTERS:
        app.include_router(router)
    return app


class Layered(FastAPI):
    """The framework within our own layers, not around them: its outermost ones cost a chat request, and every event of
    a stream, more than routing does."""

    outermost: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := path_of(scope)) not in PLAIN_PATHS and (meant := meant_path(path)):
            scope["path"] = scope.get("root_path", "") + meant  # before the guard: it decides on what is served
        await (self.framework if scope["type"] == "lifespan" else self.outermost)(scope, receive, send)

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in _methods(path_of(scope)):
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        await super().__call__(scope, receive, send)


def _layers(framework: ASGIApp, settings: Settings, holder: ServicesHolder) -> ASGIApp:
    direct = Chat(framework, holder=holder)
    guarded = Audited(Guard(direct, settings=settings, state=lambda: holder.services.state.current))
    pages = settings.allowed_origins
    if not pages:
        return Edge(guarded, holder=holder)
    cors = CORSMiddleware(
        guarded,
        allow_origins=list(pages),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED),
    )
    return Edge(cors, holder=holder)


async def _told(_: Request, error: Exception) -> Response:
    return response_of(error)


async def _plain(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    method, path = request.scope["method"], path_of(request.scope)
    if error.status_code == 404:
        told = unknown_path(method, path)
        edge_log.info("request=%s status=404: %s", request.scope[TRACE].request_id, told)
        return JSONResponse(error_object(told, "invalid_request_error", "unknown_path"), 404)
    if error.status_code == 405:
        allowed = ", ".join(sorted(_methods(path)))
        told = f"{method[:20]} is not served at {path[:200]}; {allowed} is"
        return JSONResponse(plain_error(405, told), 405, {"allow": allowed})
    return JSONResponse(plain_error(error.status_code, str(error.detail)), error.status_code, error.headers)


def _methods(path: str) -> set[str]:
    """Of all routes of this path, the longest where some hold others; the framework names one route's."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    found = [route for route in routes if route.path_regex.match(path)]
    best = max((route.path for route in found), key=len, default="")
    methods = {method for route in found if route.path == best for method in route.methods or ()}
    return methods | {"HEAD"} if "GET" in methods else methods


def configure_logs() -> None:
    """Lines of ours to stderr, once, unless somebody has arranged for them."""
    ours = logging.getLogger("uniroute")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.addHandler(LineHandler())
        ours.setLevel(logging.INFO)
