"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from proxy.body import read_body
from proxy.pipeline import handle
from proxy.relay.disconnect import until_gone
from proxy.routes.context import Caller, OurServices, arrived_at, headers_of, trace_of
from proxy.routing.request import parse_chat

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: Request, services: OurServices, key: Caller) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, headers_of(request))
    work = handle(services, parsed, key, trace_of(request), arrived_at(request))
    with services.metrics.in_flight.track_inprogress():
        return await until_gone(request.scope, request.receive, work)
