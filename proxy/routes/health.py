"""Is the process up, can it route, and what has it counted. Never calls a model, never waits for Redis."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

from proxy.routes.context import OurServices

router = APIRouter()


@router.get("/healthz", response_model=None)
async def healthz() -> Response:
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=None)
async def readyz(request: Request) -> Response:
    """Ready once a state was read, whatever Redis does later."""
    holder = request.app.state.holder
    if not holder.is_open:
        return JSONResponse(holder.startup.to_json(), 503)
    state = holder.services.state
    if not state.loaded:
        return JSONResponse({"status": "starting", "under_way": [{"what": "waiting for Redis"}]}, 503)
    shown = {"status": "ready", "state_version": state.current.version, "store": "up" if state.available else "away"}
    if waiting := holder.services.resolver.waiting:
        shown["provider_lookups"] = waiting
    return JSONResponse(shown)


@router.get("/metrics", response_model=None)
async def metrics(services: OurServices) -> Response:
    return Response(services.metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})
