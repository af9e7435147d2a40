from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import BudgetExceeded, ModelBusy, NotMeasured, UpstreamFailure
from proxy.profiling.jobs import with_progress
from proxy.routing.affinity import AnswerMarks, Thread, thread_of
from proxy.routing.chat_request import READ_HEADERS, ChatRequest, parse_chat
from proxy.routing.selection import Choice, choose, to_json
from proxy.server.attempts import Forwarder, Outlets
from proxy.server.auth import KEY_IN_SCOPE, path_of
from proxy.server.dependencies import Caller, OurServices, Services, ServicesHolder, arrived_at, trace_of
from proxy.server.ratelimit import Granted
from proxy.server.request_log import Books, Meter
from proxy.server.requests import Trace, check_hops, cut_ending, head_of, instance_id, read_body, until_gone
from proxy.server.reservations import Demand, claim_of, no_dearer, within_claim
from proxy.server.responses import TOLD, response_of
from proxy.server.streaming import EventStream, close_opened
from proxy.server.whole_answer import WholeAnswer
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingState
from proxy.upstream.sse import dump

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


@router.post("/v1/route", response_model=None)
async def route(request: Request, services: OurServices, key: Caller) -> Response:
    raw = await read_body(request, services.settings.max_body_bytes)
    parsed = parse_chat(raw, head_of(request.scope).pairs(READ_HEADERS))
    choice, _ = await chosen(services, services.state.current, parsed, key, explain=True)
    return Response(dump(to_json(choice)), media_type="application/json")


async def handle(
    services: Services, request: ChatRequest, key: ClientKey | None, trace: Trace, started: float
) -> Response:
    """`started`: monotonic seconds at which the request arrived. Raises ProxyError before anything was sent."""
    if trace.hops:
        check_hops(trace.hops, instance_id(str(services.settings.data_dir)))
    state = services.state.current
    choice, thread = await chosen(services, state, request, key)
    if choice.degraded:
        services.metrics.degraded.inc()
    if choice.left:
        services.metrics.conversations_moved.inc()
    books = Books(services.state, services.usage, services.metrics, services.live)
    choice, granted = await _granted(services, state, request, choice, key)
    marks = AnswerMarks(services.conversations, thread, request.body["messages"])
    meter = Meter(books, choice, key, trace, started, marks, granted)
    outlets = Outlets(services.upstream, services.health, services.capacities, services.settings)
    forwarder = Forwarder(outlets, state, request, trace, meter)
    return await (_stream(forwarder) if request.stream else _complete(forwarder))


async def chosen(
    services: Services, state: RoutingState, request: ChatRequest, key: ClientKey | None, *, explain: bool = False
) -> tuple[Choice, Thread]:
    """As things are now, and the conversation that the request goes on with. Raises as `choose`."""
    thread = await thread_of(services.conversations, request, key, services.settings)
    try:
        choice = await choose(
            *(request, key, state, services.settings, services.assigner),
            thread=thread,
            resting=services.health.resting(),
            loading=services.upstream.loading,
            explain=explain,
        )
    except NotMeasured as early:
        raise with_progress(early, await services.jobs.recent(), services.settings) from None
    return choice, thread


async def _granted(
    services: Services, state: RoutingState, request: ChatRequest, choice: Choice, key: ClientKey | None
) -> tuple[Choice, Granted | None]:
    """The one round trip to Redis before a request is sent, for keys that have limits. A second one where a budget has
    room for the chosen model, and not for a dearer one to fall back on: the request then goes without that."""
    if key is None or not key.limits.any:
        return choice, None
    limits = key.limits
    demand = Demand(within_claim(choice, limits), request.body, state, services.settings)
    try:
        return demand.choice, await services.limiter.reserve(key, claim_of(demand, limits))
    except BudgetExceeded:
        cheaper = replace(demand, choice=no_dearer(demand))
        if cheaper.choice.order == demand.choice.order:
            raise
        return cheaper.choice, await services.limiter.reserve(key, claim_of(cheaper, limits))


async def _complete(forwarder: Forwarder) -> Response:
    meter = forwarder.meter
    ending = "client_gone"
    try:
        answer = await forwarder.complete()
        shown = answer.named(meter.model)
        ending = "complete"
        if answer.held is not None and answer.held.size:
            return WholeAnswer(shown, answer.held, meter.headers())
        return Response(shown, media_type="application/json", headers=meter.headers())
    except (UpstreamFailure, ModelBusy) as failure:
        ending = _refused(meter, failure)
        raise
    except asyncio.CancelledError:
        ending = cut_ending()
        raise
    finally:
        meter.finish(ending)
        if ending != "client_gone":
            await meter.settled()


async def _stream(forwarder: Forwarder) -> Response:
    """Status and headers wait for the first content, so that a failure is told as one; but not for ever."""
    meter, keep_alive_s = forwarder.meter, forwarder.outlets.settings.keep_alive_s
    opening = asyncio.create_task(forwarder.open_stream())
    ending: str | None = "client_gone"
    try:
        await asyncio.wait({opening}, timeout=keep_alive_s)
        if opening.done():
            opening.result()
        ending = None
    except (UpstreamFailure, ModelBusy) as failure:
        ending = _refused(meter, failure)
        raise
    except asyncio.CancelledError:
        ending = cut_ending()
        raise
    finally:
        if ending is not None:
            meter.finish(ending)
            await close_opened(opening)
            if ending != "client_gone":
                await meter.settled()
    return EventStream(opening, meter, keep_alive_s=keep_alive_s, include_usage=forwarder.request.include_usage)


def _refused(meter: Meter, failure: UpstreamFailure | ModelBusy) -> str:
    """The ending. The failure is told with the decision that led there."""
    failure.headers |= meter.headers()
    return "busy" if isinstance(failure, ModelBusy) else "failed"
