from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from proxy.routing.chat_request import MAX_VALUE, TIMEOUTS
from proxy.server.admin_schemas import MAX_EXPIRY_S, MAX_GRACE_S
from proxy.storage.client_keys import MAX_LAMBDA, MAX_PER_MINUTE, MAX_USD, ROLES
from router_core.types import MAX_PRICE, PRICE_FIELDS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}

NUMBER: Schema = {"type": "number"}

POSITIVE: Schema = {"type": "number", "minimum": 0}

COUNT: Schema = {"type": "integer", "minimum": 0}

AMOUNT: Schema = {"type": "number", "minimum": 0}

WEIGHT: Schema = {**AMOUNT, "maximum": MAX_VALUE}

SECONDS: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_VALUE}

SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}

NAME: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"}

FREE: Schema = {"type": "object", "additionalProperties": True}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def null_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": schema, **more}


def closed(properties: Mapping[str, Schema], *required: str, **more: Any) -> Schema:
    """Other keys are refused."""
    return {**opened(properties, *required, **more), "additionalProperties": False}


def opened(properties: Mapping[str, Schema], *required: str, **more: Any) -> Schema:
    """Other keys may be there."""
    return {
        "type": "object",
        "properties": dict(properties),
        **({"required": list(required)} if required else {}),
        **more,
    }


PRICES = PRICE_FIELDS[:2]

BUCKETS = PRICE_FIELDS[2:]

TIERS = f"^({'|'.join(PRICE_FIELDS)})_above_[0-9]{{1,9}}k?_tokens$"

TOKEN_COST: Schema = {"type": "number", "minimum": 0, "maximum": MAX_PRICE}

ABILITIES = (
    *("function_calling", "parallel_function_calling", "vision", "video_input", "audio_input", "audio_output"),
    *("pdf_input", "response_schema", "reasoning"),
)

WAITS = ("connect_timeout_s", "first_token_timeout_s", "idle_timeout_s")

BODIES: Mapping[str, Schema] = {
    "ChatBody": opened(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "messages": listed(FREE, minItems=1, example=[{"role": "user", "content": "What is 2 + 2?"}]),
            "stream": null_or({"type": "boolean"}),
            "stream_options": null_or(FREE),
            "uniroute": ref("Options"),
        },
        *("model", "messages"),
        description="OpenAI's body. Fields that are not listed reach the chosen model as they are; those that would"
        " steer the provider layer (api_base, api_key, extra_headers …) are refused.",
    ),
    "Options": closed(
        {
            "lambda": null_or(WEIGHT),
            "models": null_or(listed({"type": "string", "minLength": 1}, minItems=1)),
            "max_cost_usd": null_or(WEIGHT),
            "latency_weight": null_or(WEIGHT),
            "session": null_or({"type": "string", "minLength": 1, "maxLength": 255}),
            "fallbacks": null_or({"type": "boolean"}),
            "timeouts": null_or(closed(dict.fromkeys(TIMEOUTS, null_or(SECONDS)))),
        }
    ),
    "Addition": closed(
        {
            "model_name": NAME,
            "litellm_params": ref("Params"),
            "model_info": null_or(ref("Info")),
            "profile": null_or({"anyOf": [ref("Asking"), ref("Profile")]}),
        },
        *("model_name", "litellm_params"),
    ),
    "Params": opened(
        {"model": {"type": "string", "minLength": 1}},
        "model",
        description="LiteLLM's: model, api_base, api_key as os.environ/NAME_API_KEY, and fixed parameters.",
    ),
    "Info": opened(
        {
            **dict.fromkeys((*PRICES, *BUCKETS), null_or(TOKEN_COST)),
            **dict.fromkeys(("max_input_tokens", "max_output_tokens"), null_or({"type": "integer", "minimum": 1})),
            **{f"supports_{ability}": null_or({"type": "boolean"}) for ability in ABILITIES},
            **dict.fromkeys(WAITS, null_or(SECONDS)),
            "max_parallel_requests": null_or({"type": "integer", "minimum": 1}),
            "max_queued_requests": null_or({"type": "integer", "minimum": 0, "maximum": 10_000}),
            "supports_stream_options": null_or({"type": "boolean"}),
            "free": {"type": "boolean"},
        },
        patternProperties={TIERS: null_or(TOKEN_COST)},
        description="Fields that are not listed must be LiteLLM's.",
    ),
    "Asking": closed({"prompts": {"type": "integer", "minimum": 1, "maximum": 1000}, "max_usd": AMOUNT}),
    "Profile": opened(
        {
            "map": {"type": "string", "minLength": 1},
            "errors": listed(SHARE, minItems=1),
            "labels": listed({"type": "number", "minimum": 0}, minItems=1),
            "mean_error": SHARE,
            "mean_output_tokens": null_or({"type": "number"}),
            "mean_seconds": null_or({"type": "number"}),
            "measured_at": null_or(TEXT),
        },
        *("map", "errors", "labels"),
    ),
    "Change": closed({"litellm_params": null_or(FREE), "model_info": null_or(FREE)}),
    "Price": closed(
        {**dict.fromkeys(PRICES, TOKEN_COST), **dict.fromkeys(BUCKETS, null_or(TOKEN_COST))},
        *PRICES,
        patternProperties={TIERS: null_or(TOKEN_COST)},
        description="Names of tiers, as input_cost_per_token_above_200k_tokens, may be added to each.",
    ),
}

