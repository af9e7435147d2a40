from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import BudgetExceeded, ModelAtCapacity, NotMeasured, UpstreamError
from proxy.profiling.jobs import with_progress
from proxy.routing.affinity import Affinity, AffinityRecorder, load_affinity
from proxy.routing.chat_request import READ_HEADERS, ChatRequest, parse_chat
from proxy.routing.selection import Selection, select_model, selection_to_json
from proxy.server.attempts import Attempts, Outlets
from proxy.server.auth import KEY_IN_SCOPE, path_of
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey, ServicesHolder, received_at, trace_of
from proxy.server.ratelimit import Reservation
from proxy.server.request_log import Books, RequestRecord
from proxy.server.requests import (
    RequestIds,
    cancel_on_disconnect,
    check_hops,
    cut_ending,
    headers_of,
    instance_id,
    read_body,
)
from proxy.server.reservations import Demand, drop_pricier_fallbacks, estimate_reservation, limit_to_reserved
from proxy.server.responses import HANDLED_EXCEPTIONS, error_response
from proxy.server.streaming import CompletionStream, cancel_or_close
from proxy.server.whole_answer import WholeAnswer
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.sse import encode_json

PATH = "/v1/chat/completions"

router = APIRouter()


class ChatCompletionsEndpoint:
    """Pure ASGI, innermost before the framework: what it does of routes and dependencies takes longer than routing."""

    def __init__(self, app: ASGIApp, holder: ServicesHolder) -> None:
        self.app = app
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) != PATH:
            await self.app(scope, receive, send)
            return
        try:
            response = await chat_completions(Request(scope, receive), self._holder.services)
        except HANDLED_EXCEPTIONS as error:
            response = error_response(error)
        await response(scope, receive, send)


@router.post(PATH, response_model=None)
async def chat(request: Request) -> Response:
    """What stands in the table of routes, for who looks there which methods the path has."""
    return await chat_completions(request, request.app.state.holder.services)


async def chat_completions(request: Request, services: AppState) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, headers_of(request.scope).pairs(READ_HEADERS))
    work = create_completion(services, parsed, request.scope[KEY_IN_SCOPE], trace_of(request), received_at(request))
    services.metrics.in_flight += 1
    try:
        return await cancel_on_disconnect(request.scope, request.receive, work, _dispose)
    finally:
        services.metrics.in_flight -= 1


async def _dispose(response: Response) -> None:
    if isinstance(response, CompletionStream):
        await response.close()


@router.post("/v1/route", response_model=None)
async def route(request: Request, services: AppStateDep, key: CurrentKey) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, headers_of(request.scope).pairs(READ_HEADERS))
    choice, _ = await select(services, services.state.current, parsed, key, explain=True)
    return Response(encode_json(selection_to_json(choice)), media_type="application/json")


async def create_completion(
    services: AppState, request: ChatRequest, key: ClientKey | None, trace: RequestIds, started: float
) -> Response:
    """`started`: monotonic seconds at which the request arrived. Raises ProxyError before anything was sent."""
    if trace.hops:
        check_hops(trace.hops, instance_id(str(services.settings.data_dir)))
    state = services.state.current
    choice, thread = await select(services, state, request, key)
    if choice.degraded:
        services.metrics.degraded.inc()
    if choice.left:
        services.metrics.conversations_moved.inc()
    books = Books(services.state, services.usage, services.metrics, services.live)
    choice, granted = await reserve(services, state, request, choice, key)
    marks = AffinityRecorder(services.conversations, thread, request.body["messages"])
    meter = RequestRecord(books, choice, key, trace, started, marks, granted)
    outlets = Outlets(services.upstream, services.health, services.capacities, services.settings)
    forwarder = Attempts(outlets, state, request, trace, meter)
    return await (_stream(forwarder) if request.stream else _complete(forwarder))


async def select(
    services: AppState, state: RoutingSnapshot, request: ChatRequest, key: ClientKey | None, *, explain: bool = False
) -> tuple[Selection, Affinity]:
    """As things are now, and the conversation that the request goes on with. Raises as `select_model`."""
    thread = await load_affinity(services.conversations, request, key, services.settings)
    try:
        choice = await select_model(
            *(request, key, state, services.settings, services.assigner),
            thread=thread,
            resting=services.health.resting(),
            loading=services.upstream.loading,
            explain=explain,
        )
    except NotMeasured as early:
        raise with_progress(early, await services.jobs.recent(), services.settings) from None
    return choice, thread


async def reserve(
    services: AppState, state: RoutingSnapshot, request: ChatRequest, choice: Selection, key: ClientKey | None
) -> tuple[Selection, Reservation | None]:
    """The one round trip to Redis before a request is sent, for keys that have limits. A second one where a budget has
    room for the chosen model, and not for a dearer one to fall back on: the request then goes without that."""
    if key is None or not key.limits.any:
        return choice, None
    limits = key.limits
    demand = Demand(limit_to_reserved(choice, limits), request.body, state, services.settings)
    try:
        return demand.choice, await services.limiter.reserve(key, estimate_reservation(demand, limits))
    except BudgetExceeded:
        cheaper = replace(demand, choice=drop_pricier_fallbacks(demand))
        if cheaper.choice.order == demand.choice.order:
            raise
        return cheaper.choice, await services.limiter.reserve(key, estimate_reservation(cheaper, limits))


async def _complete(forwarder: Attempts) -> Response:
    meter = forwarder.meter
    ending = "client_gone"
    try:
        chat_completions = await forwarder.complete()
        shown = chat_completions.named(meter.model)
        ending = "complete"
        if chat_completions.held is not None and chat_completions.held.size:
            return WholeAnswer(shown, chat_completions.held, meter.headers())
        return Response(shown, media_type="application/json", headers=meter.headers())
    except (UpstreamError, ModelAtCapacity) as failure:
        ending = _refused(meter, failure)
        raise
    except asyncio.CancelledError:
        ending = cut_ending()
        raise
    finally:
        meter.finish(ending)
        if ending != "client_gone":
            await meter.settled()


async def _stream(forwarder: Attempts) -> Response:
    """Status and headers wait for the first content, so that a failure is told as one; but not for ever."""
    meter, keep_alive_s = forwarder.meter, forwarder.outlets.settings.keep_alive_s
    opening = asyncio.create_task(forwarder.open_stream())
    ending: str | None = "client_gone"
    try:
        await asyncio.wait({opening}, timeout=keep_alive_s)
        if opening.done():
            opening.result()
        ending = None
    except (UpstreamError, ModelAtCapacity) as failure:
        ending = _refused(meter, failure)
        raise
    except asyncio.CancelledError:
        ending = cut_ending()
        raise
    finally:
        if ending is not None:
            meter.finish(ending)
            await cancel_or_close(opening)
            if ending != "client_gone":
                await meter.settled()
    return CompletionStream(opening, meter, keep_alive_s=keep_alive_s, include_usage=forwarder.request.include_usage)


def _refused(meter: RequestRecord, failure: UpstreamError | ModelAtCapacity) -> str:
    """The ending. The failure is told with the decision that led there."""
    failure.headers |= meter.headers()
    return "busy" if isinstance(failure, ModelAtCapacity) else "failed"
