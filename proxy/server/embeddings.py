from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends

from proxy.errors import BadRequest, Forbidden, ModelNotFound, ModelPaused
from proxy.routing.affinity import NO_AFFINITY
from proxy.routing.chat_request import OWN_FIELDS, READ_HEADERS, ChatRequest, parse_object, read_options
from proxy.routing.selection import Selection
from proxy.routing.selection_context import alias_mode, may_use
from proxy.server.admin_responses import Count, OpenResponseModel
from proxy.server.api.client_apis import EMBEDDINGS
from proxy.server.attempts import AttemptRunner
from proxy.server.completions import Answer, WholeAnswer, finish_failed
from proxy.server.dependencies import AppState, RequestContext
from proxy.server.disconnects import cancel_on_disconnect
from proxy.server.exchange import Exchange, read_body
from proxy.server.openapi import BODY_ERRORS, COMMON_ERRORS, UNSET, Error, client_key, errors, null_or
from proxy.server.request_log import RequestRecord
from proxy.server.requests import check_hops, random_id
from proxy.server.reservations import MARGIN_S, MAX_PICOUSD, Reservation, ReservationRequest, known_price
from proxy.settings.litellm_params import reject_control_fields
from proxy.settings.schema import Timeouts
from proxy.storage.client_keys import ClientKey
from proxy.storage.controls import why_paused
from proxy.storage.records import ModelRecord
from proxy.storage.usage import parse_usage
from proxy.upstream.embeddings import EmbeddingsRequest, renamed
from proxy.upstream.health import Attempt
from proxy.upstream.payload import JSONPayload
from router_core.pricing import max_price_usd, picousd
from router_core.text import estimate_tokens
from router_core.types import Requirements

# Models that an error names.
MAX_LISTED = 10

router = APIRouter()


class Embedding(OpenResponseModel):
    object: str
    index: Count
    embedding: list[float] | str


class EmbeddingList(OpenResponseModel):
    """Vectors as OpenAI writes them; other fields of the model's own answer are kept."""

    object: str
    data: list[Embedding]
    model: str
    usage: Any = UNSET


_BODY_SCHEMA = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "minLength": 1, "example": "text-embedding-3-small"},
        "input": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
            ],
            "example": "What is 2 + 2?",
        },
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": null_or({"type": "integer", "minimum": 1}),
    },
    "required": ["model", "input"],
    "description": "OpenAI's body. `input` may also be a list of lists of tokens.",
}


@router.post(
    EMBEDDINGS,
    tags=["embeddings"],
    summary="Ask a model, by its name, for vectors",
    response_model=EmbeddingList,
    dependencies=[Depends(client_key)],
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY_SCHEMA}}}},
    responses={
        **COMMON_ERRORS,
        **BODY_ERRORS,
        **errors(402, 404, 409, 422, 429, 500, 502, 504),
        "default": {"model": Error, "description": "What the model itself answered"},
    },
)
async def embeddings() -> None:
    """Stand in the OpenAPI document; ModelEndpoints serves the path, with `embed`."""


async def embed(exchange: Exchange, app: AppState, key: ClientKey | None) -> Answer:
    """Serve one request for embeddings, which is cancelled when its client leaves.

    Raises:
        ProxyError: before any byte was sent to the client.
    """
    raw = await read_body(exchange, app.settings.max_body_bytes)
    asked = parse_embeddings(raw)
    options = read_options(asked.body, exchange.headers.items_for(READ_HEADERS))
    ctx = RequestContext(
        app,
        app.snapshots.current,
        ChatRequest({"messages": ()}, asked.model, stream=False, include_usage=False, options=options),
        key,
        exchange.ids,
        exchange.received_at,
        api="embeddings",
        trace=exchange.trace,
    )
    app.metrics.in_flight += 1
    try:
        return await cancel_on_disconnect(exchange, create_embeddings(ctx, asked))
    finally:
        app.metrics.in_flight -= 1


@dataclass(frozen=True)
class EmbeddingsBody:
    """The body of a request for embeddings, checked."""

    body: Mapping[str, Any]
    """The client's."""
    model: str
    prompt_tokens: int
    """Estimated."""
    upstream: EmbeddingsRequest


