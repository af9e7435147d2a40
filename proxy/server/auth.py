from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from starlette._utils import get_route_path
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import BadRequest, Forbidden, ProxyError, ServiceUnavailable, Unauthenticated
from proxy.server.requests import Headers, headers_of
from proxy.server.responses import render_error
from proxy.settings.schema import Settings, is_loopback
from proxy.storage.audit_log import ANONYMOUS, ROOT
from proxy.storage.client_keys import ClientKey, Role
from proxy.storage.snapshot import RoutingSnapshot

ADMIN: Final = "/admin"

METRICS: Final = "/metrics"

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def is_admin_side(path: str) -> bool:
    return path == ADMIN or path.startswith(f"{ADMIN}/")


def check_role(role: Role, method: str, path: str) -> None:
    """Raises Forbidden."""
    if role == "admin":
        return
    if role == "viewer":
        if method not in SAFE_METHODS:
            raise Forbidden("a key of the role viewer may only read; asking models needs the role client")
    elif is_admin_side(path):
        raise Forbidden("this call needs the admin key, or a key of the role admin")
    elif path == METRICS:  # they tell of all models, and of everybody's money
        raise Forbidden("the metrics need a key of the role viewer or admin")


FREE_PER_S = 20
"""Refusals within a second that are answered at once: people who mistype, a client whose key has just ended."""

DELAY_S = 0.5

MAX_WAITING = 512
"""Beyond these a refusal is answered at once: waiting costs a connection, and they are not endless either."""


class AuthFailureThrottle:
    """One per process, for all callers together: addresses are cheap, and behind a proxy all have the same."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._second = 0
        self._refusals = 0
        self._waiting = 0

    async def hold(self) -> None:
        """To be awaited before a caller is told that its key is none."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        if self._refusals <= FREE_PER_S or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._waiting -= 1


UNAUTHENTICATED_PATHS = frozenset({"/healthz", "/readyz"})

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

AZURES_HEADER = "api-key"
"""Read for the models alone: the admin side is no part of Azure's API."""

KEY_IN_SCOPE = "uniroute.key"

PRINCIPAL = "uniroute.who"

_RETRY_AFTER_S = "2"

_MAX_KEY_BYTES = 4096

_MOST_SERVED, _LONGEST_SERVED = 64, 255
"""Of the values of Host that are remembered."""

