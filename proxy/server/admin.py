from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, WithJsonSchema

from proxy.errors import BadRequest, DecisionNotFound, JobNotFound, ModelNotFound
from proxy.profiling.job_store import Job
from proxy.server.admin_bodies import (
    KeyPatch,
    ModelPatch,
    NewKey,
    NewModel,
    PriceBody,
    ProfileDocument,
    ProfileRequest,
    Reprofile,
    Rotation,
    RunTimeSettings,
)
from proxy.server.admin_responses import (
    Accepted,
    AuditEntries,
    DecisionRow,
    Decisions,
    JobOutcomes,
    JobStatus,
    KeptDecision,
    KeyCard,
    KeyCards,
    KeyWithSecret,
    ModelCard,
    ModelCards,
    PastProfiles,
    PricedModel,
    ReportUnderWay,
    SavingsDocument,
    SettingsInForce,
    model_to_json,
    models_to_json,
    settings_to_json,
)
from proxy.server.dependencies import AdminState, AppState, AppStateDep, Audit
from proxy.server.middleware import ACTION_IN_SCOPE, TARGET_IN_SCOPE
from proxy.server.openapi import BODY_ERRORS, COMMON_ERRORS, MODEL_NAME_SCHEMA, admin_key, errors
from proxy.server.strict_bodies import StrictJSONRoute
from proxy.storage.audit_log import CANCEL_JOB, PAUSE_MODEL, PROFILE_MODEL, RESUME_MODEL
from proxy.storage.client_keys import MAX_TAG_CHARS, ClientKey
from proxy.storage.controls import LAMBDA
from proxy.storage.decisions import Cursor, DecisionFilter
from proxy.storage.profile_history import entries_to_json, read_history
from proxy.storage.records import InvalidRecord, ModelRecord, is_unix_time
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import ConfiguredModel, ConflictingWrite, EffortOfModel, ModelExists
from proxy.upstream.direct_target import check_secrets_stay
from proxy.upstream.sse import encode_json


def admin_router(what: str) -> APIRouter:
    return APIRouter(
        prefix=f"/admin/{what}",
        tags=[what],
        route_class=StrictJSONRoute,
        default_response_class=JSONResponse,
        dependencies=[Depends(admin_key)],
        responses=COMMON_ERRORS,
    )


models_router = admin_router("models")

# How often a change of a model is made again from what is stored by then.
MAX_ATTEMPTS = 5

ModelNamePath = Annotated[str, Path(), WithJsonSchema(MODEL_NAME_SCHEMA)]


async def registered_model(name: ModelNamePath, state: AppStateDep) -> ModelRecord:
    """Find a model, also one that another process added a moment ago. Raises ModelNotFound."""
    if name not in state.snapshots.current.models:
        await _refresh(state)
    record = state.snapshots.current.models.get(name)
    if record is None:
        raise ModelNotFound(f"no model named {name[:128]!r} is registered", param="model")
    return record


RegisteredModel = Annotated[ModelRecord, Depends(registered_model)]


async def whole_model(record: RegisteredModel) -> ModelRecord:
    """Refuse an effort, where its model is meant. Raises EffortOfModel."""
    if record.base is not None:
        raise EffortOfModel(f"{record.name!r} is an effort of {record.base!r}, and has no part in this: name the model")
    return record


WholeModel = Annotated[ModelRecord, Depends(whole_model)]


async def changeable_model(record: RegisteredModel) -> ModelRecord:
    """Refuse what is changed elsewhere. Raises ConfiguredModel of the configuration file, and EffortOfModel."""
    await whole_model(record)
    if record.source == "config":
        raise ConfiguredModel(f"the model {record.name!r} is defined in the configuration file; change it there")
    return record


ChangeableModel = Annotated[ModelRecord, Depends(changeable_model)]


@models_router.get("", summary="Every registered model", response_model=ModelCards, response_model_exclude_unset=True)
async def list_models(state: AdminState) -> dict[str, Any]:
    version = state.snapshots.current.version
    return {"models": await models_to_json(state), "state_version": version}


