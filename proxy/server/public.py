from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

from proxy.errors import UnknownName
from proxy.routing.candidates import ALIASES, ANY, Way, may_ask, usable_models
from proxy.server.dependencies import Caller, OurServices, Services
from proxy.server.openapi import document
from proxy.upstream.sse import dump

router = APIRouter()


@router.get("/v1/models")
async def list_models(services: OurServices, key: Caller) -> dict[str, Any]:
    return {"object": "list", "data": list(_listed(services, key))}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, services: OurServices, key: Caller) -> dict[str, Any]:
    for model in _listed(services, key):
        if model["id"] == name:
            return model
    if ANY in services.settings.route_names and name not in services.state.current.models and may_ask(Way.SCORED, key):
        return _model(name, 0, "uniroute")
    raise UnknownName(f"the model {name[:128]!r} does not exist, or this key may not use it", param="model")


def _listed(services: Services, key: Caller) -> Iterator[dict[str, Any]]:
    state = services.state.current
    usable = usable_models(state, key)
    routed = dict.fromkeys((*ALIASES, *(name for name in services.settings.route_names if name != ANY)))
    for name in routed:
        if not may_ask(ALIASES.get(name, Way.SCORED), key):
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
async def metrics(services: OurServices) -> Response:
    return Response(services.metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/openapi.json", response_model=None)
async def openapi() -> Response:
    return Response(dump(document()), media_type="application/json")
