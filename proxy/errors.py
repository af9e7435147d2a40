"""The errors that a client can meet, with their HTTP statuses. `server/responses.py` renders them.

ProxyError
├── BadRequest                400  the caller's body or headers; `param` names the field
│   ├── FieldNotAllowed       400  a field that would steer the provider layer
│   ├── ThreadNotSupported    400  the conversation is to be held on the server
│   └── LoopDetected          400  the request has passed this router before, or too many routers
├── Unauthenticated           401  no key, or an unknown one
├── Forbidden                 403  the key, Host or Origin may not do this
├── ModelNotFound             404
│   ├── JobNotFound           404
│   ├── KeyNotFound           404
│   ├── DecisionNotFound      404
│   └── ResponseNotFound      404
│       └── PreviousResponseNotFound 404  the response that a request continues
├── Conflict                  409  the name is taken, or the configuration file owns it
├── BodyTimeout               408  the rest of the body did not come
├── ContentTooLarge           413
├── UnsupportedMediaType      415  content type or encoding
├── NoEligibleModelError      400  no candidate can take this request; says why, per model
│   └── ContextLengthExceeded 400  too long for the context window of every candidate
├── ModelAtCapacity           429  the model's concurrency limit is reached, and its queue is full
├── RateLimited               429  the key's rate is used up
│   └── BudgetExceeded        429  the key's budget is used up
├── ServiceUnavailable        503  nothing to route to yet, or the store is unavailable
│   ├── Starting              503  the server is not ready yet
│   ├── ShuttingDown          503  the server ends, and this response with it
│   ├── ModelPaused           503  an administrator has paused the model, or all that could answer
│   └── NotProfiled           503  no model that could answer has a profile yet
└── UpstreamError                  a model failed: its own status and body, or 502, 504
    ├── ResponseTooLarge      502  more bytes, levels or values than are read
    └── LocalFailure          503  this process could not do its part; the model was not to blame
        ├── ResponseMemoryFull     the memory for responses is used up
        └── LiteLLMUnavailable     litellm cannot be imported for now
ClientDisconnected                 nobody is left to answer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Statuses after which the next model in rank may still answer, besides every 5xx.
RETRYABLE_STATUSES = frozenset({408, 429})

# How much of the body of an upstream's error is read and kept.
MAX_ERROR_BYTES = 16 * 2**10

RETRY_AFTER_HEADERS = ("retry-after", "retry-after-ms")

SHUTTING_DOWN_MESSAGE = "this server is shutting down, and the time that open answers had is over; send it again"

# How long a client that does not read is waited for at shutdown.
SHUTDOWN_NOTICE_TIMEOUT_S = 1.0


class ClientDisconnected(Exception):
    """The client closed its connection."""


class APIError(Exception):
    """The root. `param` names the offending field as the caller wrote it; `headers` go with the response."""

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class BadRequest(APIError):
    """A body or header that the caller can correct."""


class FieldNotAllowed(BadRequest):
    """A field that would choose addresses, keys or behaviour of the provider layer."""


class ThreadNotSupported(BadRequest):
    """A request whose conversation Anthropic's API would hold. Its clients send all messages when they read this."""


class LoopDetected(BadRequest):
    """Routers call one another in a circle. Not a 5xx, which each of them would retry elsewhere."""


class Unauthenticated(APIError):
    """No key, or an unknown one."""


class Forbidden(APIError):
    """The caller is known and may not do this."""


class ModelNotFound(APIError):
    """No model has this name."""


class JobNotFound(ModelNotFound):
    """No job has this id."""


class KeyNotFound(ModelNotFound):
    """No client key has this id."""


class ResponseNotFound(ModelNotFound):
    """No response with this id is kept for the caller."""


class DecisionNotFound(ModelNotFound):
    """No decision with this id is kept, or none of the caller's."""


class PreviousResponseNotFound(ResponseNotFound):
    """The response that a request continues is not kept, or no longer."""


class Conflict(APIError):
    """The name is taken, or the configuration file defines it."""


class BodyTimeout(APIError):
    """The body stopped in the middle."""


class ContentTooLarge(APIError):
    """The body has more bytes than `max_body_bytes`."""


class UnsupportedMediaType(APIError):
    """The content type is not JSON, or the body is compressed."""


class NoEligibleModelError(APIError):
    """No model that the caller allows can take this request."""


class ContextLengthExceeded(NoEligibleModelError):
    """The request has more tokens than any candidate's context window."""


class ModelAtCapacity(APIError):
    """A model has no slot for this request; `retry_after_s` estimates when it has one."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, param="model", headers={"retry-after": str(math.ceil(retry_after_s))})
        self.retry_after_s = retry_after_s


class RateLimited(APIError):
    """The key has used up its rate of requests or tokens."""


class BudgetExceeded(RateLimited):
    """The key's budget is spent or reserved."""


class ServiceUnavailable(APIError):
    """No model can be routed to yet, or the store cannot be written."""


class Starting(ServiceUnavailable):
    """The server is still starting."""


class ShuttingDown(ServiceUnavailable):
    """The server is shutting down, and its grace period for open responses is over."""


class ModelPaused(ServiceUnavailable):
    """An administrator has paused the model, or all that could answer. Trying again helps only once one goes on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", headers={"x-should-retry": "false"})


class NotProfiled(ServiceUnavailable):
    """No candidate has a profile yet. `why` says what each lacks."""

    def __init__(self, message: str, why: Mapping[str, str], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.why = why


class UpstreamError(APIError):
    """A model failed to answer. `status` is None if no HTTP response came back."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        body: Mapping[str, Any] | list[Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        retryable: bool | None = None,
        timed_out: bool = False,
        connection_lost: bool = False,
        context_exceeded: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body[:MAX_ERROR_BYTES] if isinstance(body, bytes) else body
        stated = {name.lower(): text for name, text in (headers or {}).items()}
        self.headers = {name: stated[name] for name in RETRY_AFTER_HEADERS if name in stated}
        self.timed_out = timed_out
        # An open connection died before the first byte of a response: worth one more attempt on the same model.
        self.connection_lost = connection_lost
        # The prompt is longer than this model's context window; another model's may be larger.
        self.context_exceeded = context_exceeded
        self.retryable = _is_retryable(status) if retryable is None else retryable


class ResponseTooLarge(UpstreamError):
    """A response is larger than is read. Callers can cause that, so it does not count against the model."""


class LocalFailure(UpstreamError):
    """This process could not do its part, which says nothing of the model."""

    def __init__(self, message: str, *, retry_after_s: float, retryable: bool) -> None:
        body = error_body(message, "server_error", "unavailable")
        headers = {"retry-after": str(math.ceil(retry_after_s))}
        super().__init__(message, status=503, body=body, headers=headers, retryable=retryable)


class ResponseMemoryFull(LocalFailure):
    """The memory for responses is used up; no other model would do better."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1, retryable=False)


class LiteLLMUnavailable(LocalFailure):
    """litellm cannot be imported for now; a model that is called directly may still answer."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s, retryable=True)


def _is_retryable(status: int | None) -> bool:
    return status is None or status in RETRYABLE_STATUSES or status >= 500


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def release_frames(error: BaseException | None) -> None:
    """Free what the calls that an answered error passed through hold: the request, with its body.

    Their variables refer to the error, and its traceback to them. Only the garbage collector would free such a cycle,
    and it rarely looks at what is old.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
