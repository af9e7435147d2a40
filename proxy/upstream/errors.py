"""What an upstream answers, or fails with, as UpstreamError. `server/responses.py` makes the response of it."""

from __future__ import annotations

import errno
import math
import os
import re
import ssl
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx

from proxy.errors import MAX_ERROR_BYTES, RETRY_AFTER_HEADERS, UpstreamError
from proxy.json_text import check_limits, decode_json, encode_json
from proxy.settings.outbound import OutboundError
from proxy.storage.usage import usage_of
from proxy.upstream.httpx_transport import ConnectionLost
from proxy.upstream.pool import ProxyError, RemoteProtocolError

# How OpenAI, vLLM, llama.cpp, Ollama, LM Studio, Anthropic, Gemini, Bedrock, Mistral, xAI, Moonshot, Z.ai, MiniMax,
# Cohere, Alibaba and TGI say that a prompt exceeds the context window, in words or as a code.
_OVERFLOW = re.compile(
    r"context[_ ]?(length|window|size|limit).{0,40}exceed|exceed.{0,40}(context|token limit|maximum .{0,20}tokens)"
    r"|max(imum)? (context|model|prompt|input) (length|size|window)|(greater|longer|larger) than the .{0,20}context"
    r"|context (length|window) of only|context (the )?overflow|(prompt|input|request) (is )?too long"
    r"|(prompt|input) is too large|too large for model|too many (input |prompt )?tokens"
    r"|reduce the length of the (messages|prompt|input)|(input|prompt) (token count|tokens?|length).{0,60}exceed"
    r"|prompt exceeds (the )?max|range of input length|`inputs` (tokens|must have less)|prompt_tokens_exceeded",
    re.IGNORECASE,
)

# Enough if the status says that the request is at fault.
_CONTEXT = re.compile(r"context (window|size|length)", re.IGNORECASE)

_CERTAIN_OVERFLOW = re.compile(r"context_length_exceeded|maximum context length", re.IGNORECASE)

_RATE_LIMIT = re.compile(
    r"rate.?limit|too many requests|per (minute|hour|day|second)\b|\bquota\b|\b[rt]pm\b", re.IGNORECASE
)

# Statuses that may mean a prompt that is too long. Some servers use those of 500 and above for it, too.
_CALLER_STATUSES = frozenset({400, 413, 422})

_STATUS_NAMES = ("code", "status", "status_code", "statusCode", "http_status", "error_code")

