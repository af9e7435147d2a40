from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from proxy.errors import BadRequest, JobNotFound, ModelNotFound
from proxy.profiling.job import Job
from proxy.server.admin_schemas import (
    ProfileRequest,
    key_to_json,
    model_to_json,
    models_to_json,
    parse_grace_period,
    read_addition,
    read_key_change,
    read_new_key,
    read_patch,
    read_price,
    read_profile,
)
from proxy.server.dependencies import AdminState, AppState, AppStateDep, Audit, json_object, json_object_or_nothing
from proxy.server.middleware import TARGET_IN_SCOPE
from proxy.storage.audit_log import CANCEL_JOB, PROFILE_MODEL
from proxy.storage.client_keys import ClientKey
from proxy.storage.models import ModelRecord
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import ConfiguredModel, ConflictingWrite
from proxy.upstream.origins import check_secrets_stay

models_router = APIRouter(prefix="/admin/models")

ATTEMPTS = 5


@models_router.post("", response_model=None)
async def add_model(request: Request, services: AdminState) -> Response:
    """202 with the job that measures it, or 201 where its profile came along. Stored with either, or not at all."""
    body = await json_object(request, services)
    cluster_map = services.state.current.cluster_map
    addition = read_addition(body, services.settings, services.environ, cluster_map, time.time())
    record = await services.resolver.resolve(addition.record)
    profile = addition.profile
    if isinstance(profile, ProfileRequest):
        job, version = await services.jobs.submit_with_model(
            record, profile.prompts, profile.max_usd, services.registry
        )
        await _take_effect(services, version)
        return JSONResponse({"model": record.name, "job": job}, 202)
    await _take_effect(services, await services.registry.add_model(record, profile))
    return JSONResponse({"model": record.name, "job": None}, 201)


@models_router.get("", response_model=None)
async def list_models(services: AdminState) -> dict[str, Any]:
    version = services.state.current.version
    return {"models": await models_to_json(services), "state_version": version}


@models_router.post("/{name:path}/profile", response_model=None)
async def reprofile_model(name: str, request: Request, services: AdminState, audit: Audit) -> Response:
    """Ask the model again, or put a ready profile in place of its own. The old one serves until then."""
    record = await _record(services, name)
    body = await json_object(request, services)
    stated = body.get("profile", body)
    profile = read_profile(stated, services.settings, services.state.current.cluster_map)
    reply = await _profile(services, record, profile)
    if isinstance(profile, ProfileRequest):
        await audit.record(PROFILE_MODEL, name)
    return reply


@models_router.put("/{name:path}/pricing", response_model=None)
async def put_price(name: str, request: Request, services: AdminState) -> dict[str, Any]:
    await _record(services, name)
    price = read_price(await json_object(request, services))
    version = await services.registry.put_price(name, price, "admin")
    await _take_effect(services, version or 0)
    card = await model_to_json(services, name, with_profile=False)
    return {"model": name, "price": card["price"]}


@models_router.get("/{name:path}", response_model=None)
async def get_model(name: str, services: AdminState) -> dict[str, Any]:
    """As it is now: whoever saw its job end finds its profile in use."""
    if services.state.available:
        with suppress(StoreUnavailable):
            await services.state.refresh()
    await _record(services, name)
    return await model_to_json(services, name, with_profile=True)


@models_router.patch("/{name:path}", response_model=None)
async def change_model(name: str, request: Request, services: AdminState) -> dict[str, Any]:
    """A change of litellm_params sets the profile aside, and ends the job that measures it: it is another arm now."""
    stated = await json_object(request, services)
    before, changed, version = await _changed(services, name, stated)
    if changed.litellm_params != before.litellm_params:  # also another key: it may be what was wrong
        services.health.forget(name)
    if changed.fingerprint != before.fingerprint:
        services.live.forget(name)
        await services.jobs.cancel_for(name, "litellm_params were changed; profile the model again")
    await _take_effect(services, version)
    return await model_to_json(services, name, with_profile=False)


@models_router.delete("/{name:path}", response_model=None)
async def remove_model(name: str, services: AdminState) -> Response:
    """Requests that the model serves already are finished; a job that measures it is cancelled."""
    _not_configured(await _record(services, name))
    await services.jobs.cancel_for(name, "the model was removed")
    version = await services.registry.remove_model(name)
    services.live.forget(name)
    services.health.forget(name)
    await _take_effect(services, version)
    return Response(status_code=204)


async def _take_effect(services: AppState, version: int) -> None:
    """In this process at once. It is stored and thus said, even if the store goes away now."""
    with suppress(StoreUnavailable):
        await services.state.wait_for_version(version)


async def _profile(services: AppState, record: ModelRecord, profile: ProfileRequest | Any) -> Response:
    if isinstance(profile, ProfileRequest):
        job = await services.jobs.submit(record.name, profile.prompts, profile.max_usd)
        return JSONResponse({"model": record.name, "job": job.id}, 202)
    await _take_effect(services, await services.registry.put_profile(record, profile))
    return JSONResponse({"model": record.name, "job": None})


