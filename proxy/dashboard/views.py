"""What the page shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import HTMLResponse, RedirectResponse, StreamingResponse

from proxy.dashboard.activity import MAX_SAMPLES
from proxy.dashboard.answers import answers_to, shown_prompts
from proxy.dashboard.page import (
    MAX_WAIT_S,
    Form,
    SessionDep,
    StillWorking,
    app_state_of,
    base_of,
    dashboard_of,
    render,
    render_text,
    static_files,
)
from proxy.dashboard.page import DashboardRoute as Route
from proxy.dashboard.pictures import BarChart, RateInterval, bar_chart, heat_map, history_chart
from proxy.dashboard.sessions import Session
from proxy.dashboard.traffic import traffic_view
from proxy.errors import BadRequest, DecisionNotFound, ModelNotFound, ServiceUnavailable
from proxy.server.admin import get_model, list_keys, list_models, past_profiles, registered_model
from proxy.server.admin_responses import model_to_json
from proxy.server.auth import DASHBOARD
from proxy.server.dependencies import AppState
from proxy.server.startup import Startup
from proxy.storage.client_keys import MAX_LAMBDA
from proxy.storage.decisions import DecisionFilter, Page
from proxy.storage.feedback import MAX_P, TEST
from proxy.storage.redis import StoreUnavailable
from proxy.storage.savings import GROUPINGS, coverage_in_words, quality_in_words
from proxy.storage.snapshot import RoutingSnapshot
from proxy.storage.usage_writer import read_key_totals
from router_core.decision import wilson_interval

# Rows of the list on the first view.
MAX_LATEST = 20

# Days that savings are summed over.
PERIODS = ("1", "7", "30")

router = APIRouter(prefix=DASHBOARD, include_in_schema=False, route_class=Route, default_response_class=HTMLResponse)

EVENT_INTERVAL_S = 2.0

# A stream ends after so long, and the browser opens another: the end of the server waits for what is open.
MAX_STREAM_S = 20.0

MAX_STREAMS = 64

StateDep = Annotated[AppState, Depends(app_state_of)]


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    found = static_files().get(name)
    if found is None:
        return Response(status_code=404)
    raw, media_type, etag = found
    headers = {"etag": etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(raw, headers=headers, media_type=media_type)


@router.get("/")
async def at_the_slash(request: Request) -> Response:
    return RedirectResponse(base_of(request), 303)


@router.get("")
async def now(request: Request, session: SessionDep, state: StateDep) -> Response:
    try:
        page = await state.decisions.page(MAX_LATEST)
    except StoreUnavailable:  # the rest of the page needs no store
        page = Page([], None)
    return render(request, "now.html", session, **_now(request, state), decisions=page.decisions)


@router.get("/decision")
async def decision(request: Request, session: SessionDep, state: StateDep, id: str = "") -> Response:  # noqa: A002
    """Show one decision, whole. Raises StoreUnavailable, DecisionNotFound."""
    found = await state.decisions.find(id)
    if found is None:
        raise DecisionNotFound(f"no decision is kept with the id {id[:100]!r}", param="id")
    return render(request, "decision.html", session, found=found, steps=_timeline(found))


@router.get("/savings")
async def savings(request: Request, session: SessionDep, state: StateDep) -> Response:
    by, days = request.query_params.get("by", ""), request.query_params.get("days", "")
    by, days = by if by in GROUPINGS else "model", days if days in PERIODS else "7"
    found = await savings_of(state, int(days))
    return render(
        request,
        "savings.html",
        session,
        found=found,
        words=quality_in_words(found["total"]),
        covered=coverage_in_words(found),
        groupings=(by,),
        every_grouping=GROUPINGS,
        days=days,
        periods=PERIODS,
    )


async def savings_of(state: AppState, days: int) -> Mapping[str, Any]:
    """Return the report of so many days, which may be some seconds old. Raises StoreUnavailable, StillWorking."""
    wanted = DecisionFilter(since=time.time() - days * 86_400)
    report, _ = await state.reports.get(state, wanted, MAX_WAIT_S, name=days)
    if report is None:
        raise StillWorking
    return report


def _timeline(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the steps of a request that have a time, in seconds since it was received."""
    times = found["times"]
    asked = [(f"{each['model']} was asked", each["started_s"]) for each in found["attempts"]]
    steps = [
        ("received", 0.0),
        ("chosen", times["chosen_s"]),
        *asked,
        ("first content", times["first_content_s"]),
        ("end", times["ended_s"]),
    ]
    return [(name, at) for name, at in steps if at is not None]


@router.get("/now/events")
async def now_events(request: Request, session: SessionDep, state: StateDep) -> Response:
    async def text() -> str:
        return render_text(request, "now_live.html", session, **_now(request, state))

    return _events(request, text)


