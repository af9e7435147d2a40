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
│   ├── Starting             503  the server is not ready yet
│   ├── ShuttingDown         503  the server ends, and this answer with it
│   └── NotMeasured          503  no model that could answer is measured yet
└── UpstreamFailure               a model did not answer: its own status and body, or 502, 504
    ├── AnswerTooLarge       502  more bytes, levels or values than are read
    └── OwnFault             503  this process could not do its part; the model was not to blame
        ├── NoRoomForAnswer       the answers that are held already take all the memory they may
        └── CannotTranslate       litellm cannot be imported for now
ClientGone                        nobody is left to answer
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any, cast

from proxy.safety.json_shape import check_shape
from proxy.upstream.circuit_breaker import NAMES, told_wait

RETRYABLE = frozenset({408, 429})
"""And every 5xx: the next model in rank may still answer."""

MOST_ERROR_BYTES = 16 * 2**10
"""Of what an upstream says of its failure."""


SHUTTING_DOWN = "this server is shutting down, and the time that open answers had is over; send it again"
LAST_WORDS_S = 1.0
"""A client that does not read is told so no longer."""


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


class Starting(Unavailable):
    """Not yet: what the server needs is still being read or made."""


class ShuttingDown(Unavailable):
    """Not any more: the time that open answers were given is over."""


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
        body: Mapping[str, Any] | list[Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        retryable: bool | None = None,
        timed_out: bool = False,
        lost: bool = False,
        overflow: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body[:MOST_ERROR_BYTES] if isinstance(body, bytes) else body
        stated = {name.lower(): text for name, text in (headers or {}).items()}
        self.headers = {name: stated[name] for name in NAMES if name in stated}
        self.timed_out = timed_out
        self.lost = lost
        """The connection was there, and died before a byte of an answer: worth asking the same model once more."""
        self.overflow = overflow
        """The prompt is longer than this model's context window; another's may be larger."""
        self.retryable = _is_retryable(status) if retryable is None else retryable


class AnswerTooLarge(UpstreamFailure):
    """More of an answer than is read. Callers can bring that about, so it does not count against the model."""


class OwnFault(UpstreamFailure):
    """This process could not do its part: that says nothing of the model."""

    def __init__(self, message: str, *, retry_after_s: float, retryable: bool) -> None:
        body = error_object(message, "server_error", "unavailable")
        headers = {"retry-after": str(math.ceil(retry_after_s))}
        super().__init__(message, status=503, body=body, headers=headers, retryable=retryable)


class NoRoomForAnswer(OwnFault):
    """This process holds as much of answers as it may; no other model would do better."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1, retryable=False)


class CannotTranslate(OwnFault):
    """litellm cannot be imported for now; a model that is relayed may still answer."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s, retryable=True)


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


LONGEST_WORDS = 2000
"""Characters of an upstream's text that are passed on."""
LONGEST_REST = 500
"""Characters of a body that has no text in it."""
_WORDS = (
    *("error", "errors", "message", "msg", "detail", "details", "description", "error_description", "error_message"),
    *("errorMessage", "error_msg", "Message", "base_resp", "status_msg", "reason", "title", "cause"),
)
"""Names under which servers put the words of an error, the likeliest first."""
_DEEPEST_WORDS = 6
_MOST_WORDS = 8


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


def words_in(said: Any, depth: int = 0) -> str | None:
    """The first text that tells what went wrong, wherever a server puts it: {"error": …}, {"errors": […]}, {"detail":
    …}, a `message` that is an object, minimax's `base_resp`, plain text. None: there is none."""
    if isinstance(said, str):
        return said.strip()[:LONGEST_WORDS] or None
    if depth == _DEEPEST_WORDS:
        return None
    if isinstance(said, list):
        found = (words_in(each, depth + 1) for each in said[:_MOST_WORDS])
    elif isinstance(said, Mapping):
        if isinstance(said.get("loc"), list) and isinstance(said.get("msg"), str):  # pydantic's: which field it was
            return f"{'.'.join(map(str, said['loc']))}: {said['msg']}"[:LONGEST_WORDS]
        found = (words_in(said[name], depth + 1) for name in _WORDS if name in said)
    else:
        return None
    return next((words for words in found if words), None)
