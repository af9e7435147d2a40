from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from starlette._utils import get_route_path
from starlette.types import Scope

from proxy.errors import LoopDetected
from router_core.types import frozen

# Keys of the ASGI scope.
APP_STATE = "uniroute.app"
HEADERS_IN_SCOPE = "uniroute.head"
REQUEST_IDS = "uniroute.trace"
# When the request arrived, in monotonic seconds.
RECEIVED_AT = "uniroute.arrived"
# The body has arrived whole: nothing has to be waited for.
BODY_COMPLETE = "uniroute.whole"
# The DisconnectEvent of a connection that says by itself that it was lost.
DISCONNECT = "uniroute.leaving"
# The connection is one more than this process has room for.
OVERLOADED = "uniroute.crowded"


class Headers(Protocol):
    """Starlette's headers, or ours."""

    def getlist(self, key: str, /) -> list[str]: ...


class RequestHeaders:
    """Look up headers faster than Starlette's, which walk through all of them. Names are in lower case."""

    __slots__ = ("_by_name", "_raw", "_repeats")

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw
        self._by_name = dict(raw)
        self._repeats = len(self._by_name) != len(raw)

    def getlist(self, key: str, /) -> list[str]:
        name = key.encode()
        if self._repeats:
            return [value.decode("latin-1") for other, value in self._raw if other == name]
        value = self._by_name.get(name)
        return [] if value is None else [value.decode("latin-1")]

    def has_any(self, names: frozenset[bytes]) -> bool:
        """Return whether any of these headers was sent."""
        return not names.isdisjoint(self._by_name)

    def value(self, name: bytes) -> bytes | None:
        """Return the one value of a header; None if it was not sent, or any header was sent more than once."""
        return None if self._repeats else self._by_name.get(name)

    def items_for(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        """Return the headers of these names that were sent; a repeated one is repeated."""
        if not self.has_any(_encoded(names)):
            return []
        return [(name, value) for name in names for value in self.getlist(name)]


@lru_cache(maxsize=16)
def _encoded(names: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(name.encode() for name in names)


def path_of(scope: Scope) -> str:
    """Return the path as the router matches it: without the prefix that the server is mounted under."""
    return get_route_path(scope)


def headers_of(scope: Scope) -> RequestHeaders:
    """Return the headers of a request, put together once."""
    headers: RequestHeaders | None = scope.get(HEADERS_IN_SCOPE)
    if headers is None:
        headers = scope[HEADERS_IN_SCOPE] = RequestHeaders(scope["headers"])
    return headers


HOPS = "x-uniroute-hops"

MAX_HOPS = 3

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

# As much of it as every system has to pass on.
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")


# Random ids that nobody has yet. Its `pop` and `extend` are atomic, so every thread may take one.
_unused_ids: list[str] = []

# A forked process must not repeat the ids of its parent.
os.register_at_fork(after_in_child=_unused_ids.clear)


def random_id() -> str:
    """Return 128 random bits in hex. One system call serves 128 ids."""
    try:
        return _unused_ids.pop()
    except IndexError:
        drawn = os.urandom(2048).hex()
        ids = [drawn[place : place + 32] for place in range(0, len(drawn), 32)]
        last = ids.pop()
        _unused_ids.extend(ids)
        return last


@frozen
class RequestIds:
    """What identifies a request: to its client, in traces, and to routers that it passes."""

    request_id: str
    traceparent: str | None = None
    tracestate: str | None = None
    hops: tuple[str, ...] = ()
    """Ids of the routers that the request has passed."""

    def upstream_headers(self, own_id: str) -> dict[str, str]:
        state = {} if self.tracestate is None else {"tracestate": self.tracestate}
        return {**self.headers(), **state, HOPS: ", ".join((*self.hops, own_id))}

    def headers(self) -> dict[str, str]:
        """Return what goes back to the client, and upstream."""
        parent = {} if self.traceparent is None else {"traceparent": self.traceparent}
        return {"x-request-id": self.request_id, **parent}

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the same headers as ASGI has them."""
        raw = [(b"x-request-id", self.request_id.encode())]
        if self.traceparent is not None:
            raw.append((b"traceparent", self.traceparent.encode()))
        return raw


_ID_HEADERS = frozenset({b"x-request-id", b"traceparent", HOPS.encode()})


def request_ids_from(headers: RequestHeaders) -> RequestIds:
    """Take the client's own ids if they are well formed, else a new request id."""
    if not headers.has_any(_ID_HEADERS):
        return RequestIds(f"req-{random_id()}")
    stated, parents = headers.getlist("x-request-id"), headers.getlist("traceparent")
    request_id = stated[0] if len(stated) == 1 and _REQUEST_ID.fullmatch(stated[0]) else f"req-{random_id()}"
    parent = parents[0] if len(parents) == 1 and _TRACEPARENT.fullmatch(parents[0]) else None
    state = None if parent is None else _tracestate(headers)
    passed = headers.getlist(HOPS)
    hops = tuple(hop.strip(" \t") for hop in ",".join(passed).split(",")) if passed else ()
    return RequestIds(request_id, parent, state, hops)


def _tracestate(headers: Headers) -> str | None:
    """Return what tracing systems on the way have noted, if it is well formed; without its parent it means nothing."""
    state = ",".join(headers.getlist("tracestate"))
    return state if _TRACESTATE.fullmatch(state) else None


@lru_cache(maxsize=8)
def instance_id(data_dir: str) -> str:
    """Return an id that all processes of one server share."""
    return hashlib.sha256(f"{socket.gethostname()}\n{data_dir}".encode()).hexdigest()[:12]


def check_hops(hops: tuple[str, ...], own: str) -> None:
    """Raise LoopDetected if a request has passed this server before, or too many routers."""
    if own in hops:
        raise LoopDetected(
            "loop detected: this request has been here before; one of this server's models leads back to it",
            param=HOPS,
        )
    if len(hops) > MAX_HOPS:
        raise LoopDetected(
            f"loop detected: this request has passed {len(hops)} routers, more than {MAX_HOPS}; let their models lead"
            " to providers and not to one another",
            param=HOPS,
        )
