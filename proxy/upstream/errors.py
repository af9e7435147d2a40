from __future__ import annotations

import errno
import math
import os
import re
import ssl
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx

from proxy.errors import MAX_ERROR_BYTES, NAMES, UpstreamError
from proxy.json_limits import check_limits
from proxy.settings.outbound import OutboundError
from proxy.storage.usage import usage_of
from proxy.upstream.sse import decode_json, encode_json

# What OpenAI, vLLM, llama.cpp, Ollama, LM Studio, Anthropic, Gemini, Bedrock, Mistral, xAI, Moonshot, Z.ai, MiniMax,
# Cohere, Alibaba and TGI say of a prompt that does not fit, in words or as a code.
_OVERFLOW = re.compile(
    r"context[_ ]?(length|window|size|limit).{0,40}exceed|exceed.{0,40}(context|token limit|maximum .{0,20}tokens)"
    r"|max(imum)? (context|model|prompt|input) (length|size|window)|(greater|longer|larger) than the .{0,20}context"
    r"|context (length|window) of only|context (the )?overflow|(prompt|input|request) (is )?too long"
    r"|(prompt|input) is too large|too large for model|too many (input |prompt )?tokens"
    r"|reduce the length of the (messages|prompt|input)|(input|prompt) (token count|tokens?|length).{0,60}exceed"
    r"|prompt exceeds (the )?max|range of input length|`inputs` (tokens|must have less)|prompt_tokens_exceeded",
    re.IGNORECASE,
)

# Enough where the status says that the caller's request is at fault.
_CONTEXT = re.compile(r"context (window|size|length)", re.IGNORECASE)

_SURELY = re.compile(r"context_length_exceeded|maximum context length", re.IGNORECASE)

_RATE = re.compile(r"rate.?limit|too many requests|per (minute|hour|day|second)\b|\bquota\b|\b[rt]pm\b", re.IGNORECASE)

# Statuses that may mean a prompt that is too long, with those of 500 and above, which some servers give it.
_CALLERS = frozenset({400, 413, 422})

_STATUS_NAMES = ("code", "status", "status_code", "statusCode", "http_status", "error_code")

_NAMED = {
    400: frozenset(
        """
        invalid_request_error invalid_request badrequesterror bad_request invalid_argument failed_precondition
        validation_error exceed_context_size_error context_length_exceeded
        """.split()
    ),
    401: frozenset({"authentication_error", "invalid_api_key", "unauthenticated", "unauthorized"}),
    402: frozenset({"billing_error", "insufficient_balance", "payment_required"}),
    403: frozenset({"permission_error", "permission_denied", "forbidden"}),
    404: frozenset({"not_found_error", "not_found", "model_not_found"}),
    413: frozenset({"request_too_large"}),
    429: frozenset(
        """
        rate_limit_error rate_limit_exceeded rate_limit rate_limited ratelimiterror resource_exhausted
        too_many_requests insufficient_quota
        """.split()
    ),
    503: frozenset({"overloaded_error", "overloaded", "unavailable", "service_unavailable"}),
    504: frozenset({"timeout_error", "timeout", "deadline_exceeded"}),
}

# Of an error that is told without a number, and within a success.
_STATUS_OF_NAME = {name: status for status, names in _NAMED.items() for name in names}

# Values of `finish_reason` of servers that gave up in the middle of an answer.
_BROKEN_ENDS = ("error", "abort", "network_error", "insufficient_system_resource")

_OF_A_COMPLETION = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint"})

_UNDELAYED = re.compile(r"(\d{1,9}(?:\.\d+)?)s?", re.ASCII)

_LOOKED_AT = 4096

_CLASS_NAMES = re.compile(r"^(litellm\.\w+: )*")


def error_from_exception(error: Exception, response: httpx.Response | None, model: str) -> UpstreamError:
    """`response`: the last one that the pool saw for this call."""
    if response is not None and response.is_error:
        return error_from_response(response.status_code, _content(response), response.headers, model)
    if response is not None and response.is_redirect:
        return redirect_refused(model)
    if response is not None and response.is_success and _content(response):
        return not_a_completion(model, _content(response), response.headers)
    if _is_timeout(error):
        return UpstreamError(f"{model} did not answer in time", timed_out=True)
    if response is None and _is_lost(error):
        return connection_lost(model)
    if response is not None and _is_connection(error):
        return UpstreamError(f"{model} broke off its answer: {_broken(error)}")
    if _is_connection(error) or isinstance(error, httpx.HTTPError):
        return unreachable(error, model)
    if response is not None:
        return _within_stream(error, model)
    return _of_litellm(error, model)


