from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, model_validator

from proxy.errors import BadRequest, DecisionNotFound, Forbidden, RateLimited
from proxy.server.admin_responses import Amount, Count, OpenResponseModel, ResponseModel, one_of
from proxy.server.api.client_apis import FEEDBACK
from proxy.server.auth import PRINCIPAL
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey
from proxy.server.openapi import BODY_ERRORS, COMMON_ERRORS, UNSET, client_key, errors
from proxy.server.startup import Startup
from proxy.server.strict_bodies import StrictBody, StrictJSONRoute
from proxy.storage.audit_log import ROOT
from proxy.storage.feedback import Labels, owner_of
from proxy.storage.snapshot import RoutingSnapshot

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


feedback_router = APIRouter(
    tags=["feedback"],
    route_class=StrictJSONRoute,
    default_response_class=JSONResponse,
    dependencies=[Depends(client_key)],
    responses=COMMON_ERRORS,
)

# A decision can be read within this time of its end.
MAX_POLLS, POLL_INTERVAL_S = 6, 0.25

_DECISION = re.compile(r"dec-[0-9a-f]{32}")

_RETRY_AFTER_S = "60"


class FeedbackBody(StrictBody):
    """How good the answer of one decision was, from 0 to 1. null takes back what was said before."""

    decision: Annotated[str, Field(strict=True, min_length=1, max_length=128)]
    score: Annotated[float, Field(strict=True, ge=0, le=1)] | None
    source: Annotated[str, Field(strict=True, min_length=1, max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _require_score(cls, document: Any) -> Any:
        if isinstance(document, Mapping) and "score" not in document:  # else it would be taken back by mistake
            raise BadRequest(
                "`score` is missing: a number from 0 to 1, or null to take back what was said", param="score"
            )
        return document


class FeedbackReply(ResponseModel):
    """`labels`: how many labels of the model it counts as, at most 1; `why` says why it is none."""

    decision: str
    score: Amount | None
    labels: Amount
    why: str | None


@feedback_router.post(
    FEEDBACK,
    summary="Say how good an answer was",
    description="The last word counts. A client key speaks of its own decisions, an admin key of all.",
    response_model=FeedbackReply,
    responses={**BODY_ERRORS, **errors(404, 429)},
)
async def give_feedback(body: FeedbackBody, request: Request, state: AppStateDep, key: CurrentKey) -> FeedbackReply:
    if state.settings.feedback == "off":
        raise Forbidden("feedback is off (setting `feedback`)")
    who = request.scope[PRINCIPAL]
    decision = await _find_decision(state, body.decision)
    may_speak = who == ROOT or (key is not None and key.role == "admin")
    if decision is None or not (may_speak or decision["key"] == (None if key is None else key.id)):
        message = f"no decision of this key is kept with the id {body.decision[:100]!r}"
        raise DecisionNotFound(message, param="decision")
    labels, why, said = None, None, None
    if body.score is not None:
        said = {"score": body.score, "source": body.source, "at": time.time()}
        labels, why = _labels_of(decision, body.score, state.snapshots.current)
    counted = await state.feedback.give(body.decision, decision["model"], who, said, labels)
    state.metrics.feedback.add((_outcome_of(body.score, counted),))
    if counted is None:
        message = f"this key has given feedback {state.settings.feedback_per_minute} times in this minute"
        raise RateLimited(message, headers={"retry-after": _RETRY_AFTER_S})
    if labels is not None and not counted:
        why = "the key's labels of this model in these clusters are used up (feedback_labels_per_key)"
    return FeedbackReply(decision=body.decision, score=body.score, labels=counted, why=why)


def _outcome_of(score: float | None, counted: float | None) -> str:
    """Return the value of the label `outcome` in the metrics."""
    if counted is None:
        return "refused"
    return "withdrawn" if score is None else "counted" if counted else "uncounted"


async def _find_decision(state: AppState, decision: str) -> dict[str, Any] | None:
    """Find a decision, also one whose answer has just ended: its record is on the way to Redis then."""
    for _ in range(MAX_POLLS if _DECISION.fullmatch(decision) else 0):
        if (found := await state.decisions.find(decision)) is not None:
            return found
        await asyncio.sleep(POLL_INTERVAL_S)
    return await state.decisions.find(decision)


def _labels_of(
    decision: Mapping[str, Any], score: float, snapshot: RoutingSnapshot
) -> tuple[Labels | None, str | None]:
    """Return what a score says of the model that answered, or why it says nothing of it."""
    record = snapshot.models.get(decision["model"])
    if decision["ending"] != "complete":
        return None, "the answer was not whole"
    if not decision["clusters"]:
        return None, "the clusters of the prompt are not known"
    if record is None or record.name not in snapshot.profiles:
        return None, "the model has no profile"
    if (decision["fingerprint"], decision["map"]) != (record.fingerprint, snapshot.cluster_map.id):
        return None, "the model, or the cluster map, was changed since"
    weights = {cluster["id"]: cluster["weight"] for cluster in decision["clusters"]}
    expected = decision["expected_error"]
    if expected is None:  # it answered in the place of others, and was not among the best
        rates = snapshot.profiles[record.name].errors()
        expected = float(sum(weight * rates[cluster] for cluster, weight in weights.items()))
    hour = int(datetime.fromisoformat(decision["ended_at"]).timestamp() // 3600)
    owner = owner_of(decision["map"], record.fingerprint)
    return Labels(owner, 1 - score, weights, min(max(expected, 0.0), 1.0), hour), None
