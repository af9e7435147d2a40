from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import WithJsonSchema

from proxy.errors import ModelNotFound
from proxy.routing.cost_weight import ALIASES, RoutingMode, key_allows_mode
from proxy.routing.selection_context import ANY, allowed_models
from proxy.server.admin_responses import Count, OpenResponseModel, ResponseModel, one_of
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey
from proxy.server.openapi import COMMON_ERRORS, MODEL_NAME_SCHEMA, UNSET, client_key, errors
from proxy.server.startup import Startup

open_router = APIRouter(tags=["server"], default_response_class=JSONResponse)

keyed_router = APIRouter(
    tags=["server"],
    default_response_class=JSONResponse,
    dependencies=[Depends(client_key)],
    responses=COMMON_ERRORS,
)


class Model(ResponseModel):
    """A model as OpenAI lists it."""

    id: str
    object: Annotated[str, WithJsonSchema({"const": "model"})]
    created: Count
    owned_by: str


class ModelList(ResponseModel):
    object: Annotated[str, WithJsonSchema({"const": "list"})]
    data: list[Model]


class Status(OpenResponseModel):
    """Whether the server can route; while it starts, the steps that are under way."""

    status: str
    state_version: Count = UNSET
    store: Annotated[str, one_of("up", "away")] = UNSET
    provider_lookups: Count = UNSET


@keyed_router.get("/v1/models", summary="The models that this key may use", response_model=ModelList)
async def list_models(state: AppStateDep, key: CurrentKey) -> dict[str, Any]:
    return {"object": "list", "data": list(_models_for(state, key))}


@keyed_router.get("/v1/models/{name:path}", summary="One of them", response_model=Model, responses=errors(404))
async def get_model(
    name: Annotated[str, Path(), WithJsonSchema(MODEL_NAME_SCHEMA)], state: AppStateDep, key: CurrentKey
) -> dict[str, Any]:
    for model in _models_for(state, key):
        if model["id"] == name:
            return model
    if (
        ANY in state.settings.route_names
        and name not in state.snapshots.current.models
        and key_allows_mode(RoutingMode.SCORED, key)
    ):
        return _model(name, 0, "uniroute")
    raise ModelNotFound(f"the model {name[:128]!r} does not exist, or this key may not use it", param="model")


def _models_for(state: AppState, key: CurrentKey) -> Iterator[dict[str, Any]]:
    snapshot = state.snapshots.current
    route_names = (name for name in state.settings.route_names if name != ANY)
    for name in dict.fromkeys((*ALIASES, *route_names)):
        if key_allows_mode(ALIASES.get(name, RoutingMode.SCORED), key):
            yield _model(name, 0, "uniroute")
    for name in allowed_models(snapshot, key):
        yield _model(name, int(snapshot.models[name].created_at), snapshot.models[name].source)


def _model(name: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


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
