from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.upstream.sse import encode_json

# Statuses stay what they are: Anthropic's SDKs and Claude Code send a request again after 408, 409, 429 and every 5xx.
# A 503 is "overloaded" as a 529 is. Claude Code reads that type, also in a stream, where there is no status, and goes
# on with its fallback model when it comes several times.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# By these words Claude Code knows that it has to shorten the conversation.
_TOO_LONG = "prompt is too long"


def anthropic_error(error: Mapping[str, Any], status: int, request_id: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object as the body of an error of Anthropic's API.

    Args:
        error: message, type, param, code.
        status: of the HTTP response, or what it would have been.
    """
    message = error.get("message")
    text = message if isinstance(message, str) and message else "the request failed"
    if error.get("code") == "context_length_exceeded" and _TOO_LONG not in text.lower():
        text = f"{_TOO_LONG}: {text}"
    body = {"type": "error", "error": {"type": error_type(status), "message": text}}
    return body if request_id is None else {**body, "request_id": request_id}


def error_event(error: Mapping[str, Any], status: int) -> bytes:
    """Return the event that ends a stream. Arguments as of `anthropic_error`."""
    return b"event: error\ndata: %b\n\n" % encode_json(anthropic_error(error, status))


def error_type(status: int) -> str:
    """Return Anthropic's type of error for a status."""
    return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