ANSWERS: Mapping[str, Schema] = {
    "Error": opened(
        {
            "error": opened(
                {"message": TEXT, "type": TEXT, "param": {}, "code": null_or(TEXT)}, "message", "type", "param", "code"
            )
        },
        "error",
    ),
    "Completion": opened({"model": TEXT, "choices": listed(FREE), "usage": {}}, "model", "choices"),
    "Event": opened({"data": TEXT}, "data", description="A chunk of OpenAI's as JSON, an error object, or [DONE]."),
    "Model": closed(
        {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT},
        *("id", "object", "created", "owned_by"),
    ),
    "Models": closed({"object": {"const": "list"}, "data": listed(ref("Model"))}, "object", "data"),
    "Decision": opened(
        {
            "decision": TEXT,
            "model": TEXT,
            "reason": TEXT,
            "lambda": {"type": "number", "minimum": 0},
            "max_tokens": null_or(closed({"stated": COUNT, "sent": COUNT}, "stated", "sent")),
            "clusters": listed(closed({"id": COUNT, "name": TEXT, "weight": SHARE}, "id", "name", "weight")),
            "candidates": listed(
                opened(
                    {
                        "model": TEXT,
                        "expected_error": SHARE,
                        "error_low": SHARE,
                        "error_high": SHARE,
                        **dict.fromkeys(("expected_cost_usd", "cost", "score"), NUMBER),
                        "flips_at_lambda": null_or({"type": "number", "minimum": 0}),
                    },
                    "model",
                )
            ),
            "ineligible": listed(closed({"model": TEXT, "why": TEXT}, "model", "why")),
        },
        *("decision", "model", "reason", "lambda", "max_tokens", "clusters", "candidates", "ineligible"),
    ),
    "Job": opened(
        {
            "id": TEXT,
            "model": TEXT,
            "state": {"enum": ["queued", "running", "ready", "failed", "cancelled"]},
            **dict.fromkeys(("done", "total", "failed", "unlabelled"), COUNT),
            **dict.fromkeys(("spent_usd", "eta_s"), null_or({"type": "number"})),
            "error": null_or(TEXT),
            "warning": TEXT,
        },
        *("id", "model", "state", "done", "total", "failed", "unlabelled", "spent_usd", "eta_s", "error"),
    ),
    "Accepted": closed({"model": TEXT, "job": null_or(TEXT)}, "model", "job"),
    "Card": opened(
        {
            "model_name": TEXT,
            "litellm_params": FREE,
            "model_info": FREE,
            "source": {"enum": ["config", "admin"]},
            "created_at": TEXT,
            "state": TEXT,
            "why": null_or(TEXT),
            "warning": null_or(TEXT),
            "price": null_or(ref("LivePrice")),
            "job": null_or(ref("Job")),
            "profile": null_or(ref("Profile")),
        },
        *("model_name", "litellm_params", "model_info", "source", "created_at", "state", "price", "job"),
    ),
    "LivePrice": opened(
        {
            **dict.fromkeys((*PRICES, *BUCKETS), POSITIVE),
            "source": TEXT,
            "updated_at": null_or(TEXT),
            "age_s": null_or({"type": "number", "minimum": 0}),
        },
        *(*PRICES, "source", "updated_at", "age_s"),
    ),
    "Cards": opened({"models": listed(ref("Card")), "state_version": COUNT}, "models", "state_version"),
    "Priced": closed({"model": TEXT, "price": null_or(ref("LivePrice"))}, "model", "price"),
    "Outcomes": closed({"outcomes": listed(FREE)}, "outcomes"),
    "Status": opened(
        {
            "status": TEXT,
            "state_version": COUNT,
            "store": {"enum": ["up", "away"]},
            "provider_lookups": COUNT,
        },
        "status",
    ),
}

_WEIGHT: Schema = {"type": "number", "minimum": 0, "maximum": MAX_LAMBDA}

_RATE: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_PER_MINUTE}

_USD: Schema = {"type": "number", "minimum": 0, "maximum": MAX_USD}

_TIME: Schema = {"type": "string", "format": "date-time"}

_ROLE: Schema = {"enum": list(ROLES)}

