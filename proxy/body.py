"""A request's bytes, within limits: JSON by its content type, uncompressed, no larger than allowed. Does not parse."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from proxy.errors import BadRequest, BodyTooLarge, BodyTooSlow, ClientGone, NotJson
from proxy.head import Headers, head_of

WHOLE = "uniroute.whole"
"""In the scope of a request whose body has come: nothing has to be waited for."""
IDLE_S = 30.0
"""How long a client may send nothing in the middle of its body."""
WHOLE_S = 300.0
"""How long it may take over all of it: a byte now and then is not enough."""


async def read_body(request: Request, limit: int, *, idle_s: float = IDLE_S, whole_s: float = WHOLE_S) -> bytes:
    """Raises NotJson, BodyTooLarge, BodyTooSlow, ClientGone."""
    _check_headers(head_of(request.scope), limit)
    pieces: list[bytes] = []
    size = 0
    now = asyncio.get_running_loop().time
    end = now() + whole_s
    try:
        async with asyncio.timeout(None if request.scope.get(WHOLE) else min(idle_s, whole_s)) as patience:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client left before its body was complete")
                piece = message.get("body", b"")
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                pieces.append(piece)
                if not message.get("more_body", False):
                    break
                if piece:
                    patience.reschedule(min(now() + idle_s, end))
    except TimeoutError:
        raise BodyTooSlow(f"the body came too slowly: {size} bytes, and then nothing in time") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_headers(headers: Headers, limit: int) -> None:
    kinds = headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if kinds else "application/json"
    if len(kinds) > 1 or not (kind == "application/json" or kind.endswith("+json")):
        raise NotJson(f"the content type must be application/json; got {', '.join(kinds)[:100]!r}")
    encoding = ",".join(headers.getlist("content-encoding")[:1]).strip().lower()
    if encoding not in ("", "identity"):
        raise NotJson(f"compressed bodies are not read; got content-encoding {encoding[:40]!r}")
    lengths = headers.getlist("content-length")
    if not lengths:
        return
    length = lengths[0]
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("content-length must be a number", param="content-length")
    if int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes (max_body_bytes)")
