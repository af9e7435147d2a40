"""What the proxy says no with, and how each is said over HTTP. No request, no response object.

ProxyError
├── BadRequest               400  the caller's body or headers; `param` names the field
│   ├── ControlFieldRefused  400  a field that would steer the provider layer
│   └── LoopDetected         400  it has passed this router before, or too many
├── Unauthenticated          401  no key, or not one of ours
├── Forbidden                403  the key, Host or Origin may not do this
├── UnknownName              404  a model that does not exist
│   ├── UnknownJob           404
│   └── UnknownClientKey     404
├── Conflict                 409  the name is taken, or the configuration file owns it
├── BodyTooSlow              408  the rest of the body did not come
├── BodyTooLarge             413
├── NotJson                  415  content type or encoding
├── NothingAble              400  no candidate can take this request; says why, per model
│   └── TooLong              400  for the context window of every candidate
├── ModelBusy                429  as many requests as it may be asked at once, and its queue is full
├── RateLimited              429  the key may not send so much so soon
│   └── BudgetExceeded       429  the key has spent what it may
├── Unavailable              503  nothing to route to yet, or the store is away
│   └── NotMeasured          503  no model that could answer is measured yet
└── UpstreamFailure               a model did not answer: its own status and body, or 502, 504
ClientGone                        nobody is left to answer
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

RETRYABLE = frozenset({408, 429})
"""And every 5xx: the next model in rank may still answer."""

_KEPT_HEADERS = ("retry-after", "retry-after-ms")


class ClientGone(Exception):
    """The client closed its connection."""


class ProxyError(Exception):
    """The root. `param` names the offending field in the caller's own words; `headers` go with the response."""

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class BadRequest(ProxyError):
    """A body or header that the caller can correct."""


class ControlFieldRefused(BadRequest):
    """A field that would choose addresses, keys or behaviour of the provider layer."""


class LoopDetected(BadRequest):
    """Routers that lead to one another. Not a 5xx, which each of them would try again elsewhere."""


class Unauthenticated(ProxyError):
    """No key, or a key that is not ours."""


class Forbidden(ProxyError):
    """Known caller, closed door."""


class UnknownName(ProxyError):
    """A model by a name that nobody has."""


class UnknownJob(UnknownName):
    """A job by an id that none has."""


class UnknownClientKey(UnknownName):
    """A client key by an id that none has."""


class Conflict(ProxyError):
    """The name is taken, or its definition lives elsewhere."""


class BodyTooSlow(ProxyError):
    """A body that stopped in its middle."""


class BodyTooLarge(ProxyError):
    """More bytes than `max_body_bytes`."""


class NotJson(ProxyError):
    """Another content type, or a compressed body."""


class NothingAble(ProxyError):
    """There are models, and none can take this request."""


class TooLong(NothingAble):
    """More tokens than any candidate's context window."""


class ModelBusy(ProxyError):
    """A model has no place for this request; `retry_after_s` says when it probably has."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, param="model", headers={"retry-after": str(math.ceil(retry_after_s))})
        self.retry_after_s = retry_after_s


class RateLimited(ProxyError):
    """A limit of the key: more requests or tokens than it may use so soon."""


class BudgetExceeded(RateLimited):
    """A limit of the key: it has spent what it may, or has set it aside."""


class Unavailable(ProxyError):
    """Not now: no model is routable yet, or the store cannot be written."""


class NotMeasured(Unavailable):
    """No candidate is measured yet. `why` says of each what it lacks."""

    def __init__(self, message: str, why: Mapping[str, str], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.why = why


class UpstreamFailure(ProxyError):
    """A model did not answer. status None: nothing came back at all."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        body: Mapping[str, Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        retryable: bool | None = None,
        timed_out: bool = False,
        lost: bool = False,
        overflow: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.headers = {name.lower(): text for name, text in (headers or {}).items() if name.lower() in _KEPT_HEADERS}
        self.timed_out = timed_out
        self.lost = lost
        """The connection was there, and died before a byte of an answer: worth asking the same model once more."""
        self.overflow = overflow
        """The prompt is longer than this model's context window; another's may be larger."""
        self.retryable = _is_retryable(status) if retryable is None else retryable

    @property
    def retry_after(self) -> str | None:
        return self.headers.get("retry-after")


def _is_retryable(status: int | None) -> bool:
    return status is None or status in RETRYABLE or status >= 500


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


def error_object(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
    if error.status is None or error.status < 400:
        status, code = (504, "upstream_timeout") if error.timed_out else (502, "upstream_failed")
        return status, error_object(error.message, "upstream_error", code), error.headers
    return error.status, _own_words(error), error.headers


def _own_words(error: UpstreamFailure) -> dict[str, Any]:
    """The upstream's error object in OpenAI's shape, with `code` as text; other texts put into that shape."""
    body = _parsed(error.body)
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        shaped = {**body, "error": _openais_shape(body["error"], error.message)}
    else:
        kind, code = _OF_STATUS.get(error.status or 502, ("upstream_error", None))
        shaped = error_object(_words_of(body) or error.message, kind, code)
    if error.status in (401, 403):
        shaped["error"]["message"] = _not_the_callers_key(error, shaped["error"]["message"])
    if error.overflow:
        shaped["error"]["code"] = shaped["error"]["code"] or "context_length_exceeded"
    return shaped


def _not_the_callers_key(error: UpstreamFailure, words: str) -> str:
    """The provider's words alone read as if the caller's own key were wrong."""
    what = "" if error.status == 401 else " for this model or request"
    said = f"; it said: {words}" if words != error.message else ""
    return f"{error.message}: the provider refused its key{what}, which is this server's and not yours{said}"


def _openais_shape(stated: Mapping[str, Any], message: str) -> dict[str, Any]:
    """Its own fields kept; those that clients read as text are text, and the message is never missing."""
    said = _text(stated.get("message")) or message
    kind = _text(stated.get("type")) or "upstream_error"
    shaped = error_object(said, kind, _text(stated.get("code")), stated.get("param"))["error"]
    return {**stated, **shaped}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _parsed(body: Mapping[str, Any] | bytes | None) -> Any:
    if not isinstance(body, bytes):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")[:2000]


def _words_of(body: Any) -> str | None:
    """Error texts of servers that do not follow OpenAI: {"error": "…"}, {"detail": "…"}, plain text."""
    if isinstance(body, str):
        return body.strip() or None
    if isinstance(body, Mapping):
        for name in ("error", "message", "detail"):
            if body.get(name):
                return _text(body[name])
    return None
