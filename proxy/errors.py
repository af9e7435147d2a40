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

import math
from collections.abc import Mapping
from typing import Any

# And every 5xx: the next model in rank may still answer.
RETRYABLE = frozenset({408, 429})

# Of what an upstream says of its failure.
MAX_ERROR_BYTES = 16 * 2**10


SHUTTING_DOWN = "this server is shutting down, and the time that open answers had is over; send it again"

# A client that does not read is told so no longer.
LAST_WORDS_S = 1.0


class ClientDisconnected(Exception):
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


class FieldNotAllowed(BadRequest):
    """A field that would choose addresses, keys or behaviour of the provider layer."""


class LoopDetected(BadRequest):
    """Routers that lead to one another. Not a 5xx, which each of them would try again elsewhere."""


class Unauthenticated(ProxyError):
    """No key, or a key that is not ours."""


class Forbidden(ProxyError):
    """Known caller, closed door."""


class ModelNotFound(ProxyError):
    """A model by a name that nobody has."""


class JobNotFound(ModelNotFound):
    """A job by an id that none has."""


class KeyNotFound(ModelNotFound):
    """A client key by an id that none has."""


class Conflict(ProxyError):
    """The name is taken, or its definition lives elsewhere."""


class BodyTimeout(ProxyError):
    """A body that stopped in its middle."""


class ContentTooLarge(ProxyError):
    """More bytes than `max_body_bytes`."""


class UnsupportedMediaType(ProxyError):
    """Another content type, or a compressed body."""


class NoEligibleModelError(ProxyError):
    """There are models, and none can take this request."""


class ContextLengthExceeded(NoEligibleModelError):
    """More tokens than any candidate's context window."""


class ModelAtCapacity(ProxyError):
    """A model has no place for this request; `retry_after_s` says when it probably has."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, param="model", headers={"retry-after": str(math.ceil(retry_after_s))})
        self.retry_after_s = retry_after_s


class RateLimited(ProxyError):
    """A limit of the key: more requests or tokens than it may use so soon."""


class BudgetExceeded(RateLimited):
    """A limit of the key: it has spent what it may, or has set it aside."""


class ServiceUnavailable(ProxyError):
    """Not now: no model is routable yet, or the store cannot be written."""


class Starting(ServiceUnavailable):
    """Not yet: what the server needs is still being read or made."""


class ShuttingDown(ServiceUnavailable):
    """Not any more: the time that open answers were given is over."""


class NotMeasured(ServiceUnavailable):
    """No candidate is measured yet. `why` says of each what it lacks."""

    def __init__(self, message: str, why: Mapping[str, str], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.why = why


class UpstreamError(ProxyError):
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
        self.body = body[:MAX_ERROR_BYTES] if isinstance(body, bytes) else body
        stated = {name.lower(): text for name, text in (headers or {}).items()}
        self.headers = {name: stated[name] for name in NAMES if name in stated}
        self.timed_out = timed_out
        # The connection was there, and died before a byte of an answer: worth asking the same model once
        # more.
        self.lost = lost
        # The prompt is longer than this model's context window; another's may be larger.
        self.overflow = overflow
        self.retryable = _is_retryable(status) if retryable is None else retryable


class AnswerTooLarge(UpstreamError):
    """More of an answer than is read. Callers can bring that about, so it does not count against the model."""


class OwnFault(UpstreamError):
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


def error_object(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


NAMES = ("retry-after", "retry-after-ms")
