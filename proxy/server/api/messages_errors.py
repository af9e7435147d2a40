from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.json_text import encode_json

# Anthropic's own status of a server that has no room for one more request. It knows no 503.
OVERLOADED = 529

# Of Anthropic's errors. Claude Code reads the type also in a stream, where there is no status.
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
    OVERLOADED: "overloaded_error",
}

# Codes after which clients of Anthropic go on in another way.
_CODES_IN_DETAILS = ("thread_unsupported_request",)

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
    shaped: dict[str, Any] = {"type": error_type(status), "message": text}
    if details := _details(error):
        shaped["details"] = details
    body: dict[str, Any] = {"type": "error", "error": shaped}
    return body if request_id is None else {**body, "request_id": request_id}


def _details(error: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return by what clients tell errors apart that have one type: ours, or what an upstream of this API has said."""
    if error.get("code") in _CODES_IN_DETAILS:
        return {"error_code": error["code"]}
    details = error.get("details")
    return details if isinstance(details, Mapping) else {}


def anthropic_status(status: int) -> int:
    return OVERLOADED if status == 503 else status


def error_event(error: Mapping[str, Any], status: int) -> bytes:
    """Return the event that ends a stream. Arguments as of `anthropic_error`."""
    return b"event: error\ndata: %b\n\n" % encode_json(anthropic_error(error, status))


def error_type(status: int) -> str:
    """Return Anthropic's type of error for a status."""
    return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
