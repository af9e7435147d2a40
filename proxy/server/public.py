from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from proxy.server.admin_responses import Count, OpenResponseModel, one_of
from proxy.server.dependencies import AppStateDep
from proxy.server.openapi import COMMON_ERRORS, UNSET, client_key
from proxy.server.startup import Startup

open_router = APIRouter(tags=["server"], default_response_class=JSONResponse)

keyed_router = APIRouter(
    tags=["server"],
    default_response_class=JSONResponse,
    dependencies=[Depends(client_key)],
    responses=COMMON_ERRORS,
)


class Status(OpenResponseModel):
    """Whether the server can route; while it starts, the steps that are under way."""

    status: str
    state_version: Count = UNSET
    store: Annotated[str, one_of("up", "away")] = UNSET
    provider_lookups: Count = UNSET


@open_router.get("/", summary="The server is here", response_model=Status)
async def root() -> Response:
    """Answer clients that look for a server at the base of its address before they send a key."""
    return JSONResponse({"status": "ok"})


@open_router.get("/healthz", summary="The process is up", response_model=Status)
async def healthz() -> Response:
    return JSONResponse({"status": "ok"})


@open_router.get("/readyz", summary="It can route", response_model=Status, responses={503: {"model": Status}})
async def readyz(request: Request) -> Response:
    """Answer 200 once models and keys were read, whatever Redis does later."""
    startup: Startup = request.app.state.startup
    if startup.app_state is None:
        return JSONResponse(startup.to_json(), 503)
    snapshots = startup.app_state.snapshots
    if not snapshots.loaded:
        return JSONResponse({"status": "starting", "under_way": [{"what": "waiting for Redis"}]}, 503)
    store = "up" if snapshots.available else "away"
    status = {"status": "ready", "state_version": snapshots.current.version, "store": store}
    if waiting := startup.app_state.resolver.waiting:
        status["provider_lookups"] = waiting
    return JSONResponse(status)


@keyed_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(state: AppStateDep) -> Response:
    return Response(state.metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})


@keyed_router.get("/openapi.json", summary="This document")
def openapi(request: Request) -> dict[str, Any]:
    # Not async, so that FastAPI calls it in a thread: generating the document takes tenths of a second, once.
    document: dict[str, Any] = request.app.openapi()
    return document
