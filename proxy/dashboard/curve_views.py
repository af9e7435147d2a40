"""The curve, and the default λ that is set from it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse, RedirectResponse

from proxy.dashboard.actions import perform, writing
from proxy.dashboard.curve import DrawnCurve, traffic_of
from proxy.dashboard.page import DashboardRoute, SessionDep, WriterForm, base_of, dashboard_of, render
from proxy.dashboard.pictures import curve_chart
from proxy.dashboard.views import StateDep, lambda_of
from proxy.errors import Conflict
from proxy.server import admin
from proxy.server.admin_bodies import RunTimeSettings
from proxy.server.auth import DASHBOARD
from proxy.server.dependencies import AppState
from proxy.server.strict_bodies import parse_body
from proxy.storage.audit_log import CHANGE_SETTINGS, RESET_SETTINGS
from proxy.storage.controls import LAMBDA
from router_core.errors import InvalidInput, NoEligibleModel

router = APIRouter(
    prefix=DASHBOARD, include_in_schema=False, route_class=DashboardRoute, default_response_class=HTMLResponse
)


def _default_of(state: AppState) -> dict[str, Any]:
    """Return the default λ, and where it comes from."""
    snapshot = state.snapshots.current
    return {
        "default": snapshot.default_lambda(state.settings),
        "override": snapshot.lambda_override,
        "configured": state.settings.lambda_,
    }


@router.get("/curve")
async def curve(request: Request, session: SessionDep, state: StateDep) -> Response:
    shown = _default_of(state)
    try:
        drawn = await _drawn(request, state)
    except (NoEligibleModel, InvalidInput) as error:
        return render(request, "curve.html", session, problem=str(error), drawn=None, **shown)
    chosen = _chosen_lambda(request)
    today = await asyncio.to_thread(drawn.curve.at, shown["default"])
    point = today if chosen is None else await asyncio.to_thread(drawn.curve.at, chosen)
    return render(
        request,
        "curve.html",
        session,
        problem=None,
        drawn=drawn,
        picture=curve_chart(drawn, today, None if chosen is None else point),
        point=point,
        today=today,
        nearest=min(range(len(drawn.points)), key=lambda place: abs(drawn.points[place].lambda_ - point.lambda_)),
        **shown,
    )


@router.get("/curve/point")
async def curve_point(request: Request, session: SessionDep, state: StateDep) -> Response:
    """Answer the slider with a part of the page."""
    drawn = await _drawn(request, state)
    chosen, shown = _chosen_lambda(request), _default_of(state)
    default: float = shown["default"]
    today, point = await asyncio.to_thread(
        lambda: (drawn.curve.at(default), drawn.curve.at(default if chosen is None else chosen))
    )
    return render(request, "curve_point.html", session, point=point, today=today, **shown)


@router.get("/curve/change")
async def curve_change(request: Request, session: SessionDep, state: StateDep) -> Response:
    """Show what another default λ would change, before it is set. Without a λ: what going back would change."""
    shown = _default_of(state)
    stated = _chosen_lambda(request)
    chosen: float = shown["configured"] if stated is None else stated
    points = None
    try:
        drawn = await _drawn(request, state)
        points = await asyncio.to_thread(lambda: (drawn.curve.at(shown["default"]), drawn.curve.at(chosen)))
    except (NoEligibleModel, InvalidInput):  # λ can be set before there is a curve
        pass
    return render(request, "curve_change.html", session, chosen=chosen, back=stated is None, points=points, **shown)


@router.post("/curve/change")
async def change_lambda(request: Request, session: SessionDep, form: WriterForm) -> Response:
    """Set the default λ, or go back to the configuration's. Raises Conflict if another was shown as the present one."""
    state, stated = writing(request), form.get("lambda", "").strip()

    async def change() -> None:
        now = state.snapshots.current.default_lambda(state.settings)
        if form.get("before", "") != f"{now:.17g}":
            raise Conflict(f"λ was changed to {now:g} meanwhile; look again at what your change would do")
        if stated:
            body = parse_body(RunTimeSettings, {LAMBDA: lambda_of(stated)})
            await admin.put_settings(body, request, state)
        else:
            await admin.reset_settings(state)

    status, problem, _ = await perform(request, CHANGE_SETTINGS if stated else RESET_SETTINGS, "", change)
    if problem is not None:
        return render(request, "error.html", session, status=status, problem=problem)
    return RedirectResponse(f"{base_of(request)}/curve", 303)


async def _drawn(request: Request, state: AppState) -> DrawnCurve:
    dashboard = dashboard_of(request)
    sample = dashboard.activity.sample(state.metrics)
    traffic = traffic_of(state.traffic_stats, sample.requests, sample.prompt_tokens)
    return await dashboard.slow_work.result("curve", lambda: dashboard.curves.current(state, traffic))


def _chosen_lambda(request: Request) -> float | None:
    stated = request.query_params.get("lambda", "").strip()
    return lambda_of(stated) if stated else None