_NAMES_OF_STATUS = {
    400: frozenset(
        """
        invalid_request_error invalid_request badrequesterror bad_request invalid_argument failed_precondition
        validation_error exceed_context_size_error context_length_exceeded invalid_prompt invalid_image
        invalid_image_format invalid_base64_image invalid_image_url invalid_image_mode image_too_large image_too_small
        image_parse_error image_content_policy_violation image_file_too_large unsupported_image_media_type
        empty_image_file failed_to_download_image image_file_not_found
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

# For an error without a number, within a response of status 200.
_STATUS_OF_NAME = {name: status for status, names in _NAMES_OF_STATUS.items() for name in names}

# Values of `finish_reason` of servers that gave up in the middle of an answer.
_BROKEN_FINISH_REASONS = ("error", "abort", "network_error", "insufficient_system_resource")

_COMPLETION_MEMBERS = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint"})

_SECONDS = re.compile(r"(\d{1,9}(?:\.\d+)?)s?", re.ASCII)

_SEARCHED_BYTES = 4096

_LITELLM_CLASS_NAMES = re.compile(r"^(litellm\.\w+: )*")


def error_from_exception(error: Exception, response: httpx.Response | None, model: str) -> UpstreamError:
    """Turn an exception of litellm or httpx into an UpstreamError.

    Args:
        response: the last one that our client saw for this call.
    """
    if response is not None and response.is_error:
        return error_from_response(response.status_code, _content(response), response.headers, model)
    if response is not None and response.is_redirect:
        return redirect_refused(model)
    if response is not None and response.is_success and _content(response):
        return not_a_completion(model, _content(response), response.headers)
    if _is_timeout(error):
        return UpstreamError(f"{model} did not answer in time", timed_out=True)
    if response is None and _is_connection_lost(error):
        return connection_lost(model)
    if response is None and any(isinstance(cause, RemoteProtocolError) for cause in _causes(error)):
        return not_http(model)
    if response is not None and _is_connection(error):
        return UpstreamError(f"{model} broke off its answer: {_transport_error_name(error)}")
    if _is_connection(error) or isinstance(error, httpx.HTTPError):
        return unreachable(error, model)
    if response is not None:
        return _error_in_stream(error, model)
    return _error_of_litellm(error, model)


def _error_in_stream(error: Exception, model: str) -> UpstreamError:
    """Turn an exception in the middle of a stream into an error that was sent there, or a response that broke off."""
    message = _first_line(error)
    reported = error_from_body(
        f"{model} reported an error", {"error": {"message": message, "code": getattr(error, "status_code", None)}}
    )
    if reported.status is not None and reported.status < 500:
        return reported
    return UpstreamError(f"{model} broke off its answer: {message}")


def not_a_completion(
    model: str, body: Any = None, headers: Mapping[str, str] | None = None, *, what: str = "completion"
) -> UpstreamError:
    """Make an error of a response with a success status and no completion in it, or not what else it should hold."""
    message = f"{model} answered with success and no {what}"
    if body is None:
        return UpstreamError(message, headers=headers)
    parsed = _parse(body)
    error = find_error(parsed)
    if error is None and _stated_status(parsed) is not None:
        error = parsed
    if error is not None:
        return error_from_body(message, error, headers)
    return UpstreamError(message, status=502, body=_truncated(body), headers=headers)


def error_from_response(status: int, body: bytes, headers: Mapping[str, str], model: str) -> UpstreamError:
    """Make an error of a response with an error status."""
    parsed = _parse(body)
    text = body[:_SEARCHED_BYTES].decode("utf-8", "replace")
    return _make_error(
        f"{model} answered with status {status}", _stated_status(parsed) or status, text, parsed, body, headers
    )


def error_from_body(message: str, error: Any, headers: Mapping[str, str] | None = None) -> UpstreamError:
    """Make an error of a body or event within a success. `error`: as `find_error` returns it."""
    text = _encoded(error)[:_SEARCHED_BYTES].decode("utf-8", "replace")
    status = _stated_status(error) or _named_status(error) or (429 if _RATE_LIMIT.search(text) else 502)
    return _make_error(message, status, text, error, _truncated(error), headers or {})


def _make_error(
    message: str, status: int, text: str, parsed: Any, body: Any, headers: Mapping[str, str]
) -> UpstreamError:
    overflow = _is_overflow(status, text)
    if overflow and status not in _CALLER_STATUSES:
        status = 400
    states_wait = any(name.lower() in RETRY_AFTER_HEADERS for name in headers)
    if status in (429, 503, 529) and not states_wait and (wait := _retry_after_in(parsed)):
        headers = {**headers, "retry-after": wait}
    return UpstreamError(
        message, status=status, body=body, headers=headers, context_exceeded=overflow, retryable=overflow or None
    )


def _is_overflow(status: int, text: str) -> bool:
    if status < 500 and status not in _CALLER_STATUSES:
        return False
    if _RATE_LIMIT.search(text):  # tokens per minute are no context window
        return _CERTAIN_OVERFLOW.search(text) is not None
    return _OVERFLOW.search(text) is not None or (status in _CALLER_STATUSES and _CONTEXT.search(text) is not None)


def find_error(parsed: Any) -> Any:
    """Return the part of a body or chunk that reports an error, in any server's way. None: there is no error."""
    if isinstance(parsed, list):
        return next((error for each in parsed[:8] if (error := find_error(each)) is not None), None)
    if not isinstance(parsed, dict):
        return None
    if parsed.get("object") == "error" or (not ERROR_MEMBERS.isdisjoint(parsed) and _is_error(parsed)):
        reported = {
            name: value for name, value in parsed.items() if name not in _COMPLETION_MEMBERS or value == "error"
        }
        return {**reported, **_usage_in(parsed)}
    choices = parsed.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and ("error" in choice or choice.get("finish_reason") in _BROKEN_FINISH_REASONS):
            error = _error_of_choice(choice)
            if error is not None:
                return {**error, **_usage_in(parsed)}
    return None


def _usage_in(parsed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep the usage: an answer that failed in the middle is billed all the same."""
    usage = usage_of(parsed)
    return {"usage": usage} if usage else {}


# Members of a body beside its choices that may report an error; `object` may too.
ERROR_MEMBERS = frozenset({"error", "errors", "base_resp", "type", "success", "status", "detail"})

_FAILED_STATUSES = ("error", "failed", "failure")


def _is_error(parsed: Mapping[str, Any]) -> bool:
    if is_error_value(parsed.get("error")) or parsed.get("errors") or parsed.get("type") == "error":
        return True
    result = parsed.get("base_resp")  # minimax
    if isinstance(result, Mapping) and result.get("status_code") not in (None, 0, "0"):
        return True
    failed = parsed.get("success") is False or parsed.get("status") in _FAILED_STATUSES or "detail" in parsed
    return failed and not parsed.get("choices")


def is_error_value(error: object) -> bool:
    """Return whether the value of a member `error` means an error: anything but null and false, {} included."""
    return error is not None and error is not False


def _error_of_choice(choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if is_error_value(error := choice.get("error")):
        return {"error": error}
    reason = choice.get("finish_reason")
    if reason in _BROKEN_FINISH_REASONS:
        return {"error": {"message": f"the model's answer ended with finish_reason {reason!r}"}}
    return None


def _stated_status(parsed: Any) -> int | None:
    """Return the HTTP status that the error itself states, as a number or a string."""
    for stated in _error_objects(parsed):
        for name in _STATUS_NAMES:
            value = stated.get(name)
            if isinstance(value, str) and len(value) == 3 and value.isascii() and value.isdigit():
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return value
    return None


def _named_status(parsed: Any) -> int | None:
    for stated in _error_objects(parsed):
        for name in ("code", "status", "type"):
            value = stated.get(name)
            if isinstance(value, str) and value.lower() in _STATUS_OF_NAME:
                return _STATUS_OF_NAME[value.lower()]
    return None


def _error_objects(parsed: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the objects that may hold an error's members, the innermost first."""
    if isinstance(parsed, list):
        parsed = next((each for each in parsed if isinstance(each, Mapping)), None)
    if not isinstance(parsed, Mapping):
        return
    for name in ("error", "errors", "base_resp"):
        inner = parsed.get(name)
        if isinstance(inner, list):
            inner = inner[0] if inner else None
        if isinstance(inner, Mapping):
            yield inner
    yield parsed


def _retry_after_in(parsed: Any) -> str | None:
    """Return how long the body says to wait, as a value of `retry-after`: whole seconds, rounded up."""
    for stated in _error_objects(parsed):
        found = [stated.get(name) for name in ("retry_after", "retry_after_seconds", "retryDelay")]
        details = stated.get("details")
        if isinstance(details, list):
            found += [each.get("retryDelay") for each in details[:8] if isinstance(each, Mapping)]
        metadata = stated.get("metadata")
        sent = metadata.get("headers") if isinstance(metadata, Mapping) else None
        if isinstance(sent, Mapping):
            found += [value for name, value in sent.items() if str(name).lower() == "retry-after"]
        for value in found:
            if (wait := _SECONDS.fullmatch(str(value))) is not None:
                return str(math.ceil(float(wait.group(1))))
    return None


def _parse(body: Any) -> Any:
    if not isinstance(body, bytes):
        return body
    try:
        check_limits(body)
        return decode_json(body)
    except ValueError:
        return None


def _truncated(parsed: Any) -> Any:
    """Shorten a long error to its message and its type."""
    if isinstance(parsed, bytes) or len(dumped := _encoded(parsed)) <= MAX_ERROR_BYTES:
        return parsed
    stated = next(_error_objects(parsed), {})
    names = {
        name: stated[name]
        for name in _KEPT_MEMBERS
        if len(_encoded(stated.get(name))) <= MAX_UNKNOWN_CHARS and name in stated
    }
    message = message_in(parsed)
    return dumped if message is None else {"error": {**names, "message": message}}


_KEPT_MEMBERS = ("type", "param", *_STATUS_NAMES)


def _encoded(parsed: Any) -> bytes:
    return encode_json({"": parsed})[4:-1]


def redirect_refused(model: str) -> UpstreamError:
    return UpstreamError(f"{model} answered with a redirect, which is not followed")


def connection_lost(model: str) -> UpstreamError:
    return UpstreamError(f"{model} closed the connection without an answer", connection_lost=True)


def not_http(model: str) -> UpstreamError:
    """Make an error of a response that is none. The model may have done its work already, so it is not asked again."""
    return UpstreamError(f"{model} answered with something that is not HTTP")


def unreachable(error: BaseException, model: str, address: str = "") -> UpstreamError:
    """Make an error of a failed connection. `address`: host and port, if the exception may not know them."""
    where = address or _address_of(error)
    return UpstreamError(f"{model} cannot be reached{f' at {where}' if where else ''}: {_why_unreachable(error)}")


def _why_unreachable(error: BaseException) -> str:
    if _is_out_of_descriptors(error):
        return "this server has no file descriptor left for it"
    for each in _causes(error):
        if isinstance(each, OutboundError | ProxyError):
            return str(each)
        if isinstance(each, ssl.SSLCertVerificationError):
            return "its certificate is not trusted (ssl_verify, SSL_CERT_FILE)"
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
    """Cut the provider's keys, which some servers repeat, out of an error, and return it."""
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
    """Return the body, or nothing if it was streamed or never read."""
    try:
        return response.content
    except httpx.StreamError:
        return b""


def _is_timeout(error: BaseException) -> bool:
    return any("Timeout" in type(cause).__name__ for cause in _causes(error))


def _is_connection_lost(error: BaseException) -> bool:
    connection_lost = (httpx.ReadError, httpx.WriteError, ConnectionLost)
    return any(isinstance(cause, connection_lost) for cause in _causes(error))


def _transport_error_name(error: BaseException) -> str:
    """Return the name of the exception that ended the connection."""
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


def _error_of_litellm(error: Exception, model: str) -> UpstreamError:
    """Make an error of what litellm refused to send: a field that the provider has no form for, a missing key.

    Another model may still take the request. A key that is missing here is no fault of the caller's key.
    """
    ours = type(error).__name__ in ("AuthenticationError", "PermissionDeniedError", "NotFoundError")
    message = _first_line(error)
    if ours:
        return UpstreamError(f"{model}: {message}", retryable=True)
    return UpstreamError(
        f"{model} cannot be sent this request in its provider's format: {message}", status=400, retryable=True
    )


def _first_line(error: Exception) -> str:
    """Return litellm's message without its class names and hints."""
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    first = text.splitlines()[0].partition(" To drop these, ")[0]
    return _LITELLM_CLASS_NAMES.sub("", first)[:500]


# Of an upstream's message that is passed on.
MAX_MESSAGE_CHARS = 2000

# Of an upstream's body without a message.
MAX_UNKNOWN_CHARS = 500

# Members in which servers put the message of an error, the likeliest first.
_MESSAGE_MEMBERS = (
    *("error", "errors", "message", "msg", "detail", "details", "description", "error_description", "error_message"),
    *("errorMessage", "error_msg", "Message", "base_resp", "status_msg", "reason", "title", "cause"),
)

_MAX_NESTING = 6

_MAX_MESSAGES = 8


def message_in(parsed: Any, depth: int = 0) -> str | None:
    """Return the first text that says what went wrong, wherever a server puts it.

    That may be {"error": …}, {"errors": […]}, {"detail": …}, a `message` that is an object, minimax's `base_resp`, or
    plain text. None: there is no text.
    """
    if isinstance(parsed, str):
        return parsed.strip()[:MAX_MESSAGE_CHARS] or None
    if depth == _MAX_NESTING:
        return None
    if isinstance(parsed, list):
        found = (message_in(each, depth + 1) for each in parsed[:_MAX_MESSAGES])
    elif isinstance(parsed, Mapping):
        if isinstance(parsed.get("loc"), list) and isinstance(parsed.get("msg"), str):  # pydantic's: which field it was
            return f"{'.'.join(map(str, parsed['loc']))}: {parsed['msg']}"[:MAX_MESSAGE_CHARS]
        found = (message_in(parsed[name], depth + 1) for name in _MESSAGE_MEMBERS if name in parsed)
    else:
        return None
    return next((message for message in found if message), None)
