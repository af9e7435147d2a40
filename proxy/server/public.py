from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

from proxy.errors import ModelNotFound
from proxy.routing.candidates import ALIASES, ANY, RoutingMode, allowed_models, key_allows_mode
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey
from proxy.server.openapi import document
from proxy.upstream.sse import encode_json

router = APIRouter()


@router.get("/v1/models")
async def list_models(services: AppStateDep, key: CurrentKey) -> dict[str, Any]:
    return {"object": "list", "data": list(_listed(services, key))}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, services: AppStateDep, key: CurrentKey) -> dict[str, Any]:
    for model in _listed(services, key):
        if model["id"] == name:
            return model
    if (
        ANY in services.settings.route_names
        and name not in services.state.current.models
        and key_allows_mode(RoutingMode.SCORED, key)
    ):
        return _model(name, 0, "uniroute")
    raise ModelNotFound(f"the model {name[:128]!r} does not exist, or this key may not use it", param="model")


def _listed(services: AppState, key: CurrentKey) -> Iterator[dict[str, Any]]:
    state = services.state.current
    usable = allowed_models(state, key)
    routed = dict.fromkeys((*ALIASES, *(name for name in services.settings.route_names if name != ANY)))
    for name in routed:
        if not key_allows_mode(ALIASES.get(name, RoutingMode.SCORED), key):
            continue
        yield _model(name, 0, "uniroute")
    for name in usable:
        yield _model(name, int(state.models[name].created_at), state.models[name].source)


def _model(name: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


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
async def metrics(services: AppStateDep) -> Response:
    return Response(services.metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/openapi.json", response_model=None)
async def openapi() -> Response:
    return Response(encode_json(document()), media_type="application/json")
