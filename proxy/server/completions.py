from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import BudgetExceeded, ModelAtCapacity, NotProfiled, UpstreamError
from proxy.profiling.jobs import with_progress
from proxy.routing.affinity import Affinity, load_affinity
from proxy.routing.chat_request import READ_HEADERS, parse_chat, parse_object, read_chat
from proxy.routing.selection import Selection, select_model, selection_to_json
from proxy.routing.selection_context import SelectionContext, preset_of
from proxy.server.api import messages_request
from proxy.server.api.client_apis import (
    CHAT,
    CLIENT_APIS,
    COUNT_TOKENS,
    NATIVE_HEADERS,
    RESPONSES,
    ROUTE,
    ClientAPI,
)
from proxy.server.api.translation import Translation
from proxy.server.attempts import AttemptRunner
from proxy.server.auth import KEY_IN_SCOPE, path_of
from proxy.server.dependencies import AppState, AppStateDep, RequestContext
from proxy.server.disconnects import cancel_on_disconnect, cancelled_ending
from proxy.server.request_log import RequestRecord
from proxy.server.requests import (
    APP_STATE,
    RECEIVED_AT,
    REQUEST_IDS,
    check_hops,
    headers_of,
    instance_id,
    random_ids,
    read_body,
)
from proxy.server.reservations import (
    Reservation,
    UsageEstimate,
    drop_pricier_fallbacks,
    limit_to_reserved,
    reservation_request,
)
from proxy.server.responses import HANDLED_EXCEPTIONS, error_response
from proxy.server.stored_responses import expand, record_of, scope_of
from proxy.server.streaming import METADATA, CompletionStream, PendingStream, cancel_or_close
from proxy.settings.litellm_params import reject_control_fields
from proxy.upstream.payload import JSONPayload, NativePayload, with_member
from proxy.upstream.response_memory import HeldMemory
from proxy.upstream.sse import encode_json

router = APIRouter()


class CompletionEndpoints:
    """Answer what asks a model before the framework, whose routing and dependencies cost more than model selection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = CLIENT_APIS.get(path_of(scope)) if scope["type"] == "http" and scope["method"] == "POST" else None
        if api is None:
            await self.app(scope, receive, send)
            return
        try:
            response = await complete(Request(scope, receive), scope[APP_STATE], api)
        except HANDLED_EXCEPTIONS as error:
            response = error_response(error)
        await response(scope, receive, send)


def _register(api: ClientAPI) -> None:
    async def endpoint(request: Request, app: AppStateDep) -> Response:
        return await complete(request, app, api)

    router.add_api_route(api.path, endpoint, methods=["POST"], response_model=None)


# For the route table, in which the allowed methods of a path are looked up. CompletionEndpoints answers before.
for each in CLIENT_APIS.values():
    _register(each)


@router.post(ROUTE, response_model=None)
async def route(request: Request, app: AppStateDep) -> Response:
    ctx = await read_request(request, app, CHAT)
    selection, _ = await select(ctx, explain=True)
    preset = preset_of(ctx.request.model, app.settings, ctx.snapshot)
    stated = {} if preset is None else {"preset": preset.model_dump(by_alias=True)}
    return Response(encode_json({**selection_to_json(selection), **stated}), media_type="application/json")


@router.post(COUNT_TOKENS, response_model=None)
async def count_tokens(request: Request, app: AppStateDep) -> Response:
    document = parse_object(await read_body(request, app.settings.max_body_bytes))
    reject_control_fields(document)
    return Response(
        encode_json({"input_tokens": messages_request.count_tokens(document)}), media_type="application/json"
    )


async def complete(request: Request, app: AppState, api: ClientAPI) -> Response:
    """Serve one request for an answer, which is cancelled when its client leaves."""
    ctx = await read_request(request, app, api)
    app.metrics.in_flight += 1
    try:
        return await cancel_on_disconnect(request.scope, request.receive, create_completion(ctx), _close_if_stream)
    finally:
        app.metrics.in_flight -= 1


async def read_request(request: Request, app: AppState, api: ClientAPI) -> RequestContext:
    """Read, parse and translate a request.

    Raises:
        ProxyError: the body could not be read, or is not what an upstream may be sent.
    """
    scope = request.scope
    headers = headers_of(scope)
    raw = await read_body(request, app.settings.max_body_bytes)
    stated = headers.items_for(READ_HEADERS)
    translation: Translation | None = None
    native_headers: tuple[tuple[str, str], ...] = ()
    if api.translate is None:
        parsed = parse_chat(raw, stated)
    else:
        document: Mapping[str, Any] = parse_object(raw)
        reject_control_fields(document)
        if api is RESPONSES:
            document = await expand(document, app.responses, scope_of(scope[KEY_IN_SCOPE]))
        translation = api.translate(document, answer_id=next(random_ids), created_at=int(time.time()))
        parsed = read_chat(dict(translation.body), stated, translated=True)
        # A list may be sent in several headers.
        native_headers = tuple((name, ",".join(headers.getlist(name))) for name in NATIVE_HEADERS)
    return RequestContext(
        app,
        app.snapshots.current,
        parsed,
        scope[KEY_IN_SCOPE],
        scope[REQUEST_IDS],
        scope[RECEIVED_AT],
        translation,
        native_headers,
        api.name,
    )


async def _close_if_stream(response: Response) -> None:
    """Close the upstream's stream, for a client that left before it was relayed."""
    if isinstance(response, CompletionStream):
        await response.close()


