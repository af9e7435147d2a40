"""Exceptions of ours as HTTP responses. `upstream/errors.py` makes an exception of what an upstream answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from proxy.errors import (
    SHUTTING_DOWN_MESSAGE,
    BadRequest,
    BodyTimeout,
    BudgetExceeded,
    ClientDisconnected,
    Conflict,
    ContentTooLarge,
    ContextLengthExceeded,
    DecisionNotFound,
    FieldNotAllowed,
    Forbidden,
    JobNotFound,
    KeyNotFound,
    LoopDetected,
    ModelAtCapacity,
    ModelNotFound,
    ModelPaused,
    NoEligibleModelError,
    PreviousResponseNotFound,
    RateLimited,
    ResponseNotFound,
    ServiceUnavailable,
    ShuttingDown,
    Starting,
    ThreadNotSupported,
    Unauthenticated,
    UnsupportedMediaType,
    UpstreamError,
    error_body,
)
from proxy.json_text import check_limits, encode_json
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import (
    ConfiguredModel,
    ConflictingWrite,
    EffortOfModel,
    KeyInactive,
    ModelExists,
    UnknownKey,
    UnknownModel,
)
from proxy.upstream.circuit_breaker import retry_after_headers
from proxy.upstream.errors import MAX_MESSAGE_CHARS, MAX_UNKNOWN_CHARS, message_in
from router_core.errors import InvalidInput, MapMismatch

# What an exception is answered with: status, and `type` and `code` of OpenAI's error object. A class stands for those
# below it that are not listed. An UpstreamError has its own status and body, if the upstream answered.
ERROR_ANSWERS: Mapping[type[Exception], tuple[int, str, str | None]] = {
    BadRequest: (400, "invalid_request_error", None),
    InvalidInput: (400, "invalid_request_error", None),
    MapMismatch: (400, "invalid_request_error", None),
    FieldNotAllowed: (400, "invalid_request_error", "field_not_allowed"),
    ThreadNotSupported: (400, "invalid_request_error", "thread_unsupported_request"),
    LoopDetected: (400, "invalid_request_error", "loop_detected"),
    NoEligibleModelError: (400, "invalid_request_error", "no_eligible_model"),
    ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "permission_denied"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    JobNotFound: (404, "invalid_request_error", "job_not_found"),
    KeyNotFound: (404, "invalid_request_error", "key_not_found"),
    DecisionNotFound: (404, "invalid_request_error", "decision_not_found"),
    ResponseNotFound: (404, "invalid_request_error", "response_not_found"),
    PreviousResponseNotFound: (404, "invalid_request_error", "previous_response_not_found"),
    UnknownKey: (404, "invalid_request_error", "key_not_found"),
    BodyTimeout: (408, "invalid_request_error", "request_timeout"),
    Conflict: (409, "invalid_request_error", "conflict"),
    ModelExists: (409, "invalid_request_error", "conflict"),
    EffortOfModel: (409, "invalid_request_error", "conflict"),
    ConfiguredModel: (409, "invalid_request_error", "conflict"),
    ConflictingWrite: (409, "invalid_request_error", "conflict"),
    KeyInactive: (409, "invalid_request_error", "conflict"),
    ContentTooLarge: (413, "invalid_request_error", "request_too_large"),
    UnsupportedMediaType: (415, "invalid_request_error", "unsupported_media_type"),
    ModelAtCapacity: (429, "rate_limit_error", "model_busy"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    BudgetExceeded: (429, "insufficient_quota", "insufficient_quota"),
    UpstreamError: (502, "upstream_error", "upstream_failed"),
    ServiceUnavailable: (503, "server_error", "unavailable"),
    StoreUnavailable: (503, "server_error", "unavailable"),
    Starting: (503, "server_error", "starting"),
    ShuttingDown: (503, "server_error", "shutting_down"),
    ModelPaused: (503, "server_error", "model_paused"),
}

RETRY_AFTER_S = "1"

HANDLED_EXCEPTIONS: tuple[type[Exception], ...] = (ClientDisconnected, *ERROR_ANSWERS)


def error_response(error: Exception) -> Response:
    """Answer an exception of HANDLED_EXCEPTIONS."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=499)
    status, body, headers = render_error(error)
    return Response(encode_json(body), status, headers, "application/json")


