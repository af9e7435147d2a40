"""How the page is answered: headers of every answer, templates, static files, forms, and who may see and send them."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl, quote

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import Message, Send

from proxy.dashboard.activity import Activity
from proxy.dashboard.curve import Curves
from proxy.dashboard.sessions import Session, SessionRequired, Sessions, check_form
from proxy.errors import BadRequest, ClientDisconnected, Forbidden
from proxy.server.auth import DASHBOARD, KEY_IN_SCOPE, PRINCIPAL, SAFE_METHODS, KeyAuthenticator
from proxy.server.dependencies import AppState
from proxy.server.requests import APP_STATE, REQUEST_IDS, read_body
from proxy.server.responses import HANDLED_EXCEPTIONS, render_error
from proxy.settings.schema import Settings
from proxy.storage.audit_log import Actor

HERE = Path(__file__).parent

# Nothing from elsewhere, nothing inline, and no frame around the page.
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *("form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"),
    )
)

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # a browser that sends no referrer sends no Origin with forms either
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

NO_STORE = "no-store"

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

FORM = "application/x-www-form-urlencoded"

MAX_FORM_FIELDS = 64

# Key of the scope: who looks at the page.
SESSION_IN_SCOPE = "uniroute.session"


# How long a view waits for slow work before it says that it goes on.
MAX_WAIT_S = 1.5

T = TypeVar("T")


class StillWorking(Exception):
    """What a view needs is not there yet."""


class SlowWork:
    """Begin slow work when a view first needs it. Who comes again finds it going on, or done."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def result(self, name: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `start` returns, or raise what it raises, or StillWorking after a moment."""
        task: asyncio.Task[T] | None = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = asyncio.create_task(start(), name=f"uniroute-dashboard-{name}")
        await asyncio.wait({task}, timeout=MAX_WAIT_S)
        if not task.done():
            raise StillWorking
        self._tasks.pop(name, None)
        return task.result()


class Dashboard:
    """What the page keeps between requests. One per process."""

    def __init__(self, settings: Settings, authenticator: KeyAuthenticator) -> None:
        self.authenticator = authenticator
        self.sessions = Sessions(settings, authenticator)
        self.activity = Activity()
        self.curves = Curves()
        self.slow_work = SlowWork()
        self.open_streams = 0


def with_page_headers(send: Send) -> Send:
    """Return a `send` that adds what every answer under /dashboard carries."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers.setdefault("cache-control", NO_STORE)
        await send(message)

    return send_with_headers


class DashboardRoute(APIRoute):
    """Answer errors in HTML, and send those who are not logged in to the form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                return await handle(request)
            except SessionRequired:
                return RedirectResponse(f"{base_of(request)}/login", 303)
            except StillWorking:
                return _page_to_come(request)
            except ClientDisconnected:
                return Response(status_code=499)
            except HANDLED_EXCEPTIONS as error:
                status, message, headers = problem_of(error)
                session: Session | None = request.scope.get(SESSION_IN_SCOPE)
                if session is not None and request.method not in SAFE_METHODS:
                    actor_of(request).log(f"dashboard{request.url.path.removeprefix(base_of(request))}", "-", status)
                page = render(request, "error.html", session, status=status, problem=message)
                page.headers.update(headers)
                return page

        return handle_page


def _page_to_come(request: Request) -> Response:
    """Answer a view whose figures are being computed: the browser asks again by itself."""
    page = render(request, "wait.html", request.scope[SESSION_IN_SCOPE])
    page.headers["refresh"] = "1"
    return page


def problem_of(error: Exception) -> tuple[int, str, Mapping[str, str]]:
    """Return the status, the message and the headers of one of HANDLED_EXCEPTIONS, as the API answers it."""
    status, body, headers = render_error(error)
    return status, str(body["error"]["message"]), headers


def base_of(request: Request) -> str:
    """Return the path of the page, with the prefix that the server is mounted under."""
    return str(request.scope.get("root_path", "")) + DASHBOARD