def _now(request: Request, state: AppState) -> dict[str, Any]:
    figures = dashboard_of(request).activity.figures(state.metrics)
    snapshot = state.snapshots.current
    health = {name: state.health.status(snapshot.models[name].registered_name) for name in sorted(snapshot.models)}
    chart: BarChart = bar_chart(figures.course, MAX_SAMPLES - 1, "requests a second")
    return {
        "figures": figures,
        "chart": chart,
        "health": health,
        "states": {name: snapshot.model_state(name) for name in health},
        "in_flight": state.metrics.in_flight,
        "version": snapshot.version,
        "paused": snapshot.paused,
        "default": snapshot.default_lambda(state.settings),
        "override": snapshot.lambda_override,
    }


@router.get("/models")
async def models(request: Request, session: SessionDep, state: StateDep) -> Response:
    return await models_page(request, session, state)


async def models_page(
    request: Request,
    session: Session,
    state: AppState,
    *,
    status: int = 200,
    problem: str | None = None,
    form: Form | None = None,
) -> Response:
    """Show all models. `problem`: why a form was refused, which is shown again."""
    snapshot = state.snapshots.current
    cards = (await list_models(state))["models"]
    rates = rates_of(snapshot)
    order = np.argsort([np.mean([rate.error for rate in row]) for row in rates.values()], kind="stable")
    names = [list(rates)[row] for row in order]
    clusters = _clusters_by_error(rates, snapshot)
    picture = heat_map(
        names, [snapshot.cluster_map.names[k] for k in clusters], [[rates[name][k] for k in clusters] for name in names]
    )
    return render(
        request,
        "models.html",
        session,
        status=status,
        problem=problem,
        form=form or {},
        cards=cards,
        rates=rates,
        names=names,
        clusters=[(k, snapshot.cluster_map.names[k]) for k in clusters],
        picture=picture,
        defaults=state.settings.profile,
        traffic=await traffic_view(state),
    )


@router.get("/models/events")
async def model_events(request: Request, session: SessionDep, state: StateDep) -> Response:
    async def text() -> str:
        return render_text(request, "models_live.html", session, cards=(await list_models(state))["models"])

    return _events(request, text)


def rates_of(snapshot: RoutingSnapshot) -> dict[str, list[RateInterval]]:
    """Return the (K,) rates of each profiled model that routing goes by, with their intervals, by name."""
    found = {}
    for name in sorted(snapshot.profiles):
        row = snapshot.pool.index[name]
        errors, labels = snapshot.pool.errors[row], snapshot.pool.label_weights[row]
        columns = (errors, *wilson_interval(errors, labels), snapshot.profiles[name].labels)
        found[name] = [RateInterval(*map(float, values)) for values in zip(*columns, strict=True)]
    return found


def _clusters_by_error(rates: Mapping[str, Sequence[RateInterval]], snapshot: RoutingSnapshot) -> list[int]:
    """Return the clusters, those that models get wrong least first."""
    if not rates:
        return list(range(snapshot.cluster_map.size))
    means = np.mean([[rate.error for rate in row] for row in rates.values()], axis=0)
    return [int(k) for k in np.argsort(means, kind="stable")]


@dataclass(frozen=True, slots=True)
class ClusterRate:
    """How one model does in one cluster, beside the others."""

    cluster: int
    name: str
    rate: RateInterval
    ahead: float | None
    """How much fewer errors it makes than the others do on average; None: there is no other."""
    output_tokens: float
    seconds: float


@router.get("/model")
async def model(request: Request, session: SessionDep, state: StateDep) -> Response:
    return await model_page(request, session, state, request.query_params.get("name", ""))


async def model_page(
    request: Request, session: Session, state: AppState, name: str, *, status: int = 200, problem: str | None = None
) -> Response:
    """Show one model. Raises ModelNotFound."""
    card = await get_model(name, state)
    snapshot = state.snapshots.current
    rows = cluster_rates(snapshot, name) if name in snapshot.profiles else []
    ranked = sorted((row for row in rows if row.ahead is not None), key=lambda row: -(row.ahead or 0.0))
    price = snapshot.prices.get(name)
    history = await _history_of(state, name)
    return render(
        request,
        "model.html",
        session,
        status=status,
        problem=problem,
        name=name,
        card=card,
        rows=rows,
        strengths=[row for row in ranked[:5] if (row.ahead or 0.0) > 0],
        weaknesses=[row for row in ranked[::-1][:5] if (row.ahead or 0.0) < 0],
        price=price,
        profile=snapshot.profiles.get(name),
        history=history,
        history_picture=history_chart(history or ()),
        history_test=TEST,
        history_level=MAX_P,
        defaults=state.settings.profile,
    )


async def _history_of(state: AppState, name: str) -> list[dict[str, Any]] | None:
    """Return the last profiles of a model, the newest first; None: the store is away."""
    if not state.snapshots.available:
        return None
    try:
        return await past_profiles(state, name)
    except StoreUnavailable:
        return None


