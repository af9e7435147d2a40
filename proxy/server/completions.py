from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from proxy.errors import BudgetExceeded, ModelAtCapacity, NotProfiled, UpstreamError
from proxy.json_text import encode_json
from proxy.profiling.jobs import with_progress
from proxy.routing.affinity import Affinity, load_affinity
from proxy.routing.chat_request import READ_HEADERS, parse_chat, parse_object, read_chat
from proxy.routing.selection import Selection, select_model, selection_to_json
from proxy.routing.selection_context import SelectionContext, preset_of
from proxy.server.api import messages_request, responses_request
from proxy.server.api.client_apis import (
    CHAT,
    CLIENT_APIS,
    COUNT_TOKENS,
    INPUT_TOKENS,
    NATIVE_HEADERS,
    RESPONSES,
    ROUTE,
    ClientAPI,
)
from proxy.server.api.translation import Translation
from proxy.server.attempts import AttemptRunner
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey, RequestContext
from proxy.server.disconnects import cancel_on_disconnect, cancelled_ending
from proxy.server.exchange import ASGIExchange, Exchange, read_body
from proxy.server.request_log import RequestRecord
from proxy.server.requests import check_hops, random_id
from proxy.server.reservations import (
    Reservation,
    UsageEstimate,
    drop_pricier_fallbacks,
    limit_to_reserved,
    reservation_request,
)
from proxy.server.stored_responses import expand, record_of, scope_of
from proxy.server.streaming import METADATA, StreamedAnswer
from proxy.settings.litellm_params import reject_control_fields
from proxy.storage.client_keys import ClientKey
from proxy.upstream.payload import JSONPayload, NativePayload, with_member
from proxy.upstream.response_memory import HeldMemory

router = APIRouter()


class Answer(Protocol):
    """What is sent to the client of a request that succeeded."""

    async def send(self, exchange: Exchange) -> None: ...


# Answers a request. What is left to be sent is returned; None: all of it was sent, as a stream.
Handler = Callable[[Exchange, AppState, ClientKey | None], Awaitable[Answer | None]]


async def endpoint() -> None:
    """Stand in the route table, in which the methods of a path are looked up; ModelEndpoints serves the path."""


for each in CLIENT_APIS:
    router.add_api_route(each, endpoint, methods=["POST"], response_model=None)


@router.post(ROUTE, response_model=None)
async def route(request: Request, app: AppStateDep, key: CurrentKey) -> Response:
    ctx = await read_request(ASGIExchange.of(request), app, key, CHAT)
    selection, affinity = await select(ctx, explain=True)
    preset = preset_of(ctx.request.model, app.settings, ctx.snapshot)
    stated = {} if preset is None else {"preset": preset.model_dump(by_alias=True)}
    decision = selection_to_json(selection, affinity.trajectory)
    return Response(encode_json({**decision, **stated}), media_type="application/json")


@router.post(COUNT_TOKENS, response_model=None)
async def count_tokens(request: Request, app: AppStateDep) -> Response:
    document = parse_object(await read_body(ASGIExchange.of(request), app.settings.max_body_bytes))
    reject_control_fields(document)
    return Response(
        encode_json({"input_tokens": messages_request.count_tokens(document)}), media_type="application/json"
    )


@router.post(INPUT_TOKENS, response_model=None)
async def count_input_tokens(request: Request, app: AppStateDep, key: CurrentKey) -> Response:
    document = parse_object(await read_body(ASGIExchange.of(request), app.settings.max_body_bytes))
    reject_control_fields(document)
    expanded = await expand(document, app.responses, scope_of(key))
    counted = {"object": "response.input_tokens", "input_tokens": responses_request.count_tokens(expanded)}
    return Response(encode_json(counted), media_type="application/json")


async def answer_request(api: ClientAPI, exchange: Exchange, app: AppState, key: ClientKey | None) -> Answer | None:
    """Serve one request for an answer, as a Handler. It is cancelled when its client leaves."""
    ctx = await read_request(exchange, app, key, api)
    app.metrics.in_flight += 1
    try:
        return await cancel_on_disconnect(exchange, create_completion(ctx, exchange))
    finally:
        app.metrics.in_flight -= 1


# The endpoints at which a client asks a model for an answer.
ENDPOINTS: Mapping[str, Handler] = {path: partial(answer_request, api) for path, api in CLIENT_APIS.items()}


async def read_request(exchange: Exchange, app: AppState, key: ClientKey | None, api: ClientAPI) -> RequestContext:
    """Read, parse and translate a request.

    Raises:
        ProxyError: the body could not be read, or is not what an upstream may be sent.
    """
    headers = exchange.headers
    raw = await read_body(exchange, app.settings.max_body_bytes)
    stated = headers.items_for(READ_HEADERS)
    translation: Translation | None = None
    native_headers: tuple[tuple[str, str], ...] = ()
    if api.translate is None:
        parsed = parse_chat(raw, stated)
    else:
        document: Mapping[str, Any] = parse_object(raw)
        reject_control_fields(document)
        if api is RESPONSES:
            document = await expand(document, app.responses, scope_of(key))
        translation = api.translate(document, answer_id=random_id(), created_at=int(time.time()))
        parsed = read_chat(dict(translation.body), stated, translated=True)
        # A list may be sent in several headers.
        native_headers = tuple((name, ",".join(headers.getlist(name))) for name in NATIVE_HEADERS)
    return RequestContext(
        app,
        app.snapshots.current,
        parsed,
        key,
        exchange.ids,
        exchange.received_at,
        translation,
        native_headers,
        api.name,
        exchange.trace,
    )


