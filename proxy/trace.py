"""Request ids that a caller may state: passed on and echoed. But for the list of hops no other header goes upstream."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from proxy.head import Headers
from proxy.hops import HOPS

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Trace:
    request_id: str
    traceparent: str | None = None
    hops: tuple[str, ...] = ()
    """Ids of the routers that it has passed."""

    def upstream_headers(self, own_id: str) -> dict[str, str]:
        return {**self.headers(), HOPS: ", ".join((*self.hops, own_id))}

    def headers(self) -> dict[str, str]:
        """What goes back to the caller, and upstream."""
        parent = {} if self.traceparent is None else {"traceparent": self.traceparent}
        return {"x-request-id": self.request_id, **parent}

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The same as ASGI has them."""
        return [(name.encode(), value.encode()) for name, value in self.headers().items()]


def trace_of(headers: Headers) -> Trace:
    """The caller's own ids where they are well formed, else a new one."""
    stated, parents = headers.getlist("x-request-id"), headers.getlist("traceparent")
    good = len(stated) == 1 and _REQUEST_ID.fullmatch(stated[0])
    traced = len(parents) == 1 and _TRACEPARENT.fullmatch(parents[0])
    passed = headers.getlist(HOPS)
    hops = tuple(hop.strip(" \t") for hop in ",".join(passed).split(",")) if passed else ()
    return Trace(stated[0] if good else f"req-{os.urandom(16).hex()}", parents[0] if traced else None, hops)
