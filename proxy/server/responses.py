from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from starlette.responses import Response

from proxy.errors import (
    BadRequest,
    BodyTimeout,
    BudgetExceeded,
    ClientDisconnected,
    Conflict,
    ContentTooLarge,
    ContextLengthExceeded,
    FieldNotAllowed,
    Forbidden,
    JobNotFound,
    KeyNotFound,
    LoopDetected,
    ModelAtCapacity,
    ModelNotFound,
    NoEligibleModelError,
    ProxyError,
    RateLimited,
    ServiceUnavailable,
    ShuttingDown,
    Starting,
    Unauthenticated,
    UnsupportedMediaType,
    UpstreamError,
    error_body,
)
from proxy.json_limits import check_limits
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import ConfiguredModel, ConflictingWrite, KeyInactive, ModelExists, UnknownKey, UnknownModel
from proxy.upstream.circuit_breaker import retry_after_headers
from proxy.upstream.errors import MAX_MESSAGE_CHARS, MAX_UNKNOWN_CHARS, message_in
from proxy.upstream.sse import encode_json
from router_core.errors import InvalidInput, MapMismatch

_TABLE: Mapping[type[ProxyError], tuple[int, str, str | None]] = {
    BadRequest: (400, "invalid_request_error", None),
    FieldNotAllowed: (400, "invalid_request_error", "field_not_allowed"),
    LoopDetected: (400, "invalid_request_error", "loop_detected"),
    Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "permission_denied"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    JobNotFound: (404, "invalid_request_error", "job_not_found"),
    KeyNotFound: (404, "invalid_request_error", "key_not_found"),
    Conflict: (409, "invalid_request_error", "conflict"),
    BodyTimeout: (408, "invalid_request_error", "request_timeout"),
    ContentTooLarge: (413, "invalid_request_error", "request_too_large"),
    UnsupportedMediaType: (415, "invalid_request_error", "unsupported_media_type"),
    NoEligibleModelError: (400, "invalid_request_error", "no_eligible_model"),
    ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    ModelAtCapacity: (429, "rate_limit_error", "model_busy"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    BudgetExceeded: (429, "insufficient_quota", "insufficient_quota"),
    ServiceUnavailable: (503, "server_error", "unavailable"),
    Starting: (503, "server_error", "starting"),
    ShuttingDown: (503, "server_error", "shutting_down"),
    UpstreamError: (502, "upstream_error", "upstream_failed"),
}

_OF_STATUS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def http_error_body(status: int, message: str) -> dict[str, Any]:
    """OpenAI's shape for a bare HTTP status."""
    kind, code = _OF_STATUS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return error_body(message, kind, code)


def render_error(error: ProxyError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that tell `error` to an OpenAI client."""
    if isinstance(error, UpstreamError):
        return _describe_upstream(error)
    status, kind, code = next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    return status, error_body(error.message, kind, code, error.param), error.headers


def _describe_upstream(error: UpstreamError) -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = retry_after_headers(error.headers, time.time())
    if error.status is None or error.status < 400:
        status, code = (504, "upstream_timeout") if error.timed_out else (502, "upstream_failed")
        return status, error_body(error.message, "upstream_error", code), headers
    return error.status, _upstream_error_body(error), headers


def _upstream_error_body(error: UpstreamError) -> dict[str, Any]:
    """The upstream's error object in OpenAI's shape, with `code` as text; other texts put into that shape."""
    body = _parsed(error.body)
    said = _first_of(body)
    stated = _error_object_in(said)
    shaped = _openais_shape(stated, said, error)
    if error.status in (401, 403):
        shaped["message"] = _not_the_callers_key(error, shaped["message"])
    beside = said if isinstance(said, Mapping) and said.get("error") is stated else {}
    return {**{name: value for name, value in beside.items() if name != "usage"}, "error": shaped}


def _first_of(body: Any) -> Any:
    """Gemini sends a list with one error in it."""
    return next((each for each in body if isinstance(each, Mapping)), body) if isinstance(body, list) else body


def _error_object_in(said: Any) -> Mapping[str, Any]:
    """The object that has the error's fields: `error`, or all of it, as vLLM and Mistral write it; else none."""
    if not isinstance(said, Mapping):
        return {}
    if isinstance(said.get("error"), Mapping):
        return cast(Mapping[str, Any], said["error"])
    return said if said.get("object") == "error" else {}


def _not_the_callers_key(error: UpstreamError, words: str) -> str:
    """The provider's words alone read as if the caller's own key were wrong."""
    what = "" if error.status == 401 else " for this model or request"
    said = f"; it said: {words.removeprefix(error.message).lstrip(': ')}" if words != error.message else ""
    return f"{error.message}: the provider refused its key{what}, which is this server's and not yours{said}"


def _openais_shape(stated: Mapping[str, Any], said: Any, error: UpstreamError) -> dict[str, Any]:
    """Its own fields kept; those that clients read as text are text, and the message is never missing."""
    kind, code = _OF_STATUS.get(error.status or 502, ("upstream_error", None))
    if stated:
        code = _text(stated.get("code"))
    if error.context_exceeded:
        code = "context_length_exceeded"
    message = message_in(stated) or message_in(said) or _with_rest(error.message, said)
    shaped = error_body(message, _text(stated.get("type")) or kind, code, stated.get("param"))["error"]
    kept = {name: value for name, value in stated.items() if name != "object"}
    return {**kept, **shaped}


def _with_rest(message: str, said: Any) -> str:
    """What was said has no words in it: it is shown as it is, cut."""
    return f"{message}: {(_text(said) or '')[:MAX_UNKNOWN_CHARS]}" if said not in (None, "", {}, []) else message


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


EXCEPTION_MAP: Mapping[type[Exception], type[ProxyError]] = {
    StoreUnavailable: ServiceUnavailable,
    ModelExists: Conflict,
    ConfiguredModel: Conflict,
    ConflictingWrite: Conflict,
    KeyInactive: Conflict,
    UnknownKey: KeyNotFound,
    UnknownModel: ModelNotFound,
    InvalidInput: BadRequest,
    MapMismatch: BadRequest,
}


def to_proxy_error(error: Exception) -> ProxyError:
    kind = next(EXCEPTION_MAP[kind] for kind in type(error).__mro__ if kind in EXCEPTION_MAP)
    return kind(str(error), param=getattr(error, "param", None))


HANDLED_EXCEPTIONS: tuple[type[Exception], ...] = (ProxyError, ClientDisconnected, *EXCEPTION_MAP)
"""What `error_response` knows."""


def error_response(error: Exception) -> Response:
    """To an exception of TOLD."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=499)
    status, body, headers = render_error(error if isinstance(error, ProxyError) else to_proxy_error(error))
    return Response(encode_json(body), status, headers, "application/json")