def internal_error_body(request_id: str) -> dict[str, Any]:
    """Say that we failed, and nothing of what failed: that is in the log."""
    return error_body(f"an error of ours, logged under request id {request_id}", "server_error", "internal_error")


def shutting_down() -> ShuttingDown:
    """Return the error of a request that the end of the server interrupts before its answer has begun."""
    return ShuttingDown(SHUTTING_DOWN_MESSAGE, headers={"retry-after": RETRY_AFTER_S, "connection": "close"})


def too_many_connections_body() -> dict[str, Any]:
    return error_body("this server has no room for one more connection", "server_error", "too_many_connections")


async def handle_error(_: Request, error: Exception) -> Response:
    return error_response(error)


def render_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the status, body and headers of the answer to a class of ERROR_ANSWERS."""
    if isinstance(error, UpstreamError):
        return _render_upstream_error(error)
    status, kind, code = next(ERROR_ANSWERS[kind] for kind in type(error).__mro__ if kind in ERROR_ANSWERS)
    return status, error_body(str(error), kind, code, getattr(error, "param", None)), getattr(error, "headers", {})


# `type` and `code` for a status without an error of its own.
_OF_STATUS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def http_error_body(status: int, message: str) -> dict[str, Any]:
    """Put a bare HTTP status into OpenAI's shape."""
    kind, code = _OF_STATUS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return error_body(message, kind, code)


def _render_upstream_error(error: UpstreamError) -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = retry_after_headers(error.headers, time.time())
    if error.status is None or error.status < 400:
        status, code = (504, "upstream_timeout") if error.timed_out else (502, "upstream_failed")
        return status, error_body(error.message, "upstream_error", code), headers
    return error.status, _upstream_error_body(error), headers


def _upstream_error_body(error: UpstreamError) -> dict[str, Any]:
    """Return the upstream's error object in OpenAI's shape, or its text put into that shape."""
    body = _parsed(error.body)
    if isinstance(body, list):  # Gemini sends a list with one error in it
        body = next((each for each in body if isinstance(each, Mapping)), body)
    original = _error_object_in(body)
    shaped = _in_openais_shape(original, body, error)
    if error.status in (401, 403):
        shaped["message"] = _not_the_callers_key(error, shaped["message"])
    beside = body if isinstance(body, Mapping) and body.get("error") is original else {}
    return {**{name: value for name, value in beside.items() if name != "usage"}, "error": shaped}


def _error_object_in(body: Any) -> Mapping[str, Any]:
    """Return the object that has the error's fields: `error`, or all of it, as vLLM and Mistral write it; else none."""
    if not isinstance(body, Mapping):
        return {}
    if isinstance(body.get("error"), Mapping):
        return cast(Mapping[str, Any], body["error"])
    return body if body.get("object") == "error" else {}


def _not_the_callers_key(error: UpstreamError, message: str) -> str:
    """Say whose key it was: the provider's words alone read as if the caller's own were wrong."""
    what = "" if error.status == 401 else " for this model or request"
    said = f"; it said: {message.removeprefix(error.message).lstrip(': ')}" if message != error.message else ""
    return f"{error.message}: the provider refused its key{what}, which is this server's and not yours{said}"


def _in_openais_shape(original: Mapping[str, Any], body: Any, error: UpstreamError) -> dict[str, Any]:
    """Keep the error's own fields; make text of those that clients read as text, and never leave out the message."""
    kind, code = _OF_STATUS.get(error.status or 502, ("upstream_error", None))
    if original:
        code = _text(original.get("code"))
    if error.context_exceeded:
        code = "context_length_exceeded"
    message = message_in(original) or message_in(body) or _with_body(error.message, body)
    shaped = error_body(message, _text(original.get("type")) or kind, code, original.get("param"))["error"]
    kept = {name: value for name, value in original.items() if name != "object"}
    return {**kept, **shaped}


def _with_body(message: str, body: Any) -> str:
    """Add the start of a body in which no message was found."""
    return f"{message}: {(_text(body) or '')[:MAX_UNKNOWN_CHARS]}" if body not in (None, "", {}, []) else message


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _parsed(body: Any) -> Any:
    if not isinstance(body, bytes):
        return body
    try:
        check_limits(body)
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")[:MAX_MESSAGE_CHARS]