async def _changed(services: AppState, name: str, stated: Mapping[str, Any]) -> tuple[ModelRecord, ModelRecord, int]:
    """The record before and after, and the version that made it so. Made from what is stored now, not from what this
    process saw last: a change that another process has just acknowledged stays."""
    for _ in range(ATTEMPTS):
        await services.state.refresh()
        as_of = services.state.current.version
        record = await _record(services, name)
        _not_configured(record)
        changed = await services.resolver.resolve(read_patch(stated, record, services.settings, services.environ))
        check_secrets_stay(record, changed, stated.get("litellm_params") or {})
        with suppress(ConflictingWrite):
            return record, changed, await services.registry.update_model(changed, as_of=as_of)
    raise ConflictingWrite(f"{name!r} is being changed by others all the time; repeat the request")


async def _record(services: AppState, name: str) -> ModelRecord:
    """Also of a model that another process added a moment ago."""
    if name not in services.state.current.models:
        with suppress(StoreUnavailable):
            await services.state.refresh()
    record = services.state.current.models.get(name)
    if record is None:
        raise ModelNotFound(f"no model named {name[:128]!r} is registered", param="model")
    return record


def _not_configured(record: ModelRecord) -> None:
    if record.source == "config":
        raise ConfiguredModel(f"the model {record.name!r} is defined in the configuration file; change it there")


keys_router = APIRouter(prefix="/admin/keys")


@keys_router.post("", response_model=None)
async def create_key(request: Request, services: AdminState) -> Response:
    name, stated = read_new_key(await json_object(request, services), time.time())
    key, secret = await services.registry.keys.create(name, None, stated)
    request.scope[TARGET_IN_SCOPE] = key.id
    return await _with_secret(services, key, secret, 201)


@keys_router.get("", response_model=None)
async def list_keys(services: AdminState) -> dict[str, Any]:
    """As the store has them, the revoked among them, oldest first."""
    return {"keys": [key_to_json(key) for key in await services.registry.keys.listed()]}


@keys_router.post("/{key_id}/rotate", response_model=None)
async def rotate_key(key_id: str, request: Request, services: AdminState) -> Response:
    grace_s = parse_grace_period(await json_object_or_nothing(request, services))
    key, secret = await services.registry.keys.rotate(key_id, grace_s)
    return await _with_secret(services, key, secret, 200)


@keys_router.get("/{key_id}", response_model=None)
async def get_key(key_id: str, services: AdminState) -> dict[str, Any]:
    return key_to_json(await services.registry.keys.find(key_id))


@keys_router.patch("/{key_id}", response_model=None)
async def change_key(key_id: str, request: Request, services: AdminState) -> dict[str, Any]:
    stated = read_key_change(await json_object(request, services), time.time())
    key = await services.registry.keys.change(key_id, stated)
    await _refresh_keys(services)
    return key_to_json(key)


@keys_router.delete("/{key_id}", response_model=None)
async def revoke_key(key_id: str, services: AdminState) -> Response:
    """For good: the key stays in the list, so that what it did can be told."""
    await services.registry.keys.revoke(key_id)
    await _refresh_keys(services)
    return Response(status_code=204)


async def _with_secret(services: AppState, key: ClientKey, secret: str, status: int) -> Response:
    await _refresh_keys(services)
    return JSONResponse({**key_to_json(key), "key": secret}, status, {"cache-control": "no-store"})


async def _refresh_keys(services: AppState) -> None:
    """In this process at once. It is stored and thus said, even if the store goes away now."""
    with suppress(StoreUnavailable):
        await services.state.refresh()


jobs_router = APIRouter(prefix="/admin/jobs")


@jobs_router.get("/{job_id}", response_model=None)
async def get_job(job_id: str, services: AppStateDep) -> dict[str, Any]:
    """With a `warning` where it is ready and no model gets anything right."""
    job = await _job(job_id, services)
    shown: dict[str, Any] = job.to_json()
    doubt = services.state.current.measuring_doubt
    return {**shown, "warning": doubt} if job.state == "ready" and doubt else shown


@jobs_router.get("/{job_id}/outcomes", response_model=None)
async def get_outcomes(job_id: str, services: AppStateDep) -> dict[str, Any]:
    """The graded answers so far, as lines of an outcomes file, for as long as the job itself can be read."""
    await _job(job_id, services)
    return {"outcomes": await services.jobs.outcomes(job_id)}


@jobs_router.delete("/{job_id}", response_model=None)
async def cancel_job(job_id: str, services: AppStateDep, audit: Audit) -> dict[str, Any]:
    """The job as it is after that; a finished one stays as it was."""
    await _job(job_id, services)
    if await services.jobs.cancel(job_id):
        await audit.record(CANCEL_JOB, job_id)
    return await get_job(job_id, services)


async def _job(job_id: str, services: AppStateDep) -> Job:
    job = await services.jobs.get(job_id)
    if job is None:
        raise JobNotFound(f"no job has the id {job_id[:100]!r}", param="job")
    return job


audit_router = APIRouter(prefix="/admin/audit")

_SHOWN = 100

_MAX_SHOWN = 1000


@audit_router.get("", response_model=None)
async def get_audit(request: Request, audit: Audit) -> dict[str, Any]:
    return {"entries": await audit.latest(_limit(request.query_params.getlist("limit")))}


def _limit(stated: list[str]) -> int:
    text = stated[0] if len(stated) == 1 else "" if stated else str(_SHOWN)
    if text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= _MAX_SHOWN:
        return int(text)
    raise BadRequest(f"`limit` must be a whole number from 1 to {_MAX_SHOWN}, stated once", param="limit")
