"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.auth import KEY_IN_SCOPE, path_of
from proxy.body import read_body
from proxy.head import head_of
from proxy.pipeline import handle
from proxy.refusing import TOLD, response_of
from proxy.relay.disconnect import until_gone
from proxy.relay.streaming import EventStream
from proxy.routes.context import arrived_at, trace_of
from proxy.routing.chat_request import READ_HEADERS, parse_chat
from proxy.services import Services, ServicesHolder

PATH = "/v1/chat/completions"
router = APIRouter()


class Chat:
    """Pure ASGI, innermost before the framework: what it does of routes and dependencies takes longer than routing."""

    def __init__(self, app: ASGIApp, holder: ServicesHolder) -> None:
        self.app = app
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) != PATH:
            await self.app(scope, receive, send)
            return
        try:
            response = await answer(Request(scope, receive), self._holder.services)
        except TOLD as error:
            response = response_of(error)
        await response(scope, receive, send)


@router.post(PATH, response_model=None)
async def chat(request: Request) -> Response:
    """What stands in the table of routes, for who looks there which methods the path has."""
    return await answer(request, request.app.state.holder.services)


async def answer(request: Request, services: Services) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, head_of(request.scope).pairs(READ_HEADERS))
    work = handle(services, parsed, request.scope[KEY_IN_SCOPE], trace_of(request), arrived_at(request))
    services.metrics.in_flight += 1
    try:
        return await until_gone(request.scope, request.receive, work, _let_go)
    finally:
        services.metrics.in_flight -= 1


async def _let_go(response: Response) -> None:
    if isinstance(response, EventStream):
        await response.close()