def _within_stream(error: Exception, model: str) -> UpstreamError:
    """What litellm raised in the middle of a stream: an error that was told there, or an answer that broke off."""
    said = _first_line(error)
    told = reported(
        f"{model} reported an error", {"error": {"message": said, "code": getattr(error, "status_code", None)}}
    )
    if told.status is not None and told.status < 500:
        return told
    return UpstreamError(f"{model} broke off its answer: {said}")


def not_a_completion(model: str, body: Any = None, headers: Mapping[str, str] | None = None) -> UpstreamError:
    """It said that all was well, and sent something else than a completion: an error, or none that is told."""
    message = f"{model} answered with success and no completion"
    if body is None:
        return UpstreamError(message, headers=headers)
    said = _read(body)
    error = error_in(said)
    if error is None and _own_status(said) is not None:
        error = said
    if error is not None:
        return reported(message, error, headers)
    return UpstreamError(message, status=502, body=_cut(body), headers=headers)


def error_from_response(status: int, body: bytes, headers: Mapping[str, str], model: str) -> UpstreamError:
    """An HTTP error."""
    said = _read(body)
    text = body[:_LOOKED_AT].decode("utf-8", "replace")
    return _failure(f"{model} answered with status {status}", _own_status(said) or status, text, said, body, headers)


def reported(message: str, error: Any, headers: Mapping[str, str] | None = None) -> UpstreamError:
    """An error told within a success: in a body, in an event of a stream. `error`: as `error_in` gives it."""
    text = _dumped(error)[:_LOOKED_AT].decode("utf-8", "replace")
    status = _own_status(error) or _named_status(error) or (429 if _RATE.search(text) else 502)
    return _failure(message, status, text, error, _cut(error), headers or {})


def _failure(message: str, status: int, text: str, said: Any, body: Any, headers: Mapping[str, str]) -> UpstreamError:
    overflow = _is_overflow(status, text)
    if overflow and status not in _CALLERS:
        status = 400
    states_wait = any(name.lower() in NAMES for name in headers)
    if status in (429, 503, 529) and not states_wait and (wait := _wait_in(said)):
        headers = {**headers, "retry-after": wait}
    return UpstreamError(
        message, status=status, body=body, headers=headers, overflow=overflow, retryable=overflow or None
    )


def _is_overflow(status: int, text: str) -> bool:
    if status < 500 and status not in _CALLERS:
        return False
    if _RATE.search(text):  # tokens per minute are no context window
        return _SURELY.search(text) is not None
    return _OVERFLOW.search(text) is not None or (status in _CALLERS and _CONTEXT.search(text) is not None)


def error_in(said: Any) -> Any:
    """The part of a body or a chunk that tells of an error, however it does; None where it tells of none."""
    if isinstance(said, list):
        return next((error for each in said[:8] if (error := error_in(each)) is not None), None)
    if not isinstance(said, dict):
        return None
    if said.get("object") == "error" or (not MAY_TELL.isdisjoint(said) and _tells_error(said)):
        told = {name: value for name, value in said.items() if name not in _OF_A_COMPLETION or value == "error"}
        return {**told, **_usage_in(said)}
    choices = said.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and ("error" in choice or choice.get("finish_reason") in _BROKEN_ENDS):
            error = _error_of_choice(choice)
            if error is not None:
                return {**error, **_usage_in(said)}
    return None