_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who came in: `root`, the id of a key, or `-` where none is needed."""

    who: str
    key: ClientKey | None = None


_NOBODY = Principal(ANONYMOUS)


class AuthMiddleware:
    """Pure ASGI. Puts the caller's ClientKey, or None where none is needed, into the scope, and who it is."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        state: Callable[[], RoutingSnapshot],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.app = app
        self._settings = settings
        self._state = state
        self._clock = clock
        self._brake = AuthFailureThrottle(time.monotonic)
        self._allowed_hosts_cache: set[str] = set()
        """Values of Host that were found to be served: most requests bring the same few."""
        admin = settings.admin_key
        self._root_digest = _digest(admin.get_secret_value().encode()) if admin else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            self._admit(scope)
        except ProxyError as refusal:
            status, body, headers = render_error(refusal)
            if status == 401:
                await self._brake.hold()
            challenge = {"www-authenticate": "Bearer"} if status == 401 else {}
            await JSONResponse(body, status, {**headers, **challenge})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path = path_of(scope)
        caller = _NOBODY if path in UNAUTHENTICATED_PATHS else self._caller(path, headers_of(scope))
        scope[KEY_IN_SCOPE], scope[PRINCIPAL] = caller.key, caller.who
        if caller.key is not None:
            check_role(caller.key.role, scope["method"], path)

    def _caller(self, path: str, headers: Headers) -> Principal:
        if not path.isprintable():
            raise BadRequest("the path holds characters that cannot be printed")
        self._check_address(headers)
        if is_admin_side(path):
            if self._root_digest is None:
                raise Forbidden("the admin side is off: set UNIROUTE_ADMIN_KEY and start again")
            return self._known(credentials_from(headers))
        if not self._state().keys_required:
            return _NOBODY
        return self._known(credentials_from(headers, ("x-api-key", AZURES_HEADER)))

    def _check_address(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._allowed_hosts_cache:
            check_host(headers, self._settings)
            if len(self._allowed_hosts_cache) < _MOST_SERVED and len(hosts[0]) <= _LONGEST_SERVED:
                self._allowed_hosts_cache.add(hosts[0])
        check_origin(headers, self._settings.allowed_origins)

    def _known(self, secret: bytes | None) -> Principal:
        """The digest is looked up, and compared again in constant time; the secret itself is compared with nothing."""
        digest = _digest(secret) if secret else ""
        if self._root_digest is not None and hmac.compare_digest(digest, self._root_digest):
            return Principal(ROOT)
        state, now = self._state(), self._clock()
        key = state.keys.get(digest)
        if key is None and not state.is_loaded:
            raise ServiceUnavailable(
                "the models and API keys here were not read yet: the store, Redis, does not answer; try again",
                headers={"retry-after": _RETRY_AFTER_S},
            )
        if key is None or key.revoked or not key.matches(digest, now):
            raise Unauthenticated("no valid API key was given; send one as Authorization: Bearer …, or as x-api-key")
        if key.expired(now):
            raise Unauthenticated("this API key has expired; ask whoever made it for another one")
        return Principal(key.id, key)


def path_of(scope: Scope) -> str:
    """As the router matches it: without the prefix that the server is mounted under."""
    return get_route_path(scope)


def credentials_from(headers: Headers, names: Sequence[str] = ("x-api-key",)) -> bytes | None:
    """The key that was sent, as bytes. Raises Unauthenticated where there is more than one, or it cannot be a key.

    Args:
        names: headers that hold nothing but a key.
    """
    bearers, stated = headers.getlist("authorization"), [headers.getlist(name) for name in names]
    if len(bearers) > 1 or any(len(values) > 1 for values in stated):
        raise Unauthenticated("more than one API key was given")
    plain = [value for values in stated for value in values]
    sent = {key for key in (*map(_bearer, bearers), *(text.strip(" \t") for text in plain)) if key}
    if len(sent) > 1:
        raise Unauthenticated(f"Authorization and {' and '.join(names)} hold different API keys; send one of them")
    raw = "".join(sent).encode("latin-1")
    if len(raw) > _MAX_KEY_BYTES:
        raise Unauthenticated("this cannot be an API key: it is too long")
    return raw or None


def _bearer(header: str) -> str:
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header must be `Bearer` and a key")
    return value.strip(" \t")


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def check_host(headers: Headers, settings: Settings) -> None:
    """On loopback only its own names, so that no web page reaches it by a name of its own (DNS rebinding)."""
    hosts = headers.getlist("host")
    if len(hosts) != 1:
        raise Forbidden("a request needs exactly one Host header")
    name = _host_name(hosts[0])
    if not name:
        raise Forbidden(f"the Host {hosts[0][:100]!r} is not the name of a host")
    open_to_all = not is_loopback(settings.host) and not settings.allowed_hosts
    if open_to_all or name in LOOPBACK_NAMES or name == settings.host or name in _names(settings.allowed_hosts):
        return
    raise Forbidden(f"the Host {hosts[0][:100]!r} is not served here; add it to allowed_hosts if it should be")


def check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """A browser names the page that calls: this server's own, or one that was allowed."""
    for origin in headers.getlist("origin"):
        if origin in allowed:
            continue
        host = next(iter(headers.getlist("host")), "").lower()
        if origin.lower() in (f"{scheme}://{host}" for scheme in ("http", "https")):
            continue
        raise Forbidden(f"calls from the web page at {origin[:100]!r} are not allowed; see allowed_origins")


def _host_name(host: str) -> str:
    """Empty where it is no name or address with at most a port: no user, no path, no second host behind a trick."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else ""


def _names(allowed: Collection[str]) -> set[str]:
    return {_host_name(host) for host in allowed}