@router.get("/model/events")
async def model_progress(request: Request, session: SessionDep, state: StateDep) -> Response:
    name = request.query_params.get("name", "")
    await registered_model(name, state)

    async def text() -> str:
        card = await model_to_json(state, name, with_profile=False)
        return render_text(request, "model_live.html", session, name=name, card=card)

    return _events(request, text)


def cluster_rates(snapshot: RoutingSnapshot, name: str) -> list[ClusterRate]:
    """Return how a profiled model does in every cluster."""
    rates, row = rates_of(snapshot), snapshot.pool.index[name]
    others = [[rate.error for rate in found] for other, found in rates.items() if other != name]
    means = np.mean(others, axis=0) if others else None
    return [
        ClusterRate(
            cluster=k,
            name=snapshot.cluster_map.names[k],
            rate=rate,
            ahead=None if means is None else float(means[k] - rate.error),
            output_tokens=float(snapshot.pool.output_tokens[row, k]),
            seconds=float(snapshot.pool.seconds[row, k]),
        )
        for k, rate in enumerate(rates[name])
    ]


# Prompts of a cluster that are shown, the nearest first, and the least share of a prompt that makes it one of them.
MAX_PROMPTS, MIN_SHARE = 40, 0.1


@router.get("/cluster")
async def cluster(request: Request, session: SessionDep, state: StateDep) -> Response:
    snapshot = state.snapshots.current
    number = _cluster_number(request.query_params.get("id", ""), snapshot)
    assigned = await dashboard_of(request).slow_work.result("prompts", state.jobs.validation_prompts)
    shares = assigned.assignment.dense(assigned.clusters)[:, number]
    nearest = [int(row) for row in np.argsort(-shares, kind="stable")[:MAX_PROMPTS] if shares[row] >= MIN_SHARE]
    prompts = [(assigned.prompts[row], float(shares[row])) for row in nearest]
    answers = await answers_to(state, [prompt for prompt, _ in prompts])
    rates = rates_of(snapshot)
    return render(
        request,
        "cluster.html",
        session,
        number=number,
        name=snapshot.cluster_map.names[number],
        rates={name: found[number] for name, found in rates.items()},
        prompts=await asyncio.to_thread(shown_prompts, prompts, answers),
        in_all=int((shares >= MIN_SHARE).sum()),
        answered_by=list(answers),
    )


def _cluster_number(text: str, snapshot: RoutingSnapshot) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < snapshot.cluster_map.size:
        return int(text)
    raise ModelNotFound(f"this map has no cluster {text[:40]!r}; its clusters are 0 to {snapshot.cluster_map.size - 1}")


def lambda_of(text: str) -> float:
    """Return a λ as people write it. Raises BadRequest."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_LAMBDA:
        raise BadRequest(f"λ must be a number from 0 to {MAX_LAMBDA:g}; got {text[:40]!r}", param="lambda")
    return value


@router.get("/explain")
async def explain(request: Request, session: SessionDep, state: StateDep) -> Response:
    return render(
        request,
        "explain.html",
        session,
        problem=None,
        text="",
        stated="",
        found=None,
        default=state.snapshots.current.default_lambda(state.settings),
    )


@router.get("/keys")
async def keys(request: Request, session: SessionDep, state: StateDep) -> Response:
    return await keys_page(request, session, state)


async def keys_page(
    request: Request,
    session: Session,
    state: AppState,
    *,
    status: int = 200,
    problem: str | None = None,
    form: Form | None = None,
    made: Mapping[str, Any] | None = None,
) -> Response:
    """List the keys. `made`: the key that was created just now, with its secret. Raises StoreUnavailable."""
    cards = (await list_keys(state))["keys"]
    totals = await read_key_totals(state.store, [card["id"] for card in cards])
    return render(
        request,
        "keys.html",
        session,
        status=status,
        problem=problem,
        form=form or {},
        made=made,
        cards=sorted(cards, key=lambda card: card["revoked"]),
        totals=totals,
        models=sorted(state.snapshots.current.models),
    )


Text = Callable[[], Awaitable[str]]


def _events(request: Request, text: Text) -> Response:
    dashboard = dashboard_of(request)
    if dashboard.open_streams >= MAX_STREAMS:
        raise ServiceUnavailable("too many pages are open here; this one is not kept up to date")
    return StreamingResponse(_stream(request, text), media_type="text/event-stream")


async def _stream(request: Request, text: Text) -> AsyncIterator[bytes]:
    """Send a part of the page now and then, for as long as the session lasts."""
    dashboard = dashboard_of(request)
    startup: Startup = request.app.state.startup
    end, store = time.monotonic() + MAX_STREAM_S, app_state_of(request).store
    dashboard.open_streams += 1
    try:
        yield b"retry: 1000\n\n"
        while time.monotonic() < end and not startup.shutting_down and await dashboard.sessions.find(request, store):
            lines = (await text()).splitlines()
            yield "".join([*(f"data: {line}\n" for line in lines if line.strip()), "\n"]).encode()
            await asyncio.sleep(EVENT_INTERVAL_S)
    finally:
        dashboard.open_streams -= 1
