"""POST /v1/route: the decision for a chat body, as JSON. Nothing is forwarded."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from proxy.body import read_body
from proxy.head import head_of
from proxy.pipeline import chosen
from proxy.routes.context import Caller, OurServices
from proxy.routing.chat_request import READ_HEADERS, parse_chat
from proxy.routing.selection import to_json
from proxy.upstream.sse import dump

router = APIRouter()


@router.post("/v1/route", response_model=None)
async def route(request: Request, services: OurServices, key: Caller) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, head_of(request.scope).pairs(READ_HEADERS))
    choice, _ = await chosen(services, services.state.current, parsed, key, explain=True)
    return Response(dump(to_json(choice)), media_type="application/json")