def dashboard_of(request: Request) -> Dashboard:
    dashboard: Dashboard = request.app.state.dashboard
    if not dashboard.sessions.possible:
        raise Forbidden(
            "the dashboard is off: set UNIROUTE_ADMIN_KEY in the environment of the server, 8 characters or more,"
            " and start it again"
        )
    return dashboard


def app_state_of(request: Request) -> AppState:
    state: AppState = request.scope[APP_STATE]
    return state


async def session_of(request: Request) -> Session:
    """Return who is logged in, and name them in the scope as AuthMiddleware does for the API."""
    session = await dashboard_of(request).sessions.find(request, app_state_of(request).store)
    if session is None or not session.logged_in:
        raise SessionRequired
    request.scope[KEY_IN_SCOPE], request.scope[PRINCIPAL] = session.principal.key, session.principal.id
    request.scope[SESSION_IN_SCOPE] = session
    return session


SessionDep = Annotated[Session, Depends(session_of)]

Form = Mapping[str, str]


async def read_form(request: Request) -> Form:
    """Return the fields of a form; of one that is repeated, the last. Raises BadRequest."""
    raw = await read_body(request, app_state_of(request).settings.max_body_bytes, content_type=FORM)
    try:
        pairs = parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS, errors="strict")
    except ValueError as error:
        raise BadRequest(f"this is no form of this page: {error}"[:200]) from None
    return dict(pairs)


async def form_of(request: Request, session: SessionDep) -> Form:
    """Return a form that this session has sent. Raises Forbidden, BadRequest."""
    form = await read_form(request)
    check_form(session, request, form.get("token", ""))
    return form


FormDep = Annotated[Form, Depends(form_of)]


async def writer_form_of(session: SessionDep, form: FormDep) -> Form:
    if not session.may_write:
        raise Forbidden("a key of the role viewer may only read")
    return form


WriterForm = Annotated[Form, Depends(writer_form_of)]


def actor_of(request: Request) -> Actor:
    return Actor(request.scope[PRINCIPAL], request.scope[REQUEST_IDS].request_id)


def render(
    request: Request, template: str, session: Session | None, *, status: int = 200, **values: Any
) -> HTMLResponse:
    return HTMLResponse(render_text(request, template, session, status=status, **values), status)


def render_text(request: Request, template: str, session: Session | None, **values: Any) -> str:
    state = app_state_of(request)
    return (
        environment()
        .get_template(template)
        .render(
            base=base_of(request),
            session=session,
            store_available=state.snapshots.available,
            here=request.url.path.removeprefix(base_of(request)).strip("/"),
            **values,
        )
    )


@cache
def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    found.filters.update(
        percent=percent, usd=usd, amount=amount, ago=ago, when=when, segment=lambda text: quote(str(text), safe="")
    )
    return found


@cache
def static_files() -> Mapping[str, tuple[bytes, str, str]]:
    """Return each file's bytes, media type and ETag, by its name."""
    found = {}
    for path in (HERE / "static").iterdir():
        raw = path.read_bytes()
        found[path.name] = raw, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(raw).hexdigest()[:20]}"'
    return found


UNKNOWN = "–"


def percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def usd(dollars: float | None) -> str:
    """Write an amount of dollars to the cent, or to three digits if it is smaller."""
    if dollars is None or math.isnan(dollars):
        return UNKNOWN
    if dollars == 0:
        return "$0"
    if abs(dollars) >= 1:
        return f"${dollars:,.2f}"
    digits = min(12, 2 - math.floor(math.log10(abs(dollars))))
    return f"${dollars:.{digits}f}"


def amount(value: float | None) -> str:
    """Write a number with three or more significant digits."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def when(seconds: float | None) -> str:
    """Write Unix seconds as a minute, UTC."""
    return UNKNOWN if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def ago(seconds: float | None) -> str:
    """Write how long ago some Unix seconds were."""
    if seconds is None:
        return UNKNOWN
    age_s = max(0.0, time.time() - seconds)
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if age_s >= length_s:
            return f"{age_s / length_s:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"
