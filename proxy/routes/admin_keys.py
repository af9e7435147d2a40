"""/admin/keys: making, reading, changing, rotating and revoking client keys. A secret is in one answer, once."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from proxy.audited import TARGET_IN_SCOPE
from proxy.routes.context import AdminServices, json_object, json_object_or_nothing
from proxy.routes.key_bodies import read_grace, read_key_change, read_new_key, shown_key
from proxy.services import Services
from proxy.storage.client_keys import ClientKey
from proxy.storage.redis import StoreUnavailable

keys_router = APIRouter(prefix="/admin/keys")


@keys_router.post("", response_model=None)
async def create_key(request: Request, services: AdminServices) -> Response:
    name, stated = read_new_key(await json_object(request, services), time.time())
    key, secret = await services.registry.keys.create(name, None, stated)
    request.scope[TARGET_IN_SCOPE] = key.id
    return await _with_secret(services, key, secret, 201)


@keys_router.get("", response_model=None)
async def list_keys(services: AdminServices) -> dict[str, Any]:
    """As the store has them, the revoked among them, oldest first."""
    return {"keys": [shown_key(key) for key in await services.registry.keys.listed()]}


@keys_router.post("/{key_id}/rotate", response_model=None)
async def rotate_key(key_id: str, request: Request, services: AdminServices) -> Response:
    grace_s = read_grace(await json_object_or_nothing(request, services))
    key, secret = await services.registry.keys.rotate(key_id, grace_s)
    return await _with_secret(services, key, secret, 200)


@keys_router.get("/{key_id}", response_model=None)
async def get_key(key_id: str, services: AdminServices) -> dict[str, Any]:
    return shown_key(await services.registry.keys.find(key_id))


@keys_router.patch("/{key_id}", response_model=None)
async def change_key(key_id: str, request: Request, services: AdminServices) -> dict[str, Any]:
    stated = read_key_change(await json_object(request, services), time.time())
    key = await services.registry.keys.change(key_id, stated)
    await _refresh_keys(services)
    return shown_key(key)


@keys_router.delete("/{key_id}", response_model=None)
async def revoke_key(key_id: str, services: AdminServices) -> Response:
    """For good: the key stays in the list, so that what it did can be told."""
    await services.registry.keys.revoke(key_id)
    await _refresh_keys(services)
    return Response(status_code=204)


async def _with_secret(services: Services, key: ClientKey, secret: str, status: int) -> Response:
    await _refresh_keys(services)
    return JSONResponse({**shown_key(key), "key": secret}, status, {"cache-control": "no-store"})


async def _refresh_keys(services: Services) -> None:
    """In this process at once. It is stored and thus said, even if the store goes away now."""
    with suppress(StoreUnavailable):
        await services.state.refresh()