async def create_completion(ctx: RequestContext, exchange: Exchange) -> Answer | None:
    """Select a model, reserve the key's budget, and relay the first answer: return a whole one, and send a stream.

    Raises:
        ProxyError: before any byte was sent to the client.
    """
    if ctx.ids.hops:
        check_hops(ctx.ids.hops, ctx.app.instance)
    selection, affinity = await select(ctx)
    if selection.degraded_reason:
        ctx.app.metrics.degraded.inc()
    if selection.lost_affinity:
        ctx.app.metrics.conversations_moved.inc()
    selection, reservation = await reserve(ctx, selection)
    if selection.decision is not None and selection.decision.assignment is not None:
        ctx.app.traffic_mix.observe(selection.decision.assignment)
    record = RequestRecord(ctx, selection, affinity, reservation)
    runner = AttemptRunner(ctx, record)
    if ctx.request.stream:
        await _answer_stream(ctx, exchange, runner, record)
        return None
    return await _answer_whole(ctx, runner, record)


async def select(ctx: RequestContext, *, explain: bool = False) -> tuple[Selection, Affinity]:
    """Look up whose conversation this is, and select a model by the current snapshot and health.

    Raises:
        NoEligibleModelError, ServiceUnavailable: as `select_model`; NotProfiled says how far profiling is.
    """
    app = ctx.app
    affinity = await load_affinity(app.sessions, ctx.request, ctx.key, app.settings)
    selecting = SelectionContext(
        f"dec-{random_id()}",
        ctx.request,
        ctx.key,
        ctx.snapshot,
        app.settings,
        affinity=affinity,
        cooling_down=app.health.cooling_down(),
        not_ready=app.upstream.not_ready,
    )
    try:
        return await select_model(selecting, app.assigner, explain=explain), affinity
    except NotProfiled as error:
        raise with_progress(error, await app.jobs.recent(), app.settings) from None


async def reserve(ctx: RequestContext, selection: Selection) -> tuple[Selection, Reservation | None]:
    """Reserve what the request may use of its key's limits, in one round trip to Redis.

    If a budget has room for the selected model, but not for a more expensive fallback, the fallback is dropped and the
    reservation tried again.
    """
    key = ctx.key
    if key is None or not key.limits.any:
        return selection, None
    limits = key.limits
    selection = limit_to_reserved(selection, limits)
    estimate = UsageEstimate(selection, ctx.request.body, ctx.snapshot, ctx.app.settings, ctx.translation)
    try:
        return estimate.selection, await ctx.app.rate_limiter.reserve(key, reservation_request(estimate, limits))
    except BudgetExceeded:
        cheaper = estimate.of(drop_pricier_fallbacks(estimate))
        if cheaper.selection.candidates == estimate.selection.candidates:
            raise
        return cheaper.selection, await ctx.app.rate_limiter.reserve(key, reservation_request(cheaper, limits))


async def _answer_whole(ctx: RequestContext, runner: AttemptRunner, record: RequestRecord) -> Answer:
    """Wait for the first whole answer, and finish the record before it is sent."""
    try:
        completion = await runner.complete()
        content, answer = _in_clients_api(ctx, completion, record.model)
    except BaseException as failure:
        await finish_failed(record, failure)
        raise
    record.finish("complete")
    if ctx.request.options.metadata:
        content = with_member(content, METADATA, record.metadata())
    await store_answer(ctx, answer)
    await record.wait_until_settled()
    return WholeAnswer(content, completion.held, record.headers())


def _in_clients_api(ctx: RequestContext, completion: JSONPayload, model: str) -> tuple[bytes, Mapping[str, Any] | None]:
    """Return what the client is sent, and the same parsed if it is of another API than chat."""
    if ctx.translation is None:
        return completion.with_model(model), None
    if isinstance(completion, NativePayload):
        return completion.with_model(model), {**completion.native, "model": model}
    answer = ctx.translation.answer(completion.body, model)
    return encode_json(answer), answer


async def store_answer(ctx: RequestContext, answer: Mapping[str, Any] | None) -> None:
    """Store a whole answer that later requests may ask for."""
    if answer is None or ctx.translation is None or not ctx.translation.stored:
        return
    kept = record_of(ctx.translation, answer)
    await ctx.app.responses.save(scope_of(ctx.key), str(answer.get("id")), kept)


async def _answer_stream(ctx: RequestContext, exchange: Exchange, runner: AttemptRunner, record: RequestRecord) -> None:
    """Send a stream. A failure before the answer has begun can have a status of its own."""
    try:
        await StreamedAnswer(ctx, exchange, record, partial(store_answer, ctx)).send(runner.open_stream())
    except BaseException as failure:
        if not exchange.started:
            await finish_failed(record, failure)
        raise


async def finish_failed(record: RequestRecord, failure: BaseException) -> None:
    """Finish the record of a request that ends before its response begins.

    The response to a failure of the models gets the headers that name the decision.
    """
    ending = "busy" if isinstance(failure, ModelAtCapacity) else "failed"
    if isinstance(failure, UpstreamError | ModelAtCapacity):
        failure.headers |= record.headers()
    elif isinstance(failure, asyncio.CancelledError):
        ending = cancelled_ending()
    record.finish(ending)
    if ending != "client_gone":
        await record.wait_until_settled()


class WholeAnswer:
    """Send a whole JSON document, then release the memory that is counted for it."""

    def __init__(self, content: bytes, memory: HeldMemory | None, headers: Mapping[str, str]) -> None:
        self._content = content
        self._memory = memory
        self._headers = headers

    async def send(self, exchange: Exchange) -> None:
        try:
            await exchange.send(200, {"content-type": "application/json", **self._headers}, self._content)
        finally:
            if self._memory is not None:
                self._memory.release()