_STATED: Mapping[str, Schema] = {
    **dict.fromkeys(("lambda_default", "lambda_min", "lambda_max"), null_or(_WEIGHT)),
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute"), null_or(_RATE)),
    **dict.fromkeys(("usd_per_day", "usd_per_month"), null_or(_USD)),
}

_CHANGE: Mapping[str, Schema] = {
    "name": {"type": "string", "minLength": 1, "maxLength": 200},
    "models": null_or(listed(NAME, minItems=1)),
    "role": null_or(_ROLE),
    "expires_at": null_or(_TIME),
    "expires_in_s": null_or({"type": "number", "minimum": 0, "maximum": MAX_EXPIRY_S}),
    **_STATED,
}

_SHOWN: Mapping[str, Schema] = {
    **dict.fromkeys(("id", "name"), TEXT),
    "role": _ROLE,
    "models": null_or(listed(TEXT)),
    **dict.fromkeys(("expires_at", "previous_secret_until"), null_or(TEXT)),
    "created_at": TEXT,
    "revoked": {"type": "boolean"},
    **_STATED,
}

KEYS: Mapping[str, Schema] = {
    "NewKey": closed(_CHANGE, "name"),
    "KeyChange": closed(_CHANGE),
    "Rotation": closed({"grace_s": {"type": "number", "minimum": 0, "maximum": MAX_GRACE_S}}),
    "Key": closed(_SHOWN, *_SHOWN),
    "Secret": closed({**_SHOWN, "key": TEXT}, *_SHOWN, "key"),
    "Keys": closed({"keys": listed(ref("Key"))}, "keys"),
    "Audit": closed(
        {"entries": listed(opened(dict.fromkeys(("at", "who", "action", "target"), TEXT), "at", "who", "action"))},
        "entries",
    ),
}

CLIENT, ADMIN, OPEN = "client", "admin", "open"
"""Who may call: with a client key (or the admin key), with the admin key, anybody."""

ALWAYS = (400, 403, 503)
"""Of every call but the open ones: a path that cannot be, a Host or Origin, a server that is full or has no store."""

BODY = (408, 413, 415)

FROM_MODELS = (402, 404, 409, 422, 429, 500, 502, 504)
"""A model's own status passes through; these are the usual ones, and 404 also an unknown name of a model."""


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    """As FastAPI knows it, converters left out."""
    summary: str
    answers: Mapping[int, str | None]
    """Status → name of a schema; None: no body, "text": not JSON."""
    who: str = CLIENT
    body: str | None = None
    body_needed: bool = True
    errors: tuple[int, ...] = ()
    takes_lambda: bool = False
    takes_limit: bool = False
    any_status: bool = False
    """A model's own status passes through, whichever it is."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Name in the path → "name" of a model, or "id"."""

    @property
    def all_errors(self) -> tuple[int, ...]:
        if self.who == OPEN:
            return self.errors
        return tuple(sorted({*ALWAYS, 401, *self.errors, *(BODY if self.body else ())}))


_NAMED = {"name": "name"}

_JOB = {"job_id": "id"}

_KEY = {"key_id": "id"}

_MODELS = "/admin/models"

