"""What FastAPI cannot know of the OpenAPI document: errors, who may call, and the endpoints that take a chat body."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.utils import deep_dict_update
from pydantic import BaseModel, ConfigDict

from proxy.routing.chat_request import TIMEOUTS
from proxy.server.api.client_apis import (
    CHAT,
    COUNT_TOKENS,
    INPUT_TOKENS,
    MESSAGES,
    MODELS,
    RESPONSES,
    ROUTE,
    TEXT_COMPLETIONS,
)
from proxy.settings.model_config import MAX_AMOUNT, MIN_SECONDS
from proxy.storage.client_keys import MAX_TAG_CHARS, MAX_TAGS

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
    for path, operations in document["paths"].items():
        if path.startswith(MODELS):  # clients of OpenAI's and of Anthropic's API ask here
            for status, response in operations["get"]["responses"].items():
                if not status.startswith("2"):
                    response["content"] = {
                        "application/json": {"schema": {"anyOf": [_ref("Error"), _ref("MessagesError")]}}
                    }
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

_WEIGHT: Schema = {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT}

_SECONDS: Schema = {"type": "number", "minimum": MIN_SECONDS, "maximum": MAX_AMOUNT}

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
            "tags": null_or(_array({"type": "string", "minLength": 1, "maxLength": MAX_TAG_CHARS}, maxItems=MAX_TAGS)),
            "metadata": null_or({"type": "boolean"}),
        },
        additionalProperties=False,
    ),
    "MessagesBody": _object(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "messages": _array(_ANY_OBJECT, minItems=1, example=[{"role": "user", "content": "What is 2 + 2?"}]),
            "max_tokens": {"type": "integer", "minimum": 1, "example": 1000},
            "stream": null_or({"type": "boolean"}),
            "uniroute": _ref("Options"),
        },
        *("model", "messages", "max_tokens"),
        description="Anthropic's body. What the chosen model cannot read is left out, and named in a header.",
    ),
    "CountTokensBody": _object(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "messages": _array(_ANY_OBJECT, minItems=1, example=[{"role": "user", "content": "What is 2 + 2?"}]),
        },
        *("model", "messages"),
        description="Anthropic's body of a request, without a limit.",
    ),
    "InputTokensBody": _object(
        {
            "model": null_or({"type": "string", "minLength": 1, "example": "auto"}),
            "input": {"oneOf": [_TEXT, _array(_ANY_OBJECT)], "example": "What is 2 + 2?"},
            "previous_response_id": null_or(_TEXT),
        },
        description="OpenAI's body of a response.",
    ),
    "ResponsesBody": _object(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "input": {"anyOf": [_TEXT, _array(_ANY_OBJECT)], "example": "What is 2 + 2?"},
            "stream": null_or({"type": "boolean"}),
            "uniroute": _ref("Options"),
        },
        *("model", "input"),
        description="The body of OpenAI's Responses API. What the chosen model cannot be sent is left out, and named in"
        " a header.",
    ),
    "TextCompletionBody": _object(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "prompt": {"anyOf": [_TEXT, _array(_TEXT, minItems=1, maxItems=1)], "example": "What is 2 + 2?"},
            "stream": null_or({"type": "boolean"}),
            "uniroute": _ref("Options"),
        },
        *("model", "prompt"),
        description="OpenAI's older body, with one prompt.",
    ),
    "Message": _object(
        {"id": _TEXT, "type": _TEXT, "role": _TEXT, "model": _TEXT, "content": _array(_ANY_OBJECT), "usage": {}},
        *("id", "type", "role", "model", "content", "usage"),
    ),
    "MessagesError": _object(
        {"type": {"const": "error"}, "error": _object({"type": _TEXT, "message": _TEXT}, "type", "message")},
        *("type", "error"),
        description="An error as Anthropic writes it.",
    ),
    "TokenCount": _object({"input_tokens": _COUNT}, "input_tokens"),
    "InputTokenCount": _object(
        {"object": {"const": "response.input_tokens"}, "input_tokens": _COUNT}, "object", "input_tokens"
    ),
    "Response": _object(
        {"id": _TEXT, "object": {"const": "response"}, "status": _TEXT, "model": _TEXT, "output": _array(_ANY_OBJECT)},
        *("id", "object", "status", "model", "output"),
    ),
    "TextCompletion": _object(
        {"id": _TEXT, "object": {"const": "text_completion"}, "model": _TEXT, "choices": _array(_ANY_OBJECT)},
        *("object", "model", "choices"),
    ),
    "Completion": _object({"model": _TEXT, "choices": _array(_ANY_OBJECT), "usage": {}}, "model", "choices"),
    "Event": _object({"data": _TEXT}, "data", description="An event of the API as JSON, an error object, or [DONE]."),
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
                        "trajectory_error": _SHARE,
                        "tool_error": {"type": "number", "minimum": -1, "maximum": 1},
                        "expected_cost_usd": _NUMBER,
                        "cost": _NUMBER,
                        "score": _NUMBER,
                        "flips_at_lambda": null_or({"type": "number", "minimum": 0}),
                    },
                    "model",
                )
            ),
            "trajectory": null_or(
                _object({"stuck": _SHARE, "failed": _SHARE, "repeated": _SHARE, "reverted": _SHARE, "turns": _COUNT})
            ),
            "preset": _object(
                {
                    "lambda": null_or(_WEIGHT),
                    "models": null_or(_array(_TEXT)),
                    "max_cost_usd": null_or(_WEIGHT),
                },
                description="What the name that was asked for stands for, if it is a preset's.",
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
        "x-uniroute-left-out",
    )
}


def _json_of(schema: str) -> Schema:
    return {"application/json": {"schema": _ref(schema)}}


def _error_responses(*statuses: int, schema: str = "Error") -> Schema:
    return {
        str(status): {"description": _PHRASES.get(status) or HTTPStatus(status).phrase, "content": _json_of(schema)}
        for status in statuses
    }


# Of statuses that the standard does not know.
_PHRASES = {529: "Overloaded"}

# Before a model is asked.
_REFUSALS = (400, 401, 403, 404, 408, 413, 415, 503)

# A model's own status passes through; these are the usual ones.
_FAILURES = (402, 409, 422, 429, 500, 502, 504)


_LAMBDA: Schema = {"name": "lambda", "in": "header", "description": "The cost weight.", "schema": _WEIGHT}


def _operation(summary: str, body: str, answer: str, error: str = "Error") -> Schema:
    """Describe a call that asks no model."""
    return {
        "tags": ["chat"],
        "summary": summary,
        "security": [{"client": []}],
        "requestBody": {"required": True, "content": _json_of(body)},
        "responses": {
            "200": {"description": "OK", "content": _json_of(answer)},
            **_error_responses(*_REFUSALS, schema=error),
        },
    }


def _completion_operation(summary: str, body: str, answer: str, error: str = "Error") -> Schema:
    """Describe a call that asks a model, streamed or not."""
    operation = _operation(summary, body, answer, error)
    content = {**_json_of(answer), "text/event-stream": {"schema": _ref("Event")}}
    operation["parameters"] = [_LAMBDA]
    operation["responses"] |= {
        "200": {"description": "OK", "content": content, "headers": _DECISION_HEADERS},
        **_error_responses(*_FAILURES, schema=error),
        "default": {"description": "What the model itself answered", "content": _json_of(error)},
    }
    return operation


CLIENT_OPERATIONS: Mapping[str, Schema] = {
    CHAT.path: _completion_operation("Ask the model that is chosen for this prompt", "ChatBody", "Completion"),
    MESSAGES.path: _completion_operation(
        "The same for clients of Anthropic's API", "MessagesBody", "Message", "MessagesError"
    ),
    RESPONSES.path: _completion_operation("The same for clients of OpenAI's Responses", "ResponsesBody", "Response"),
    TEXT_COMPLETIONS.path: _completion_operation(
        "The same for clients of OpenAI's older completions", "TextCompletionBody", "TextCompletion"
    ),
    COUNT_TOKENS: _operation("Estimate the tokens of a request", "CountTokensBody", "TokenCount", "MessagesError"),
    INPUT_TOKENS: _operation("Estimate the tokens of a request", "InputTokensBody", "InputTokenCount"),
    ROUTE: {
        **_operation("The decision for a chat body, nothing forwarded", "ChatBody", "Decision"),
        "parameters": [_LAMBDA],
    },
}
