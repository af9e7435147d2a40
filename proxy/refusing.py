"""Exceptions as responses, every one of them JSON. What each is over HTTP is decided in errors and foreign_errors."""

from __future__ import annotations

from starlette.responses import Response

from proxy.errors import ClientGone, ProxyError, describe
from proxy.foreign_errors import FOREIGN, translated
from proxy.upstream.sse import dump

TOLD: tuple[type[Exception], ...] = (ProxyError, ClientGone, *FOREIGN)
"""What `response_of` knows."""


def response_of(error: Exception) -> Response:
    """To an exception of TOLD."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    status, body, headers = describe(error if isinstance(error, ProxyError) else translated(error))
    return Response(dump(body), status, headers, "application/json")
