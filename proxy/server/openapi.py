"""What FastAPI cannot know of the OpenAPI document: errors, who may call, and the endpoints that take a chat body."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.utils import deep_dict_update
from pydantic import BaseModel, ConfigDict

from proxy.routing.chat_request import MAX_VALUE, TIMEOUTS
from proxy.server.api.client_apis import CHAT, ROUTE

Schema = dict[str, Any]

MODEL_NAME_SCHEMA: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"}

# The default of a field that may be left out, but is never null.
UNSET: Any = None


def null_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


# Keys are checked by AuthMiddleware, before any endpoint: these only say so.
client_key = HTTPBearer(scheme_name="client", description="A client key, or the admin key.", auto_error=False)

admin_key = HTTPBearer(scheme_name="admin", description="UNIROUTE_ADMIN_KEY of the server.", auto_error=False)


class ErrorDetails(BaseModel):
    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: Any
    code: str | None


class Error(BaseModel):
    """An error as OpenAI writes it."""

    model_config = ConfigDict(extra="allow")

    error: ErrorDetails


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error} for status in statuses}


# Of every endpoint that needs a key: a path that cannot be, no valid key, a Host, Origin or role that may not, and a
# server that is full or without its store.
COMMON_ERRORS = errors(400, 401, 403, 503)

# A body that comes too slowly, is too large, or is no JSON.
BODY_ERRORS = errors(408, 413, 415)


def operation_id(route: APIRoute) -> str:
    """Name an operation by its method and path: getAdminKeysKeyId."""
    method = min(route.methods or ())
    parts = route.path_format.replace(".", "/").replace("_", "/").split("/")
    return method.lower() + "".join(part.strip("{}").title() for part in parts)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Add the client's side to the document that FastAPI generates, in place.

    Wrong bodies are answered with 400, so FastAPI's own 422 goes.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(CLIENT_SCHEMAS)
    for path, operation in CLIENT_OPERATIONS.items():
        deep_dict_update(document["paths"][path]["post"], operation)
    return document


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(properties: Mapping[str, Schema], *required: str, **more: Any) -> Schema:
    """`more`: additionalProperties=False if other keys are refused."""
    return {"type": "object", "properties": dict(properties), "required": list(required), **more}


_TEXT: Schema = {"type": "string"}

_NUMBER: Schema = {"type": "number"}

_COUNT: Schema = {"type": "integer", "minimum": 0}

_WEIGHT: Schema = {"type": "number", "minimum": 0, "maximum": MAX_VALUE}

_SECONDS: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_VALUE}

_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}

_ANY_OBJECT: Schema = {"type": "object", "additionalProperties": True}

CLIENT_SCHEMAS: Mapping[str, Schema] = {
    "ChatBody": _object(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "messages": _array(_ANY_OBJECT, minItems=1, example=[{"role": "user", "content": "What is 2 + 2?"}]),
            "stream": null_or({"type": "boolean"}),
            "stream_options": null_or(_ANY_OBJECT),
            "uniroute": _ref("Options"),
        },
        *("model", "messages"),
        description="OpenAI's body. Fields that are not listed reach the chosen model as they are; those that would"
        " steer the provider layer (api_base, api_key, extra_headers …) are refused.",
    ),
    "Options": _object(
        {
            "lambda": null_or(_WEIGHT),
            "models": null_or(_array({"type": "string", "minLength": 1}, minItems=1)),
            "max_cost_usd": null_or(_WEIGHT),
            "latency_weight": null_or(_WEIGHT),
            "session": null_or({"type": "string", "minLength": 1, "maxLength": 255}),
            "fallbacks": null_or({"type": "boolean"}),
            "timeouts": null_or(_object(dict.fromkeys(TIMEOUTS, null_or(_SECONDS)), additionalProperties=False)),
        },
        additionalProperties=False,
    ),
    "Completion": _object({"model": _TEXT, "choices": _array(_ANY_OBJECT), "usage": {}}, "model", "choices"),
    "Event": _object({"data": _TEXT}, "data", description="A chunk of OpenAI's as JSON, an error object, or [DONE]."),
    "Decision": _object(
        {
            "decision": _TEXT,
            "model": _TEXT,
            "reason": _TEXT,
            "lambda": {"type": "number", "minimum": 0},
            "max_tokens": null_or(
                _object({"stated": _COUNT, "sent": _COUNT}, "stated", "sent", additionalProperties=False)
            ),
            "clusters": _array(
                _object(
                    {"id": _COUNT, "name": _TEXT, "weight": _SHARE}, "id", "name", "weight", additionalProperties=False
                )
            ),
            "candidates": _array(
                _object(
                    {
                        "model": _TEXT,
                        "expected_error": _SHARE,
                        "error_low": _SHARE,
                        "error_high": _SHARE,
                        "expected_cost_usd": _NUMBER,
                        "cost": _NUMBER,
                        "score": _NUMBER,
                        "flips_at_lambda": null_or({"type": "number", "minimum": 0}),
                    },
                    "model",
                )
            ),
            "ineligible": _array(_object({"model": _TEXT, "why": _TEXT}, "model", "why", additionalProperties=False)),
        },
        *("decision", "model", "reason", "lambda", "max_tokens", "clusters", "candidates", "ineligible"),
    ),
}

_DECISION_HEADERS = {
    name: {"schema": _TEXT}
    for name in (
        "x-uniroute-model",
        "x-uniroute-decision",
        "x-uniroute-reason",
        "x-uniroute-overhead-ms",
        "x-uniroute-max-tokens",
    )
}


def _json_of(schema: str) -> Schema:
    return {"application/json": {"schema": _ref(schema)}}


def _error_responses(*statuses: int) -> Schema:
    return {
        str(status): {"description": HTTPStatus(status).phrase, "content": _json_of("Error")} for status in statuses
    }


_CHAT_OPERATION: Schema = {
    "tags": ["chat"],
    "security": [{"client": []}],
    "parameters": [{"name": "lambda", "in": "header", "description": "The cost weight.", "schema": _WEIGHT}],
    "requestBody": {"required": True, "content": _json_of("ChatBody")},
    "responses": _error_responses(400, 401, 403, 404, 408, 413, 415, 503),
}

CLIENT_OPERATIONS: Mapping[str, Schema] = {
    CHAT.path: {
        **_CHAT_OPERATION,
        "summary": "Ask the model that is chosen for this prompt",
        "responses": {
            "200": {
                "description": "OK",
                "content": {**_json_of("Completion"), "text/event-stream": {"schema": _ref("Event")}},
                "headers": _DECISION_HEADERS,
            },
            **_CHAT_OPERATION["responses"],
            # a model's own status passes through; these are the usual ones
            **_error_responses(402, 409, 422, 429, 500, 502, 504),
            "default": {"description": "What the model itself answered", "content": _json_of("Error")},
        },
    },
    ROUTE: {
        **_CHAT_OPERATION,
        "summary": "The decision for a chat body, nothing forwarded",
        "responses": {
            "200": {"description": "OK", "content": _json_of("Decision")},
            **_CHAT_OPERATION["responses"],
        },
    },
}
