from __future__ import annotations

from typing import Any

from fastapi import Request

from proxy.server.admin import admin_router, wait_for_version
from proxy.server.admin_bodies import RunTimeSettings
from proxy.server.admin_responses import SettingsInForce, settings_to_json
from proxy.server.dependencies import AdminState
from proxy.server.middleware import TARGET_IN_SCOPE
from proxy.server.openapi import BODY_ERRORS
from proxy.storage.controls import LAMBDA

settings_router = admin_router("settings")


@settings_router.get(
    "",
    summary="What can be set while the server runs",
    description="Each with its value, the one of the configuration, and who set it when.",
    response_model=SettingsInForce,
)
async def get_settings(state: AdminState) -> dict[str, Any]:
    return settings_to_json(state.settings, state.snapshots.current)


@settings_router.put(
    "",
    summary="Set them, in place of the configuration's",
    description="`lambda` is the λ of requests for which nothing else states one. Every process uses it within a"
    " second, and it outlives a restart. What is left out goes back to the configuration.",
    response_model=SettingsInForce,
    responses=BODY_ERRORS,
)
async def put_settings(body: RunTimeSettings, request: Request, state: AdminState) -> dict[str, Any]:
    request.scope[TARGET_IN_SCOPE] = f"{LAMBDA}={body.lambda_:g}"
    await wait_for_version(state, await state.registry.set_lambda(body.lambda_))
    return settings_to_json(state.settings, state.snapshots.current)


@settings_router.delete("", summary="Go back to the configuration", response_model=SettingsInForce)
async def reset_settings(state: AdminState) -> dict[str, Any]:
    await wait_for_version(state, await state.registry.reset_settings())
    return settings_to_json(state.settings, state.snapshots.current)