def _usage_in(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What failed in the middle is paid for all the same."""
    usage = usage_of(said)
    return {"usage": usage} if usage else {}


# Members of a body beside its choices that may tell of an error; `object` may too.
MAY_TELL = frozenset({"error", "errors", "base_resp", "type", "success", "status", "detail"})

_FAILED = ("error", "failed", "failure")


def _tells_error(said: Mapping[str, Any]) -> bool:
    if is_told(said.get("error")) or said.get("errors") or said.get("type") == "error":
        return True
    result = said.get("base_resp")  # minimax
    if isinstance(result, Mapping) and result.get("status_code") not in (None, 0, "0"):
        return True
    failed = said.get("success") is False or said.get("status") in _FAILED or "detail" in said
    return failed and not said.get("choices")


def is_told(error: object) -> bool:
    """Of the value of `error`: whatever is not null, {} too. False is no error, by its own words."""
    return error is not None and error is not False


def _error_of_choice(choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if is_told(error := choice.get("error")):
        return {"error": error}
    reason = choice.get("finish_reason")
    if reason in _BROKEN_ENDS:
        return {"error": {"message": f"the model's answer ended with finish_reason {reason!r}"}}
    return None


def _own_status(said: Any) -> int | None:
    """What the error itself says it is, as a number or a text of one."""
    for stated in _stated(said):
        for name in _STATUS_NAMES:
            value = stated.get(name)
            if isinstance(value, str) and len(value) == 3 and value.isascii() and value.isdigit():
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return value
    return None


def _named_status(said: Any) -> int | None:
    for stated in _stated(said):
        for name in ("code", "status", "type"):
            value = stated.get(name)
            if isinstance(value, str) and value.lower() in _STATUS_OF_NAME:
                return _STATUS_OF_NAME[value.lower()]
    return None


def _stated(said: Any) -> Iterator[Mapping[str, Any]]:
    """The objects that may have an error's fields, the innermost first."""
    if isinstance(said, list):
        said = next((each for each in said if isinstance(each, Mapping)), None)
    if not isinstance(said, Mapping):
        return
    for name in ("error", "errors", "base_resp"):
        inner = said.get(name)
        if isinstance(inner, list):
            inner = inner[0] if inner else None
        if isinstance(inner, Mapping):
            yield inner
    yield said


def _wait_in(said: Any) -> str | None:
    """How long to wait, where the body says it and no header: whole seconds, rounded up."""
    for stated in _stated(said):
        found = [stated.get(name) for name in ("retry_after", "retry_after_seconds", "retryDelay")]
        details = stated.get("details")
        if isinstance(details, list):
            found += [each.get("retryDelay") for each in details[:8] if isinstance(each, Mapping)]
        metadata = stated.get("metadata")
        sent = metadata.get("headers") if isinstance(metadata, Mapping) else None
        if isinstance(sent, Mapping):
            found += [value for name, value in sent.items() if str(name).lower() == "retry-after"]
        for value in found:
            if (wait := _UNDELAYED.fullmatch(str(value))) is not None:
                return str(math.ceil(float(wait.group(1))))
    return None


def _read(body: Any) -> Any:
    if not isinstance(body, bytes):
        return body
    try:
        check_limits(body)
        return decode_json(body)
    except ValueError:
        return None


def _cut(said: Any) -> Any:
    """As much of it as is kept of a failure: of a long error its words and names alone."""
    if isinstance(said, bytes) or len(dumped := _dumped(said)) <= MAX_ERROR_BYTES:
        return said
    stated = next(_stated(said), {})
    names = {
        name: stated[name] for name in _SHORT if len(_dumped(stated.get(name))) <= MAX_REST_CHARS and name in stated
    }
    words = words_in(said)
    return dumped if words is None else {"error": {**names, "message": words}}


_SHORT = ("type", "param", *_STATUS_NAMES)


def _dumped(said: Any) -> bytes:
    return encode_json({"": said})[4:-1]


def redirect_refused(model: str) -> UpstreamError:
    return UpstreamError(f"{model} answered with a redirect, which is not followed")


def connection_lost(model: str) -> UpstreamError:
    return UpstreamError(f"{model} closed the connection without an answer", lost=True)


def unreachable(error: BaseException, model: str, address: str = "") -> UpstreamError:
    """`address`: host and port, where the error itself may not know them."""
    where = address or _address_of(error)
    return UpstreamError(f"{model} cannot be reached{f' at {where}' if where else ''}: {_why_unreachable(error)}")


def _why_unreachable(error: BaseException) -> str:
    if _is_out_of_descriptors(error):
        return "this server has no file descriptor left for it"
    for each in _causes(error):
        if isinstance(each, OutboundError):
            return str(each)
    cause = next((each for each in reversed(_causes(error)) if isinstance(each, OSError)), None)
    if cause is None:
        return type(error).__name__
    if not isinstance(cause, ssl.SSLError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return str(cause.strerror or cause)[:200]


def _address_of(error: BaseException) -> str:
    for cause in _causes(error):
        host, port = getattr(cause, "host", None), getattr(cause, "port", None)
        if isinstance(cause, OSError) and host and port:
            return f"{host}:{port}"
    return ""


def redact(secrets: Collection[str], failure: UpstreamError) -> UpstreamError:
    """The same, less the provider's keys, which some servers repeat in their words."""
    failure.message = _without(secrets, failure.message)
    failure.args = (failure.message,)
    failure.body = _without(secrets, failure.body)
    failure.headers = _without(secrets, failure.headers)
    return failure


def _without(secrets: Collection[str], value: Any) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return value
    if isinstance(value, bytes):
        for secret in secrets:
            value = value.replace(secret.encode(), b"***")
        return value
    if isinstance(value, Mapping):
        return {_without(secrets, name): _without(secrets, inner) for name, inner in value.items()}
    return [_without(secrets, inner) for inner in value] if isinstance(value, list) else value


def _content(response: httpx.Response) -> bytes:
    """Nothing where it was streamed, or not read at all."""
    try:
        return response.content
    except httpx.StreamError:
        return b""


def _is_timeout(error: BaseException) -> bool:
    return any("Timeout" in type(cause).__name__ for cause in _causes(error))


def _is_lost(error: BaseException) -> bool:
    connection_lost = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
    return any(isinstance(cause, connection_lost) for cause in _causes(error))


def _broken(error: BaseException) -> str:
    """The name of the exception that the connection ended with."""
    found = (type(cause).__name__ for cause in _causes(error) if isinstance(cause, httpx.TransportError))
    return next(found, type(error).__name__)


def _is_connection(error: BaseException) -> bool:
    return any(isinstance(cause, (httpx.TransportError, OSError)) for cause in _causes(error))


def _is_out_of_descriptors(error: BaseException) -> bool:
    return any(isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _of_litellm(error: Exception, model: str) -> UpstreamError:
    """Refused before anything was sent: a parameter or message that this provider has no form for, a missing key.

    Another model may still take the request. A key that is missing here is no fault of the caller's key.
    """
    ours = type(error).__name__ in ("AuthenticationError", "PermissionDeniedError", "NotFoundError")
    said = _first_line(error)
    if ours:
        return UpstreamError(f"{model}: {said}", retryable=True)
    return UpstreamError(
        f"{model} cannot be sent this request in its provider's format: {said}", status=400, retryable=True
    )


def _first_line(error: Exception) -> str:
    """litellm's message without its own class names and hints."""
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    first = text.splitlines()[0].partition(" To drop these, ")[0]
    return _CLASS_NAMES.sub("", first)[:500]


# Characters of an upstream's text that are passed on.
MAX_MESSAGE_CHARS = 2000

# Characters of a body that has no text in it.
MAX_REST_CHARS = 500

# Names under which servers put the words of an error, the likeliest first.
_WORDS = (
    *("error", "errors", "message", "msg", "detail", "details", "description", "error_description", "error_message"),
    *("errorMessage", "error_msg", "Message", "base_resp", "status_msg", "reason", "title", "cause"),
)

_DEEPEST_WORDS = 6

_MAX_MESSAGES = 8


def words_in(said: Any, depth: int = 0) -> str | None:
    """The first text that tells what went wrong, wherever a server puts it: {"error": …}, {"errors": […]}, {"detail":
    …}, a `message` that is an object, minimax's `base_resp`, plain text. None: there is none."""
    if isinstance(said, str):
        return said.strip()[:MAX_MESSAGE_CHARS] or None
    if depth == _DEEPEST_WORDS:
        return None
    if isinstance(said, list):
        found = (words_in(each, depth + 1) for each in said[:_MAX_MESSAGES])
    elif isinstance(said, Mapping):
        if isinstance(said.get("loc"), list) and isinstance(said.get("msg"), str):  # pydantic's: which field it was
            return f"{'.'.join(map(str, said['loc']))}: {said['msg']}"[:MAX_MESSAGE_CHARS]
        found = (words_in(said[name], depth + 1) for name in _WORDS if name in said)
    else:
        return None
    return next((words for words in found if words), None)
