"""GET /v1/models in OpenAI's shape: the names that ask for routing, and the models that this key may use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter

from proxy.errors import UnknownName
from proxy.routes.context import Caller, OurServices
from proxy.routing.candidates import ALIASES, ANY, Way, may_ask, usable_models
from proxy.services import Services

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
