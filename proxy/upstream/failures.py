"""litellm's and HTTP's exceptions to one UpstreamFailure, with the upstream's own status and words."""

from __future__ import annotations

import errno
import os
import re
import ssl
from collections.abc import Collection, Mapping
from typing import Any

import httpx

from proxy.errors import UpstreamFailure
from proxy.outbound import OutboundError

_OVERFLOW = re.compile(
    rb"context_length_exceeded|maximum context length|context (window|size|length)|(prompt|input|request) is too long"
    rb"|too many (input )?tokens|input token count|exceeds? .{0,40}(token limit|maximum .{0,20}tokens)",
    re.IGNORECASE,
)
"""What OpenAI, vLLM, llama.cpp, Anthropic, Gemini and Bedrock say of a prompt that does not fit."""
_LOOKED_AT = 4096
_CLASS_NAMES = re.compile(r"^(litellm\.\w+: )*")


def failure_of(error: Exception, response: httpx.Response | None, model: str) -> UpstreamFailure:
    """`response`: the last one that the pool saw for this call."""
    if response is not None and response.is_error:
        return refused(response.status_code, _content(response), response.headers, model)
    if response is not None and response.is_redirect:
        return redirecting(model)
    if response is not None and response.is_success and _content(response):
        return no_completion(model, _content(response), response.headers)
    if _is_timeout(error):
        return UpstreamFailure(f"{model} did not answer in time", timed_out=True)
    if response is None and _is_lost(error):
        return lost(model)
    if _is_connection(error) or isinstance(error, httpx.HTTPError):
        return unreachable(error, model)
    if response is not None:
        return UpstreamFailure(f"{model} broke off its answer: {_first_line(error)}")
    return _of_litellm(error, model)


def no_completion(model: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> UpstreamFailure:
    """It said that all was well, and sent something else than a completion."""
    return UpstreamFailure(
        f"{model} answered with success and no completion",
        status=None if body is None else 502,
        body=body,
        headers=headers,
    )


def refused(status: int, body: bytes, headers: Mapping[str, str], model: str) -> UpstreamFailure:
    overflow = status in (400, 413, 422) and _OVERFLOW.search(body[:_LOOKED_AT]) is not None
    return UpstreamFailure(
        f"{model} answered with status {status}",
        status=status,
        body=body,
        headers=headers,
        overflow=overflow,
        retryable=overflow or None,
    )


def redirecting(model: str) -> UpstreamFailure:
    return UpstreamFailure(f"{model} answered with a redirect, which is not followed")


def lost(model: str) -> UpstreamFailure:
    return UpstreamFailure(f"{model} closed the connection without an answer", lost=True)


def unreachable(error: BaseException, model: str, address: str = "") -> UpstreamFailure:
    """`address`: host and port, where the error itself may not know them."""
    where = address or _address_of(error)
    return UpstreamFailure(f"{model} cannot be reached{f' at {where}' if where else ''}: {_why_unreachable(error)}")


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


def without(secrets: Collection[str], failure: UpstreamFailure) -> UpstreamFailure:
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
    lost = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
    return any(isinstance(cause, lost) for cause in _causes(error))


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


def _of_litellm(error: Exception, model: str) -> UpstreamFailure:
    """Refused before anything was sent: a parameter or message that this provider has no form for, a missing key.

    Another model may still take the request. A key that is missing here is no fault of the caller's key.
    """
    ours = type(error).__name__ in ("AuthenticationError", "PermissionDeniedError", "NotFoundError")
    said = _first_line(error)
    if ours:
        return UpstreamFailure(f"{model}: {said}", retryable=True)
    return UpstreamFailure(
        f"{model} cannot be sent this request in its provider's format: {said}", status=400, retryable=True
    )


def _first_line(error: Exception) -> str:
    """litellm's message without its own class names and hints."""
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    first = text.splitlines()[0].partition(" To drop these, ")[0]
    return _CLASS_NAMES.sub("", first)[:500]
