"""What a client is told of bytes that are no request, or too large or too slow a one. Reads nothing."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from proxy.errors import error_object
from proxy.upstream.sse import dump

URL_BYTES = 8 * 1024
HEADERS = 128
HEAD_BYTES = 64 * 1024
"""Of all headers together; and of anything that the parser takes in without coming to an end of it."""


@dataclass(frozen=True)
class Refusal:
    status: int
    message: str
    code: str


NOT_HTTP = Refusal(400, "this is not a request in HTTP/1.1", "invalid_http_request")
TWO_HOSTS = Refusal(400, "the address and the Host header name different hosts", "invalid_http_request")
TOO_SLOW = Refusal(408, "the headers of the request were not complete in time", "request_timeout")
LONG_URL = Refusal(414, f"the address is longer than {URL_BYTES} bytes", "uri_too_long")
MANY_HEADERS = Refusal(431, f"there are more than {HEADERS} headers", "request_headers_too_large")
LARGE_HEADERS = Refusal(431, f"the headers are larger than {HEAD_BYTES} bytes", "request_headers_too_large")
CODED = Refusal(501, "the one transfer coding that is read is chunked, in HTTP/1.1", "unsupported_transfer_coding")


def answer_of(why: Refusal, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The whole response, the last of its connection. `headers`: those of every response."""
    body = dump(error_object(why.message, "invalid_request_error", why.code))
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    own += [(b"connection", b"close"), (b"x-request-id", b"req-" + uuid.uuid4().hex.encode())]
    lines = [b"%s: %s\r\n" % pair for pair in (*headers, *own)]
    return b"".join((STATUS_LINE[why.status], *lines, b"\r\n", body))