def parse_embeddings(raw: bytes) -> EmbeddingsBody:
    """Parse and check a body.

    Raises:
        BadRequest: naming the field.
        FieldNotAllowed: the body tries to steer the provider layer.
    """
    body = parse_object(raw)
    reject_control_fields(body)
    model, encoding = body.get("model"), body.get("encoding_format")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` must be the name of a model that answers with embeddings", param="model")
    if encoding not in (None, "float", "base64"):
        message = f"`encoding_format` must be float or base64; got {encoding!r}"[:200]
        raise BadRequest(message, param="encoding_format")
    dimensions = body.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        message = f"`dimensions` must be a whole number above 0; got {dimensions!r}"[:200]
        raise BadRequest(message, param="dimensions")
    own = OWN_FIELDS.intersection(body)
    sent = {name: value for name, value in body.items() if name not in own}
    return EmbeddingsBody(
        body,
        model,
        _input_tokens(body.get("input")),
        EmbeddingsRequest(sent, None if own else raw.removeprefix(codecs.BOM_UTF8), encoding or "float"),
    )


def _input_tokens(given: object) -> int:
    """Estimate the tokens of `input`: a text, a list of texts, a list of tokens, or a list of such lists.

    Raises:
        BadRequest: it is something else.
    """
    if isinstance(given, str):
        return estimate_tokens(given)
    if isinstance(given, list) and given:
        if all(isinstance(each, str) for each in given):
            return sum(map(estimate_tokens, given))
        if all(map(_is_token, given)):
            return len(given)
        if all(isinstance(each, list) and each and all(map(_is_token, each)) for each in given):
            return sum(map(len, given))
    raise BadRequest(
        "`input` must be a text, a list of texts, a list of tokens, or a list of lists of tokens, and not empty",
        param="input",
    )


def _is_token(value: object) -> bool:
    return type(value) is int and value >= 0


async def create_embeddings(ctx: RequestContext, asked: EmbeddingsBody) -> Answer:
    """Ask the named model, within the key's limits.

    Raises:
        ProxyError: there is no answer.
    """
    if ctx.ids.hops:
        check_hops(ctx.ids.hops, ctx.app.instance)
    check_embeds(ctx, asked.model)
    selection = Selection(
        f"dec-{random_id()}",
        asked.model,
        "pinned",
        ctx.snapshot.default_lambda(ctx.app.settings),
        (asked.model,),
        None,
        {},
        requirements=Requirements(prompt_tokens=asked.prompt_tokens),
    )
    record = RequestRecord(ctx, selection, NO_AFFINITY, await _reserve(ctx, selection))
    try:
        answer = await EmbeddingsRunner(ctx, record, asked.upstream).embed()
        response = WholeAnswer(renamed(answer, asked.model), answer.held, record.headers())
    except BaseException as failure:
        await finish_failed(record, failure)
        raise
    record.finish("complete")
    await record.wait_until_settled()
    return response


def check_embeds(ctx: RequestContext, name: str) -> None:
    """Check that a name is a model's that answers with embeddings.

    Raises:
        BadRequest: it asks for routing, or is a chat model's: vectors of different models cannot be compared.
        ModelNotFound, Forbidden: there is no such model, or this key may not use it.
        ModelPaused.
    """
    snapshot, settings = ctx.snapshot, ctx.app.settings
    if alias_mode(name, settings, snapshot) is not None:
        raise BadRequest(f"{name[:128]!r} asks for routing; {_embeddings_hint(ctx)}", param="model")
    if name not in snapshot.models:
        raise ModelNotFound(f"the model {name[:128]!r} does not exist; {_embeddings_hint(ctx)}", param="model")
    if not may_use(name, ctx.key, ctx.snapshot):
        raise Forbidden(f"this key may not use the model {name!r}", param="model")
    if name not in snapshot.embeddings:
        raise BadRequest(f"{name!r} is a chat model; {_embeddings_hint(ctx)}", param="model")
    if name in snapshot.paused:
        raise ModelPaused(f"the model {name!r} is {why_paused(name)}")


def _embeddings_hint(ctx: RequestContext) -> str:
    names = [name for name in sorted(ctx.snapshot.embeddings) if may_use(name, ctx.key, ctx.snapshot)]
    if not names:
        return "no model here answers with embeddings (model_info: mode: embedding)"
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (
        "embeddings are not routed, for vectors of two models cannot be compared: name one of"
        f" {', '.join(names[:MAX_LISTED])}{more}"
    )


async def _reserve(ctx: RequestContext, selection: Selection) -> Reservation | None:
    """Reserve the tokens of the input, and what they cost."""
    key, app = ctx.key, ctx.app
    if key is None or not key.limits.any:
        return None
    tokens = selection.requirements.prompt_tokens
    largest_usd = max_price_usd(tokens, 0, known_price(ctx.snapshot, selection.model)) if key.limits.money else 0.0
    request = ReservationRequest(
        selection.id,
        0 if key.limits.tokens_per_minute is None else tokens,
        min(picousd(largest_usd), MAX_PICOUSD),
        app.settings.request_timeout_s + MARGIN_S,
    )
    return await app.rate_limiter.reserve(key, request)


class EmbeddingsRunner(AttemptRunner):
    """Ask one model for embeddings, with the timeouts, the slots, the circuit and the second try of a chat request."""

    def __init__(self, ctx: RequestContext, record: RequestRecord, asked: EmbeddingsRequest) -> None:
        super().__init__(ctx, record)
        self._asked = asked

    async def embed(self) -> JSONPayload:
        """Return the embeddings. Raises UpstreamError or ModelAtCapacity."""
        return await self.run(self._embed, lambda _: False)

    async def _embed(self, model: ModelRecord, timeouts: Timeouts, attempt: Attempt) -> JSONPayload:
        upstream = self._ctx.app.upstream
        answer = await upstream.embed(model, self._asked, self._headers, connect_timeout_s=timeouts.connect_s)
        attempt.succeeded()
        usage = answer.body.get("usage")
        tokens = parse_usage(usage).prompt_tokens or (usage.get("total_tokens") if isinstance(usage, Mapping) else None)
        self._record.set_usage({"prompt_tokens": tokens, "completion_tokens": 0})
        return answer
