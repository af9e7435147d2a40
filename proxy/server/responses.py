from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from starlette.responses import Response

from proxy.errors import (
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    BudgetExceeded,
    ClientGone,
    Conflict,
    ControlFieldRefused,
    Forbidden,
    LoopDetected,
    ModelBusy,
    NothingAble,
    NotJson,
    ProxyError,
    RateLimited,
    ShuttingDown,
    Starting,
    TooLong,
    Unauthenticated,
    Unavailable,
    UnknownClientKey,
    UnknownJob,
    UnknownName,
    UpstreamFailure,
    error_object,
)
from proxy.safety.json_shape import check_shape
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import ChangedMeanwhile, DefinedInConfig, KeyIsOver, NameTaken, UnknownKey, UnknownModel
from proxy.upstream.circuit_breaker import told_wait
from proxy.upstream.errors import LONGEST_REST, LONGEST_WORDS, words_in
from proxy.upstream.sse import dump
from router_core.errors import InvalidInput, MapMismatch

_TABLE: Mapping[type[ProxyError], tuple[int, str, str | None]] = {
    BadRequest: (400, "invalid_request_error", None),
    ControlFieldRefused: (400, "invalid_request_error", "field_not_allowed"),
    LoopDetected: (400, "invalid_request_error", "loop_detected"),
    Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "permission_denied"),
    UnknownName: (404, "invalid_request_error", "model_not_found"),
    UnknownJob: (404, "invalid_request_error", "job_not_found"),
    UnknownClientKey: (404, "invalid_request_error", "key_not_found"),
    Conflict: (409, "invalid_request_error", "conflict"),
    BodyTooSlow: (408, "invalid_request_error", "request_timeout"),
    BodyTooLarge: (413, "invalid_request_error", "request_too_large"),
    NotJson: (415, "invalid_request_error", "unsupported_media_type"),
    NothingAble: (400, "invalid_request_error", "no_eligible_model"),
    TooLong: (400, "invalid_request_error", "context_length_exceeded"),
    ModelBusy: (429, "rate_limit_error", "model_busy"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    BudgetExceeded: (429, "insufficient_quota", "insufficient_quota"),
    Unavailable: (503, "server_error", "unavailable"),
    Starting: (503, "server_error", "starting"),
    ShuttingDown: (503, "server_error", "shutting_down"),
    UpstreamFailure: (502, "upstream_error", "upstream_failed"),
}

_OF_STATUS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def plain_error(status: int, message: str) -> dict[str, Any]:
    """OpenAI's shape for a bare HTTP status."""
    kind, code = _OF_STATUS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return error_object(message, kind, code)


def describe(error: ProxyError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that tell `error` to an OpenAI client."""
    if isinstance(error, UpstreamFailure):
        return _describe_upstream(error)
    status, kind, code = next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    return status, error_object(error.message, kind, code, error.param), error.headers


def _describe_upstream(error: UpstreamFailure) -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = told_wait(error.headers, time.time())
    if error.status is None or error.status < 400:
        status, code = (504, "upstream_timeout") if error.timed_out else (502, "upstream_failed")
        return status, error_object(error.message, "upstream_error", code), headers
    return error.status, _own_words(error), headers


def _own_words(error: UpstreamFailure) -> dict[str, Any]:
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


def _not_the_callers_key(error: UpstreamFailure, words: str) -> str:
    """The provider's words alone read as if the caller's own key were wrong."""
    what = "" if error.status == 401 else " for this model or request"
    said = f"; it said: {words.removeprefix(error.message).lstrip(': ')}" if words != error.message else ""
    return f"{error.message}: the provider refused its key{what}, which is this server's and not yours{said}"


def _openais_shape(stated: Mapping[str, Any], said: Any, error: UpstreamFailure) -> dict[str, Any]:
    """Its own fields kept; those that clients read as text are text, and the message is never missing."""
    kind, code = _OF_STATUS.get(error.status or 502, ("upstream_error", None))
    if stated:
        code = _text(stated.get("code"))
    if error.overflow:
        code = "context_length_exceeded"
    message = words_in(stated) or words_in(said) or _with_rest(error.message, said)
    shaped = error_object(message, _text(stated.get("type")) or kind, code, stated.get("param"))["error"]
    kept = {name: value for name, value in stated.items() if name != "object"}
    return {**kept, **shaped}


def _with_rest(message: str, said: Any) -> str:
    """What was said has no words in it: it is shown as it is, cut."""
    return f"{message}: {(_text(said) or '')[:LONGEST_REST]}" if said not in (None, "", {}, []) else message


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _parsed(body: Any) -> Any:
    if not isinstance(body, bytes):
        return body
    try:
        check_shape(body)
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")[:LONGEST_WORDS]


FOREIGN: Mapping[type[Exception], type[ProxyError]] = {
    StoreUnavailable: Unavailable,
    NameTaken: Conflict,
    DefinedInConfig: Conflict,
    ChangedMeanwhile: Conflict,
    KeyIsOver: Conflict,
    UnknownKey: UnknownClientKey,
    UnknownModel: UnknownName,
    InvalidInput: BadRequest,
    MapMismatch: BadRequest,
}


def translated(error: Exception) -> ProxyError:
    kind = next(FOREIGN[kind] for kind in type(error).__mro__ if kind in FOREIGN)
    return kind(str(error), param=getattr(error, "param", None))


TOLD: tuple[type[Exception], ...] = (ProxyError, ClientGone, *FOREIGN)
"""What `response_of` knows."""


def response_of(error: Exception) -> Response:
    """To an exception of TOLD."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    status, body, headers = describe(error if isinstance(error, ProxyError) else translated(error))
    return Response(dump(body), status, headers, "application/json")