async def create_completion(ctx: RequestContext) -> Response:
    """Select a model, reserve the key's budget, and relay the first answer.

    Raises:
        ProxyError: before any byte was sent to the client.
    """
    if ctx.ids.hops:
        check_hops(ctx.ids.hops, instance_id(str(ctx.app.settings.data_dir)))
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
        return await _stream(ctx, runner, record)
    return await _complete(ctx, runner, record)


async def select(ctx: RequestContext, *, explain: bool = False) -> tuple[Selection, Affinity]:
    """Look up whose conversation this is, and select a model by the current snapshot and health.

    Raises:
        NoEligibleModelError, ServiceUnavailable: as `select_model`; NotProfiled says how far profiling is.
    """
    app = ctx.app
    affinity = await load_affinity(app.sessions, ctx.request, ctx.key, app.settings)
    selecting = SelectionContext(
        f"dec-{next(random_ids)}",
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
        cheaper = replace(estimate, selection=drop_pricier_fallbacks(estimate))
        if cheaper.selection.candidates == estimate.selection.candidates:
            raise
        return cheaper.selection, await ctx.app.rate_limiter.reserve(key, reservation_request(cheaper, limits))


async def _complete(ctx: RequestContext, runner: AttemptRunner, record: RequestRecord) -> Response:
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
    await keep_answer(ctx, answer)
    await record.wait_until_settled()
    return CompletionResponse(content, completion.held, record.headers())


def _in_clients_api(ctx: RequestContext, completion: JSONPayload, model: str) -> tuple[bytes, Mapping[str, Any] | None]:
    """Return what the client is sent, and the same parsed if it is of another API than chat."""
    if ctx.translation is None:
        return completion.with_model(model), None
    if isinstance(completion, NativePayload):
        return completion.with_model(model), {**completion.native, "model": model}
    answer = ctx.translation.answer(completion.body, model)
    return encode_json(answer), answer


async def keep_answer(ctx: RequestContext, answer: Mapping[str, Any] | None) -> None:
    """Store a whole answer that later requests may ask for."""
    if answer is None or ctx.translation is None or not ctx.translation.stored:
        return
    kept = record_of(ctx.translation, answer)
    await ctx.app.responses.save(scope_of(ctx.key), str(answer.get("id")), kept)


async def _stream(ctx: RequestContext, runner: AttemptRunner, record: RequestRecord) -> Response:
    """Wait for the first content before the status is sent, so that a failure can have its own status.

    After `keep_alive_s` the stream begins all the same, with comments until the content comes.
    """
    keep_alive_s = ctx.app.settings.keep_alive_s
    pending = asyncio.create_task(runner.open_stream())
    try:
        await asyncio.wait({pending}, timeout=keep_alive_s)
        if pending.done():
            pending.result()
    except BaseException as failure:
        await finish_failed(record, failure, pending)
        raise
    return CompletionStream(ctx, pending, record, partial(keep_answer, ctx))


async def finish_failed(record: RequestRecord, failure: BaseException, pending: PendingStream | None = None) -> None:
    """Finish the record of a request that ends before its response begins, and close the stream that was to come.

    The response to a failure of the models gets the headers that name the decision.
    """
    ending = "client_gone"
    if isinstance(failure, UpstreamError | ModelAtCapacity):
        failure.headers |= record.headers()
        ending = "busy" if isinstance(failure, ModelAtCapacity) else "failed"
    elif isinstance(failure, asyncio.CancelledError):
        ending = cancelled_ending()
    record.finish(ending)
    if pending is not None:
        await cancel_or_close(pending)
    if ending != "client_gone":
        await record.wait_until_settled()


# A response is written in pieces of this size. What the client has not read yet then stays in this process's counted
# memory for responses, and not in the buffer of the transport, which is not counted.
WRITE_BYTES = 256 * 2**10


class CompletionResponse(Response):
    """Send a whole completion, then release the memory that is counted for it."""

    media_type = "application/json"

    def __init__(self, content: bytes, memory: HeldMemory | None, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=headers)
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), WRITE_BYTES):
                piece, more = self.body[start : start + WRITE_BYTES], start + WRITE_BYTES < len(self.body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            if self._memory is not None:
                self._memory.release()