@models_router.post(
    "",
    summary="Add a model while the server runs",
    description="202 with the job that measures the model, or 201 if its profile came with it, or it answers with"
    " embeddings.",
    status_code=201,
    responses={202: {"model": Accepted}, **BODY_ERRORS, **errors(409)},
)
async def add_model(body: NewModel, response: Response, state: AdminState) -> Accepted:
    # stored with its profile or its job, or not at all
    record = body.to_record(state.settings, state.environ, time.time())
    efforts = checked_efforts(record, state)
    if efforts and isinstance(body.profile, ProfileDocument):
        raise BadRequest(
            "a profile is that of one effort: add the model, and hand over one for each of"
            f" {', '.join(each.name for each in efforts)} then",
            param="profile",
        )
    if state.snapshots.embeds(record):
        _refuse_profile(body.profile)
        record = await state.resolver.resolve(record)
        job, version = None, await state.registry.add_model(record)
    elif isinstance(body.profile, ProfileRequest):
        asked = body.profile.with_defaults(state.settings)
        record = await state.resolver.resolve(record)
        job, version = await state.jobs.submit_with_model(record, asked.prompts, asked.max_usd, state.registry)
        response.status_code = 202
    else:
        profile = body.profile.to_profile(state.snapshots.current.cluster_map)
        record = await state.resolver.resolve(record)
        job, version = None, await state.registry.add_model(record, profile, state.settings.recipe)
    await wait_for_version(state, version)
    return Accepted(model=record.name, job=job)


def checked_efforts(record: ModelRecord, state: AppState) -> tuple[ModelRecord, ...]:
    """Return the efforts of a model that is to be stored. Raises BadRequest, or ModelExists of a name."""
    models = state.snapshots.current.models
    if (there := models.get(record.name)) is not None and there.base is not None:
        raise ModelExists(f"{record.name!r} is an effort of the model {there.base!r}; choose another name")
    try:
        efforts = state.snapshots.variants_of(record)
    except InvalidRecord as error:
        raise BadRequest(str(error), param="model_info.effort") from None
    for each in efforts:
        if (taken := models.get(each.name)) is not None and taken.base != record.name:
            raise ModelExists(
                f"a model named {each.name!r} exists, which would be the name of an effort of {record.name!r}: leave"
                " that effort out, or choose another name"
            )
    return efforts


def _refuse_profile(profile: ProfileRequest | ProfileDocument) -> None:
    if isinstance(profile, ProfileDocument):
        raise BadRequest("a model that answers with embeddings has no profile", param="profile")


@models_router.post(
    "/{name:path}/profile",
    summary="Measure it again, or hand over a profile",
    description="The profile before serves until the new one is there.",
    responses={202: {"model": Accepted}, **BODY_ERRORS, **errors(404, 409)},
)
async def reprofile_model(
    record: RegisteredModel, body: Reprofile, response: Response, state: AdminState, audit: Audit
) -> Accepted:
    if state.snapshots.embeds(record):
        raise BadRequest(f"{record.name!r} answers with embeddings, which are not measured", param="profile")
    if isinstance(body.profile, ProfileRequest):
        asked = body.profile.with_defaults(state.settings)
        job = await state.jobs.submit(record.registered_name, asked.prompts, asked.max_usd)
        await audit.record(PROFILE_MODEL, record.registered_name)
        response.status_code = 202
        return Accepted(model=record.registered_name, job=job.id)
    if record.name in state.snapshots.current.efforts:
        names = ", ".join(state.snapshots.current.efforts[record.name])
        raise BadRequest(f"a profile is that of one effort: hand it over for one of {names}", param="profile")
    profile = body.profile.to_profile(state.snapshots.current.cluster_map)
    await wait_for_version(state, await state.registry.put_profile(record, profile, state.settings.recipe))
    return Accepted(model=record.name, job=None)


@models_router.put(
    "/{name:path}/pricing",
    summary="Replace its price",
    response_model=PricedModel,
    response_model_exclude_unset=True,
    responses={**BODY_ERRORS, **errors(404)},
)
async def put_price(record: WholeModel, body: PriceBody, state: AdminState) -> dict[str, Any]:
    version = await state.registry.put_price(record.name, body.to_price(), "admin")
    await wait_for_version(state, version or 0)
    card = await model_to_json(state, record.name, with_profile=False)
    return {"model": record.name, "price": card["price"]}


