"""What the page changes, through the functions of the admin API: checks, errors and audit lines are the same."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse, RedirectResponse

from proxy.dashboard.page import (
    DashboardRoute,
    Form,
    FormDep,
    SessionDep,
    WriterForm,
    actor_of,
    app_state_of,
    base_of,
    dashboard_of,
    problem_of,
    read_form,
    render,
)
from proxy.dashboard.sessions import COOKIE, Session, check_form, set_cookie
from proxy.dashboard.views import StateDep, keys_page, lambda_of, model_page, models_page
from proxy.errors import BadRequest, Unauthenticated
from proxy.json_text import encode_json
from proxy.routing.chat_request import parse_chat, parse_object
from proxy.routing.selection import Selection, selection_to_json
from proxy.server import admin
from proxy.server.admin_bodies import NewKey, NewModel, PriceBody, Reprofile
from proxy.server.auth import DASHBOARD
from proxy.server.completions import select
from proxy.server.dependencies import AppState, RequestContext
from proxy.server.middleware import TARGET_IN_SCOPE
from proxy.server.requests import RECEIVED_AT, REQUEST_IDS
from proxy.server.responses import HANDLED_EXCEPTIONS
from proxy.server.strict_bodies import parse_body
from proxy.settings.effort import efforts_of_text
from proxy.storage.audit_log import (
    ADD_MODEL,
    CREATE_KEY,
    PAUSE_MODEL,
    PRICE_MODEL,
    PROFILE_MODEL,
    REMOVE_MODEL,
    RESUME_MODEL,
    REVOKE_KEY,
    Actor,
    AuditTrail,
)
from router_core.scoring import TIE_TOLERANCE

router = APIRouter(
    prefix=DASHBOARD, include_in_schema=False, route_class=DashboardRoute, default_response_class=HTMLResponse
)

MILLION = Decimal(10**6)

WRONG_KEY = "this key opens nothing here"


@router.get("/login")
async def login_form(request: Request) -> Response:
    session = await dashboard_of(request).sessions.find(request, app_state_of(request).store)
    if session is not None and session.logged_in:
        return RedirectResponse(base_of(request), 303)
    return _login_page(request)


@router.post("/login")
async def login(request: Request) -> Response:
    """Exchange a key for a session. A wrong one is answered as slowly as the API answers it."""
    dashboard = dashboard_of(request)
    form = await read_form(request)
    before = dashboard.sessions.check(request.cookies.get(COOKIE, ""))
    if before is None:
        return _login_page(request, 403, "cookies are needed here, and this browser sent none: try again")
    check_form(before, request, form.get("token", ""))
    secret = form.get("key", "").strip().encode("utf-8", "replace")
    try:
        principal = dashboard.authenticator.authenticate(secret)
    except Unauthenticated:
        await dashboard.authenticator.throttle.delay()
        return _login_page(request, 401, WRONG_KEY)
    if principal.key is not None and principal.key.role == "client":
        return _login_page(request, 403, "a key of the role client opens nothing here: ask for one of the role viewer")
    digest = dashboard.authenticator.root_digest if principal.key is None else principal.key.digest
    _, cookie = dashboard.sessions.open(principal, digest or "")
    Actor(principal.id, request.scope[REQUEST_IDS].request_id).log("dashboard.login", "-", 303)
    response = RedirectResponse(base_of(request), 303)
    set_cookie(response, request, cookie)
    return response


def _login_page(request: Request, status: int = 200, problem: str | None = None) -> Response:
    session, cookie = dashboard_of(request).sessions.open_anonymous()
    response = render(request, "login.html", session, status=status, problem=problem)
    set_cookie(response, request, cookie)
    return response


@router.post("/logout")
async def logout(request: Request, session: SessionDep, _: FormDep, state: StateDep) -> Response:
    await dashboard_of(request).sessions.end(session, state.store)
    response = RedirectResponse(f"{base_of(request)}/login", 303)
    set_cookie(response, request, None)
    return response


async def perform(
    request: Request, action: str, target: str, act: Callable[[], Awaitable[Any]]
) -> tuple[int, str | None, Any]:
    """Change something, and log it as the API logs it. Return the status, what is wrong, and what `act` returned."""
    status, problem, result = 200, None, None
    try:
        result = await act()
    except HANDLED_EXCEPTIONS as error:
        status, problem, _ = problem_of(error)
    actor_of(request).log(action, request.scope.get(TARGET_IN_SCOPE, target), status)
    return status, problem, result


def writing(request: Request) -> AppState:
    """Return the app's state with a registry whose writes are logged as this session's."""
    state = app_state_of(request)
    return replace(state, registry=state.registry.as_actor(actor_of(request)))


@router.post("/models")
async def add_model(request: Request, session: SessionDep, form: WriterForm) -> Response:
    state = writing(request)

    async def act() -> Any:
        return await admin.add_model(parse_body(NewModel, _new_model(form)), Response(), state)

    status, problem, _ = await perform(request, ADD_MODEL, form.get("model_name", ""), act)
    if problem is not None:
        return await models_page(request, session, state, status=status, problem=problem, form=form)
    return _to_model(request, form["model_name"])


def _new_model(form: Form) -> dict[str, Any]:
    params = {name: form[name].strip() for name in ("model", "api_base", "api_key") if form.get(name, "").strip()}
    info: dict[str, Any] = {
        name: price
        for name in ("input_cost_per_token", "output_cost_per_token")
        if (price := _per_token(form, name)) is not None
    }
    if stated := form.get("effort", "").strip():
        info["effort"] = efforts_of_text(stated)
    profile = _profile_request(form)
    return {
        "model_name": form.get("model_name", "").strip(),
        "litellm_params": params,
        **({"model_info": info} if info else {}),
        **({"profile": profile} if profile else {}),
    }


def _profile_request(form: Form) -> dict[str, Any]:
    prompts, max_usd = _number(form, "prompts"), _number(form, "max_usd")
    stated = {"prompts": None if prompts is None else _whole(prompts), "max_usd": max_usd}
    return {name: value for name, value in stated.items() if value is not None}


def _number(form: Form, name: str) -> float | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise BadRequest(f"`{name}` must be a number; got {text[:40]!r}", param=name) from None


def _whole(value: float) -> float:
    """Return 20 in place of 20.0; the checks of the API refuse the rest in words of their own."""
    return int(value) if value.is_integer() else value


def _per_token(form: Form, name: str) -> float | None:
    """Return a price that is written in USD for a million tokens."""
    text = form.get(name, "").strip()
    if not text:
        return None
    try:
        return float(Decimal(text) / MILLION)
    except InvalidOperation:
        raise BadRequest(f"`{name}` must be USD for a million tokens; got {text[:40]!r}", param=name) from None


def _to_model(request: Request, name: str) -> Response:
    return RedirectResponse(f"{base_of(request)}/model?{urlencode({'name': name})}", 303)


@router.post("/model/profile")
async def profile_model(request: Request, session: SessionDep, form: WriterForm) -> Response:
    async def act(state: AppState, name: str) -> Any:
        record = await admin.registered_model(name, state)
        body = parse_body(Reprofile, {"profile": _profile_request(form)})
        return await admin.reprofile_model(record, body, Response(), state, AuditTrail(state.store, actor_of(request)))

    return await _change_model(request, session, form, PROFILE_MODEL, act)


@router.post("/model/price")
async def price_model(request: Request, session: SessionDep, form: WriterForm) -> Response:
    async def act(state: AppState, name: str) -> Any:
        record = await admin.registered_model(name, state)
        current = state.snapshots.current.prices.get(name)
        stated = {field: _per_token(form, field) for field in ("input_cost_per_token", "output_cost_per_token")}
        # a price replaces the whole price before it: what the form does not show stays
        kept = dict(current.price.to_fields()) if current else {}
        return await admin.put_price(record, parse_body(PriceBody, {**kept, **stated}), state)

    return await _change_model(request, session, form, PRICE_MODEL, act)


@router.post("/model/remove")
async def remove_model(request: Request, session: SessionDep, form: WriterForm) -> Response:
    async def act(state: AppState, name: str) -> Any:
        await admin.remove_model(await admin.changeable_model(await admin.registered_model(name, state)), state)

    return await _change_model(request, session, form, REMOVE_MODEL, act, then="/models")


@router.post("/model/pause")
async def pause_model(request: Request, session: SessionDep, form: WriterForm) -> Response:
    """Pause a model, or let it go on."""
    paused = form.get("paused") == "1"

    async def act(state: AppState, name: str) -> Any:
        await admin.set_paused(await admin.registered_model(name, state), state, paused=paused)

    return await _change_model(request, session, form, PAUSE_MODEL if paused else RESUME_MODEL, act)


async def _change_model(
    request: Request,
    session: Session,
    form: Form,
    action: str,
    act: Callable[[AppState, str], Awaitable[Any]],
    then: str | None = None,
) -> Response:
    state, name = writing(request), form.get("name", "")
    status, problem, _ = await perform(request, action, name, lambda: act(state, name))
    if problem is not None:
        return await model_page(request, session, state, name, status=status, problem=problem)
    return RedirectResponse(base_of(request) + then, 303) if then else _to_model(request, name)


_NUMBERS_OF_KEY = ("requests_per_minute", "tokens_per_minute", "usd_per_day", "usd_per_month")


@router.post("/keys")
async def create_key(request: Request, session: SessionDep, form: WriterForm) -> Response:
    state = writing(request)

    async def act() -> Any:
        return await admin.create_key(parse_body(NewKey, _new_key(form)), request, Response(), state)

    status, problem, made = await perform(request, CREATE_KEY, "", act)
    return await keys_page(
        request,
        session,
        state,
        status=201 if made else status,
        problem=problem,
        form=form if problem else None,
        made=made,
    )


def _new_key(form: Form) -> dict[str, Any]:
    models = [name.strip() for name in form.get("models", "").split(",") if name.strip()]
    days = _number(form, "expires_in_days")
    numbers = {name: _number(form, name) for name in _NUMBERS_OF_KEY}
    return {
        "name": form.get("name", ""),
        "role": form.get("role", "client"),
        **({"models": models} if models else {}),
        **({} if days is None else {"expires_in_s": days * 86_400}),
        **{name: _whole(value) for name, value in numbers.items() if value is not None},
    }


@router.post("/keys/revoke")
async def revoke_key(request: Request, session: SessionDep, form: WriterForm) -> Response:
    state, key_id = writing(request), form.get("id", "")
    status, problem, _ = await perform(request, REVOKE_KEY, key_id, lambda: admin.revoke_key(key_id, state))
    if problem is not None:
        return await keys_page(request, session, state, status=status, problem=problem)
    return RedirectResponse(f"{base_of(request)}/keys", 303)


@router.post("/explain")
async def explain(request: Request, session: SessionDep, form: FormDep, state: StateDep) -> Response:
    """Show the decision for a prompt or a whole request. No model is asked."""
    text, stated = form.get("text", ""), form.get("lambda", "").strip()
    status, problem, found = 200, None, None
    try:
        selection = await _dry_run(request, state, text, stated)
        found = _explained(selection)
    except HANDLED_EXCEPTIONS as error:
        status, problem, _ = problem_of(error)
    return render(
        request,
        "explain.html",
        session,
        status=status,
        problem=problem,
        text=text,
        stated=stated,
        found=found,
        default=state.snapshots.current.default_lambda(state.settings),
    )


async def _dry_run(request: Request, state: AppState, text: str, stated: str) -> Selection:
    body = _chat_body(text)
    if stated:
        own = body.get("uniroute")
        body["uniroute"] = {**(own if isinstance(own, Mapping) else {}), "lambda": lambda_of(stated)}
    ctx = RequestContext(
        state,
        state.snapshots.current,
        parse_chat(encode_json(body), ()),
        None,
        request.scope[REQUEST_IDS],
        request.scope[RECEIVED_AT],
    )
    selection, _ = await select(ctx, explain=True)
    return selection


def _chat_body(text: str) -> dict[str, Any]:
    """Read a request if the text is one, and else take it as what the user says."""
    if not text.strip():
        raise BadRequest("there is nothing to explain: write a prompt, or paste a request")
    try:
        is_request = isinstance(parsed := json.loads(text), dict) and "messages" in parsed
    except (ValueError, RecursionError):
        is_request = False
    if is_request:
        return parse_object(text.encode("utf-8", "replace"))
    return {"model": "auto", "messages": [{"role": "user", "content": text}]}


def _explained(selection: Selection) -> dict[str, Any]:
    """Return the decision as the API shows it, each candidate with why it lost."""
    found = selection_to_json(selection)
    rows = [{**row, "why": _why_it_lost(row, found["candidates"][0], found)} for row in found["candidates"]]
    return {**found, "candidates": rows, "degraded_reason": selection.degraded_reason}


def _why_it_lost(row: Mapping[str, Any], best: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if row["model"] == found["model"]:
        return "chosen"
    more_errors = row["expected_error"] - best["expected_error"]
    more_cost = found["lambda"] * (row["cost"] - best["cost"])
    if row["model"] == best["model"]:
        return f"the best score, but the choice was by another reason: {found['reason']}"
    if row["score"] - best["score"] <= TIE_TOLERANCE:
        return f"as good within {TIE_TOLERANCE}, and not cheaper"
    if more_errors >= 0 and more_cost >= 0:
        return f"{more_errors:.3f} more errors, and not cheaper"
    if more_errors > 0:
        return f"{more_errors:.3f} more errors; being cheaper is worth {-more_cost:.3f} at this λ"
    return f"{-more_errors:.3f} fewer errors; the higher cost weighs {more_cost:.3f} at this λ"
