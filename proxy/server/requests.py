from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope

from proxy.concurrency import CANCEL_INTERVAL_S
from proxy.errors import (
    BadRequest,
    BodyTimeout,
    ClientDisconnected,
    ContentTooLarge,
    LoopDetected,
    UnsupportedMediaType,
)

HOPS = "x-uniroute-hops"

MAX_HOPS = 3


@lru_cache(maxsize=8)
def instance_id(data_dir: str) -> str:
    """The same for all processes of one server."""
    return hashlib.sha256(f"{socket.gethostname()}\n{data_dir}".encode()).hexdigest()[:12]


def check_hops(hops: tuple[str, ...], own: str) -> None:
    """Raises LoopDetected where this server is among them, or they are too many."""
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


HEAD = "uniroute.head"


class Headers(Protocol):
    """Starlette's, or ours, which costs less."""

    def getlist(self, key: str, /) -> list[str]:
        """Every value, in order."""


class RequestHeaders:
    """Names are in lower case, as ASGI has them."""

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

    def pairs(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Those of `names` that were sent, repeated ones repeated."""
        return [(name, value) for name in names if name.encode() in self._by_name for value in self.getlist(name)]


def headers_of(scope: Scope) -> RequestHeaders:
    """Put together once per request."""
    head: RequestHeaders | None = scope.get(HEAD)
    if head is None:
        head = scope[HEAD] = RequestHeaders(scope["headers"])
    return head


_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class RequestIds:
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


def request_ids_from(headers: Headers) -> RequestIds:
    """The caller's own ids where they are well formed, else a new one."""
    stated, parents = headers.getlist("x-request-id"), headers.getlist("traceparent")
    good = len(stated) == 1 and _REQUEST_ID.fullmatch(stated[0])
    traced = len(parents) == 1 and _TRACEPARENT.fullmatch(parents[0])
    passed = headers.getlist(HOPS)
    hops = tuple(hop.strip(" \t") for hop in ",".join(passed).split(",")) if passed else ()
    return RequestIds(stated[0] if good else f"req-{os.urandom(16).hex()}", parents[0] if traced else None, hops)


BODY_COMPLETE = "uniroute.whole"
"""In the scope of a request whose body has come: nothing has to be waited for."""

IDLE_S = 30.0
"""How long a client may send nothing in the middle of its body."""

WHOLE_S = 300.0
"""How long it may take over all of it: a byte now and then is not enough."""


async def read_body(request: Request, limit: int, *, idle_s: float = IDLE_S, whole_s: float = WHOLE_S) -> bytes:
    """Raises NotJson, BodyTooLarge, BodyTooSlow, ClientGone."""
    _check_headers(headers_of(request.scope), limit)
    pieces: list[bytes] = []
    size = 0
    now = asyncio.get_running_loop().time
    end = now() + whole_s
    try:
        async with asyncio.timeout(None if request.scope.get(BODY_COMPLETE) else min(idle_s, whole_s)) as patience:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected("the client left before its body was complete")
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
        raise BodyTimeout(f"the body came too slowly: {size} bytes, and then nothing in time") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_headers(headers: Headers, limit: int) -> None:
    kinds = headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if kinds else "application/json"
    if len(kinds) > 1 or not (kind == "application/json" or kind.endswith("+json")):
        raise UnsupportedMediaType(f"the content type must be application/json; got {', '.join(kinds)[:100]!r}")
    encoding = ",".join(headers.getlist("content-encoding")[:1]).strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(f"compressed bodies are not read; got content-encoding {encoding[:40]!r}")
    lengths = headers.getlist("content-length")
    if not lengths:
        return
    length = lengths[0]
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("content-length must be a number", param="content-length")
    if int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ContentTooLarge:
    return ContentTooLarge(f"the body is larger than {limit} bytes (max_body_bytes)")


T = TypeVar("T")

Dispose = Callable[[T], Awaitable[None]]

DISCONNECT = "uniroute.leaving"
"""In the scope of a request whose connection says by itself that it was lost."""


_client: ContextVar[DisconnectEvent | None] = ContextVar("uniroute_client", default=None)


def cut_ending() -> str:
    """The ending of a request whose task was cancelled: `client_gone`, or `shutdown`: nobody else does that."""
    leaving = _client.get()
    return "client_gone" if leaving is None or leaving.gone else "shutdown"


class DisconnectEvent:
    """One connection, and whoever wants to know that it is no more."""

    def __init__(self) -> None:
        self.gone = False
        self.told: set[Callable[[], None]] = set()

    def left(self) -> None:
        self.gone = True
        for tell in tuple(self.told):
            tell()


async def cancel_on_disconnect(
    scope: Scope, receive: Receive, work: Coroutine[Any, Any, T], let_go: Dispose[T] | None = None
) -> T:
    """The result of `work`. Raises ClientGone, after `work` was cancelled and has ended, when the client leaves first.

    The request's body must have been read: what else arrives can then only be the disconnect. `work` runs in the task
    of whoever calls; only under another server than ours a second one watches. `let_go` is given a result that is there
    in spite of its cancellation, and that nobody will see.
    """
    leaving: DisconnectEvent | None = scope.get(DISCONNECT)
    if leaving is not None:
        return await _during(leaving, work, let_go)
    leaving = DisconnectEvent()
    watching = asyncio.create_task(_watch(receive, leaving))
    try:
        return await _during(leaving, work, let_go)
    finally:
        watching.cancel()


async def _during(leaving: DisconnectEvent, work: Coroutine[Any, Any, T], let_go: Dispose[T] | None) -> T:
    working = asyncio.current_task()
    if working is None or leaving.gone:
        work.close()
        raise ClientDisconnected("the client closed its connection")
    _client.set(leaving)
    ending = _Canceller(working)
    leaving.told.add(ending.begin)
    try:
        result = await work
    except BaseException:
        if ending.over():
            raise ClientDisconnected("the client closed its connection") from None
        raise
    finally:
        leaving.told.discard(ending.begin)
    if ending.over():  # `work` made nothing of being cancelled
        if let_go is not None:
            await let_go(result)
        raise ClientDisconnected("the client closed its connection")
    return result


class _Canceller:
    """Cancels once the client has left, and again until that is noticed: under Python 3.11 `asyncio.wait_for`, through
    which redis-py sends, swallows a cancellation that arrives together with its result."""

    def __init__(self, working: asyncio.Task[Any]) -> None:
        self._working = working
        self._before = working.cancelling()
        self._cancelled = 0
        self._again: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self) -> None:
        if self._over:  # it was told of after the work had ended
            return
        self._cancelled += 1
        self._working.cancel()
        self._again = asyncio.get_running_loop().call_later(CANCEL_INTERVAL_S, self.begin)

    def over(self) -> bool:
        """Whether the client had left, and nobody else wants this task to end. What was asked here is taken back."""
        self._over = True
        if self._again is not None:
            self._again.cancel()
        for _ in range(self._cancelled):
            self._working.uncancel()
        return self._cancelled > 0 and self._working.cancelling() <= self._before


async def _watch(receive: Receive, leaving: DisconnectEvent) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leaving.left()