@models_router.get(
    "/{name:path}/profiles",
    summary="Its last profiles, newest first",
    description="Each with how it differs from the one before. A model whose own name ends so is shown in its place.",
    response_model=PastProfiles | ModelCard,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def get_profiles(name: ModelNamePath, state: AdminState) -> dict[str, Any]:
    if (whole := f"{name}/profiles") in state.snapshots.current.models:
        return await get_model(whole, state)
    await registered_model(name, state)
    return {"model": name, "profiles": await past_profiles(state, name)}


async def past_profiles(state: AppState, name: str) -> list[dict[str, Any]]:
    """Return the last profiles of a model as they are shown. Raises StoreUnavailable."""
    cluster_map = state.snapshots.current.cluster_map
    return entries_to_json(await read_history(state.store, name), cluster_map.id, cluster_map.names)


@models_router.get(
    "/{name:path}",
    summary="A model with its price and profile",
    response_model=ModelCard,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def get_model(name: ModelNamePath, state: AdminState) -> dict[str, Any]:
    if state.snapshots.available:
        await _refresh(state)  # a client that saw its job end finds the profile in use
    await registered_model(name, state)
    return await model_to_json(state, name, with_profile=True)


# Who sends no body to a model that is not there is told that, and not that the body is missing.
NO_CHANGE = ModelPatch()


@models_router.patch(
    "/{name:path}",
    summary="Change what is stated of it, or pause it",
    description="After a change of litellm_params the model has to be measured again: its profile is no longer used,"
    " and the job that measures it is cancelled. `paused` leaves the model out of traffic until it is false again; it"
    " may be stated of a model of the configuration file too.",
    response_model=ModelCard,
    response_model_exclude_unset=True,
    responses={**BODY_ERRORS, **errors(404, 409)},
)
async def change_model(
    record: RegisteredModel, request: Request, state: AdminState, body: ModelPatch = NO_CHANGE
) -> dict[str, Any]:
    name = record.name
    if "paused" in body.model_fields_set:
        request.scope[ACTION_IN_SCOPE] = PAUSE_MODEL if body.paused else RESUME_MODEL
        await set_paused(record, state, paused=body.paused)
        return await model_to_json(state, name, with_profile=False)
    await changeable_model(record)
    before, changed, version = await _update(state, name, body)
    if changed.litellm_params != before.litellm_params:  # also another key: the old one may have been what was wrong
        state.health.reset(name)
    if changed.fingerprint != before.fingerprint:
        for each in state.snapshots.current.with_efforts((name,)):
            state.traffic_stats.forget(each)
        await state.jobs.cancel_for(name, "litellm_params were changed; profile the model again")
    await wait_for_version(state, version)
    return await model_to_json(state, name, with_profile=False)


@models_router.delete(
    "/{name:path}", summary="Remove it", status_code=204, response_class=Response, responses=errors(404, 409)
)
async def remove_model(record: ChangeableModel, state: AdminState) -> None:
    await state.jobs.cancel_for(record.name, "the model was removed")
    efforts = state.snapshots.current.efforts.get(record.name, ())
    version = await state.registry.remove_model(record.name, efforts)
    for name in (record.name, *efforts):
        state.traffic_stats.forget(name)
    state.health.reset(record.name)
    await wait_for_version(state, version)


async def set_paused(record: ModelRecord, state: AppState, *, paused: bool) -> None:
    """Pause a model, also one of the configuration file, or let it go on."""
    await wait_for_version(state, await state.registry.pause_model(record.name, paused=paused, effort_of=record.base))


async def _update(state: AppState, name: str, patch: ModelPatch) -> tuple[ModelRecord, ModelRecord, int]:
    """Change a model, and return its record before and after, and the version that made it so.

    It is changed from what is stored now, not from what this process saw last: a change that another process has just
    acknowledged stays.
    """
    for _ in range(MAX_ATTEMPTS):
        await state.snapshots.refresh()
        as_of = state.snapshots.current.version
        record = await changeable_model(await registered_model(name, state))
        changed = await state.resolver.resolve(patch.apply_to(record, state.settings, state.environ))
        checked_efforts(changed, state)
        check_secrets_stay(record, changed, patch.litellm_params or {})
        with suppress(ConflictingWrite):
            return record, changed, await state.registry.update_model(changed, as_of=as_of)
    raise ConflictingWrite(f"{name!r} is being changed by others all the time; repeat the request")


async def wait_for_version(state: AppState, version: int) -> None:
    """Let this process serve what was written. It is stored, whether or not the store goes away now."""
    with suppress(StoreUnavailable):
        await state.snapshots.wait_for_version(version)


async def _refresh(state: AppState) -> None:
    with suppress(StoreUnavailable):
        await state.snapshots.refresh()


keys_router = admin_router("keys")

_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[A-Za-z0-9_-]+$"}

KeyIdPath = Annotated[str, Path(), WithJsonSchema(_ID_SCHEMA)]

NO_GRACE = Rotation()


@keys_router.get("", summary="Every client key", response_model=KeyCards)
async def list_keys(state: AdminState) -> dict[str, Any]:
    # from the store, with those that are revoked, oldest first
    return {"keys": [key.public_fields() for key in await state.registry.keys.listed()]}


@keys_router.post(
    "",
    summary="Make a client key; its secret is shown once",
    status_code=201,
    response_model=KeyWithSecret,
    responses=BODY_ERRORS,
)
async def create_key(body: NewKey, request: Request, response: Response, state: AdminState) -> dict[str, Any]:
    key, secret = await state.registry.keys.create(body.name, None, body.to_change(time.time()))
    request.scope[TARGET_IN_SCOPE] = key.id
    return await _with_secret(state, response, key, secret)


@keys_router.post(
    "/{key_id}/rotate",
    summary="Give it a new secret, shown once",
    response_model=KeyWithSecret,
    responses={**BODY_ERRORS, **errors(404, 409)},
)
async def rotate_key(
    key_id: KeyIdPath, response: Response, state: AdminState, body: Rotation = NO_GRACE
) -> dict[str, Any]:
    key, secret = await state.registry.keys.rotate(key_id, body.grace_s)
    return await _with_secret(state, response, key, secret)


@keys_router.get("/{key_id}", summary="A client key", response_model=KeyCard, responses=errors(404))
async def get_key(key_id: KeyIdPath, state: AdminState) -> dict[str, Any]:
    return (await state.registry.keys.find(key_id)).public_fields()


@keys_router.patch(
    "/{key_id}", summary="Change it", response_model=KeyCard, responses={**BODY_ERRORS, **errors(404, 409)}
)
async def change_key(key_id: KeyIdPath, body: KeyPatch, state: AdminState) -> dict[str, Any]:
    key = await state.registry.keys.change(key_id, body.to_change(time.time()))
    await _refresh(state)
    return key.public_fields()


@keys_router.delete(
    "/{key_id}",
    summary="Revoke it, for good",
    description="The key stays in the list, so that what it did can be told.",
    status_code=204,
    response_class=Response,
    responses=errors(404, 409),
)
async def revoke_key(key_id: KeyIdPath, state: AdminState) -> None:
    await state.registry.keys.revoke(key_id)
    await _refresh(state)


async def _with_secret(state: AppState, response: Response, key: ClientKey, secret: str) -> dict[str, Any]:
    await _refresh(state)
    response.headers["cache-control"] = "no-store"
    return {**key.public_fields(), "key": secret}


jobs_router = admin_router("jobs")

JobIdPath = Annotated[str, Path(), WithJsonSchema(_ID_SCHEMA)]


async def known_job(job_id: JobIdPath, state: AppStateDep) -> Job:
    """Find a job. Raises JobNotFound."""
    job = await state.jobs.get(job_id)
    if job is None:
        raise JobNotFound(f"no job has the id {job_id[:100]!r}", param="job")
    return job


KnownJob = Annotated[Job, Depends(known_job)]


@jobs_router.get(
    "/{job_id}",
    summary="How far measuring is",
    description="With a `warning` if it is ready and no model gets anything right.",
    response_model=JobStatus,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def get_job(job: KnownJob, state: AppStateDep) -> dict[str, Any]:
    return _job_to_json(job, state)


@jobs_router.get(
    "/{job_id}/outcomes",
    summary="Its graded answers",
    description="Those so far, as lines of an outcomes file, for as long as the job itself can be read.",
    response_model=JobOutcomes,
    responses=errors(404),
)
async def get_outcomes(job: KnownJob, state: AppStateDep) -> dict[str, Any]:
    return {"outcomes": await state.jobs.outcomes(job.id)}


@jobs_router.delete(
    "/{job_id}",
    summary="Stop it",
    description="Answers with the job as it is after that; a finished one stays as it was.",
    response_model=JobStatus,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def cancel_job(job: KnownJob, state: AppStateDep, audit: Audit) -> dict[str, Any]:
    if await state.jobs.cancel(job.id):
        await audit.record(CANCEL_JOB, job.id)
    return _job_to_json(await known_job(job.id, state), state)


def _job_to_json(job: Job, state: AppState) -> dict[str, Any]:
    doubt = state.snapshots.current.measuring_doubt
    return {**job.to_json(), **({"warning": doubt} if job.state == "ready" and doubt else {})}


audit_router = admin_router("audit")

MAX_AUDIT_ENTRIES = 1000


def _entry_count(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_AUDIT_ENTRIES:
        return int(text)
    raise BadRequest(f"`limit` must be a whole number from 1 to {MAX_AUDIT_ENTRIES}, stated once", param="limit")


EntryCount = Annotated[
    int,
    Query(),
    BeforeValidator(_entry_count),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_AUDIT_ENTRIES}),
]


@audit_router.get("", summary="Who changed what, newest first", response_model=AuditEntries)
async def get_audit(request: Request, audit: Audit, limit: EntryCount = 100) -> Response:
    if len(request.query_params.getlist("limit")) > 1:
        _entry_count("")
    # Not validated: a line that another program wrote is shown as it is.
    return JSONResponse({"entries": await audit.latest(limit)})


decisions_router = admin_router("decisions")

DecisionIdPath = Annotated[str, Path(), WithJsonSchema(_ID_SCHEMA)]

_MAX_FILTER_CHARS = 128

Wanted = Annotated[str | None, Query(min_length=1, max_length=_MAX_FILTER_CHARS)]

_TIME_SCHEMA = {"type": "string", "description": "RFC 3339 with a zone, or Unix seconds."}


def _moment(text: str | None) -> float | None:
    """Read a time of the query. Raises ValueError, as pydantic expects it."""
    if text is None:
        return None
    try:
        at = float(text)
    except ValueError:
        stated = datetime.fromisoformat(text)
        if stated.tzinfo is None:
            raise ValueError("needs its zone, as 2027-01-31T00:00:00Z") from None
        at = stated.timestamp()
    if not is_unix_time(at):
        raise ValueError("must be a time in RFC 3339, or Unix seconds")
    return at


Moment = Annotated[float | None, Query(), BeforeValidator(_moment), WithJsonSchema(_TIME_SCHEMA)]


async def decision_filter(
    model: Wanted = None,
    key: Wanted = None,
    tag: Annotated[str | None, Query(min_length=1, max_length=MAX_TAG_CHARS)] = None,
    ending: Wanted = None,
    reason: Wanted = None,
    since: Moment = None,
    until: Moment = None,
) -> DecisionFilter:
    return DecisionFilter(model, key, tag, ending, reason, since, until)


WantedDecisions = Annotated[DecisionFilter, Depends(decision_filter)]


@decisions_router.get(
    "",
    summary="The decisions that asked a model, newest first",
    description="`next`, if it is not null, is the `cursor` of the next page; a page may be short and have one. With"
    " `format=jsonl` every decision is whole, one a line, and the cursor is in the header `x-uniroute-next`.",
    response_model=Decisions,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
async def list_decisions(
    state: AdminState,
    wanted: WantedDecisions,
    limit: EntryCount = 100,
    cursor: Wanted = None,
    format: Literal["json", "jsonl"] = "json",  # noqa: A002  its name in the query
) -> Response:
    after = None if cursor is None else Cursor.parse(cursor)
    if cursor is not None and after is None:
        raise BadRequest("`cursor` must be the `next` of another page", param="cursor")
    page = await state.decisions.page(limit, wanted, after)
    following = None if page.next is None else str(page.next)
    if format == "jsonl":
        lines = b"".join(encode_json(decision) + b"\n" for decision in page.decisions)
        headers = {} if following is None else {"x-uniroute-next": following}
        return Response(lines, media_type="application/jsonl", headers=headers)
    rows = [{name: decision[name] for name in _ROW_FIELDS} for decision in page.decisions]
    return JSONResponse({"decisions": rows, "next": following})


_ROW_FIELDS = tuple(DecisionRow.model_fields)


@decisions_router.get(
    "/{decision_id}",
    summary="One decision, whole: candidates, attempts, times, usage, cost",
    response_model=KeptDecision,
    responses=errors(404),
)
async def get_decision(decision_id: DecisionIdPath, state: AdminState) -> Response:
    decision = await state.decisions.find(decision_id)
    if decision is None:
        raise DecisionNotFound(f"no decision is kept with the id {decision_id[:100]!r}", param="decision")
    return JSONResponse(decision)


reports_router = admin_router("report")

# How long a call waits for a report.
REPORT_WAIT_S = 5.0


@reports_router.get(
    "",
    summary="What was spent and saved, and whether quality held",
    description="Made from the decisions that are kept. While it is made, the answer is a 202: ask again.",
    response_model=SavingsDocument,
    responses={202: {"model": ReportUnderWay, "description": "It is being made"}},
)
async def get_report(state: AdminState, wanted: WantedDecisions) -> Response:
    report, decisions = await state.reports.get(state, wanted, REPORT_WAIT_S)
    if report is None:
        return JSONResponse({"decisions": decisions}, 202, {"retry-after": "1"})
    return JSONResponse(report)


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