_KEYS = "/admin/keys"

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Ask the model that is chosen for this prompt", {200: "Completion"},
              body="ChatBody", errors=FROM_MODELS, takes_lambda=True, any_status=True),
    Operation("post", "/v1/route", "The decision for a chat body, nothing forwarded", {200: "Decision"},
              body="ChatBody", errors=(404,), takes_lambda=True),
    Operation("get", "/v1/models", "The models that this key may use", {200: "Models"}),
    Operation("get", "/v1/models/{name}", "One of them", {200: "Model"}, errors=(404,), parameters=_NAMED),
    Operation("get", "/openapi.json", "This document", {200: "Document"}),
    Operation("get", "/metrics", "Prometheus metrics", {200: "text"}),
    Operation("get", "/healthz", "The process is up", {200: "Status"}, who=OPEN),
    Operation("get", "/readyz", "It can route", {200: "Status", 503: "Status"}, who=OPEN),
    Operation("get", _MODELS, "Every registered model", {200: "Cards"}, who=ADMIN),
    Operation("post", _MODELS, "Add a model while the server runs", {201: "Accepted", 202: "Accepted"}, who=ADMIN,
              body="Addition", errors=(409,)),
    Operation("get", _MODELS + "/{name}", "A model with its price and profile", {200: "Card"}, who=ADMIN, errors=(404,),
              parameters=_NAMED),
    Operation("patch", _MODELS + "/{name}", "Change what is stated of it", {200: "Card"}, who=ADMIN, body="Change",
              errors=(404, 409), parameters=_NAMED),
    Operation("delete", _MODELS + "/{name}", "Remove it", {204: None}, who=ADMIN, errors=(404, 409), parameters=_NAMED),
    Operation("post", _MODELS + "/{name}/profile", "Measure it again, or hand over a profile",
              {200: "Accepted", 202: "Accepted"}, who=ADMIN, body="Profiling", errors=(404, 409), parameters=_NAMED),
    Operation("put", _MODELS + "/{name}/pricing", "Replace its price", {200: "Priced"}, who=ADMIN, body="Price",
              errors=(404,), parameters=_NAMED),
    Operation("get", "/admin/jobs/{job_id}", "How far measuring is", {200: "Job"}, who=ADMIN, errors=(404,),
              parameters=_JOB),
    Operation("get", "/admin/jobs/{job_id}/outcomes", "Its graded answers", {200: "Outcomes"}, who=ADMIN, errors=(404,),
              parameters=_JOB),
    Operation("delete", "/admin/jobs/{job_id}", "Stop it", {200: "Job"}, who=ADMIN, errors=(404,), parameters=_JOB),
    Operation("get", _KEYS, "Every client key", {200: "Keys"}, who=ADMIN),
    Operation("post", _KEYS, "Make a client key; its secret is shown once", {201: "Secret"}, who=ADMIN, body="NewKey"),
    Operation("get", _KEYS + "/{key_id}", "A client key", {200: "Key"}, who=ADMIN, errors=(404,), parameters=_KEY),
    Operation("patch", _KEYS + "/{key_id}", "Change it", {200: "Key"}, who=ADMIN, body="KeyChange", errors=(404, 409),
              parameters=_KEY),
    Operation("delete", _KEYS + "/{key_id}", "Revoke it, for good", {204: None}, who=ADMIN, errors=(404, 409),
              parameters=_KEY),
    Operation("post", _KEYS + "/{key_id}/rotate", "Give it a new secret, shown once", {200: "Secret"}, who=ADMIN,
              body="Rotation", body_needed=False, errors=(404, 409), parameters=_KEY),
    Operation("get", "/admin/audit", "Who changed what, newest first", {200: "Audit"}, who=ADMIN, takes_limit=True),
)  # fmt: skip

_IDS: Schema = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[A-Za-z0-9_-]+$"}

_PARAMETERS = {"name": NAME, "id": _IDS}

_STREAMED = ("Completion",)

_DECISION_HEADERS = {
    name: {"schema": TEXT}
    for name in (
        *("x-uniroute-model", "x-uniroute-decision", "x-uniroute-reason", "x-uniroute-overhead-ms"),
        "x-uniroute-max-tokens",
    )
}


def document() -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "UniRoute", "version": version("uniroute")},
        "paths": paths,
        "components": {
            "schemas": {
                **BODIES,
                **ANSWERS,
                **KEYS,
                "Document": FREE,
                "Profiling": {"anyOf": [ref("Asking"), ref("Profile")]},
            },
            "securitySchemes": {
                "client": {"type": "http", "scheme": "bearer", "description": "A client key, or the admin key."},
                "admin": {"type": "http", "scheme": "bearer", "description": "UNIROUTE_ADMIN_KEY of the server."},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    named = "".join(part.strip("{}").title() for part in operation.path.replace(".", "/").replace("_", "/").split("/"))
    described: dict[str, Any] = {
        "operationId": f"{operation.method}{named}",
        "summary": operation.summary,
        "security": [] if operation.who == OPEN else [{operation.who: []}],
        "parameters": _parameters(operation),
        "responses": _responses(operation),
    }
    if operation.body:
        content = {"application/json": {"schema": ref(operation.body)}}
        described["requestBody"] = {"required": operation.body_needed, "content": content}
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _PARAMETERS[kind]}
        for name, kind in operation.parameters.items()
    ]
    if operation.takes_lambda:
        found += [{"name": "lambda", "in": "header", "description": "The cost weight.", "schema": WEIGHT}]
    if operation.takes_limit:
        schema = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
        found += [{"name": "limit", "in": "query", "schema": schema}]
    return found


def _responses(operation: Operation) -> dict[str, Any]:
    responses = {str(status): _answer(status, schema) for status, schema in operation.answers.items()}
    for status in operation.all_errors:
        responses.setdefault(str(status), _answer(status, "Error"))
    if operation.any_status:
        responses["default"] = {**_answer(502, "Error"), "description": "What the model itself answered"}
    return responses


def _answer(status: int, schema: str | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if schema == "text":
        answer["content"] = {"text/plain": {"schema": TEXT}}
    elif schema is not None:
        answer["content"] = {"application/json": {"schema": ref(schema)}}
    if schema in _STREAMED:
        answer["content"]["text/event-stream"] = {"schema": ref("Event")}
        answer["headers"] = _DECISION_HEADERS
    return answer
