"""The OpenAPI document, put together from the table of operations and the schemas. Pure."""

from __future__ import annotations

from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from proxy.openapi.key_schemas import KEYS
from proxy.openapi.operations import OPEN, OPERATIONS, Operation
from proxy.openapi.schemas import ANSWERS, BODIES, FREE, NAME, TEXT, WEIGHT, Schema, ref

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
