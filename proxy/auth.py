"""Who may call: keys, Host and Origin, decided on the path that the router sees. Closed unless listed here as open."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import BadRequest, Forbidden, ProxyError, Unauthenticated, describe
from proxy.settings import Settings, is_loopback
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState

log = logging.getLogger("uniroute.auth")

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
ADMIN = "/admin"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
KEY_IN_SCOPE = "uniroute.key"
_MOST_KEY_BYTES = 4096
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class Guard:
    """Pure ASGI. Puts the caller's ClientKey, or None where none is needed, into the scope."""

    def __init__(self, app: ASGIApp, settings: Settings, state: Callable[[], RoutingState]) -> None:
        self.app = app
        self._settings = settings
        self._state = state
        admin = settings.admin_key
        self._admin_digest = _digest(admin.get_secret_value().encode()) if admin else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            scope[KEY_IN_SCOPE] = self._admit(scope["path"], Headers(scope=scope))
        except ProxyError as refusal:
            status, body, headers = describe(refusal)
            challenge = {"www-authenticate": "Bearer"} if status == 401 else {}
            await JSONResponse(body, status, {**headers, **challenge})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> ClientKey | None:
        if path in OPEN_PATHS:
            return None
        if not path.isprintable():
            raise BadRequest("the path holds characters that cannot be printed")
        check_host(headers, self._settings)
        check_origin(headers, self._settings.allowed_origins)
        if path == ADMIN or path.startswith(f"{ADMIN}/"):
            self._admit_admin(headers)
            return None
        return self._client(headers)

    def _admit_admin(self, headers: Headers) -> None:
        if self._admin_digest is None:
            raise Forbidden("the admin side is off: set UNIROUTE_ADMIN_KEY and start again")
        if not self._is_admin(presented(headers)):
            raise Unauthenticated("this call needs the admin key: Authorization: Bearer …")

    def _client(self, headers: Headers) -> ClientKey | None:
        state = self._state()
        if not state.keys_required:
            return None
        key = presented(headers)
        if self._is_admin(key):
            return None
        known = state.keys.get(_digest(key)) if key else None
        if known is None or known.revoked:
            raise Unauthenticated("no valid API key was given; send one as Authorization: Bearer …, or as x-api-key")
        return known

    def _is_admin(self, key: bytes | None) -> bool:
        return bool(key) and self._admin_digest is not None and hmac.compare_digest(_digest(key), self._admin_digest)


def presented(headers: Headers) -> bytes | None:
    """The key that was sent, as bytes. Raises Unauthenticated where there is more than one, or it cannot be a key."""
    bearers, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearers) > 1 or len(plain) > 1:
        raise Unauthenticated("more than one API key was given")
    if bearers:
        scheme, _, value = bearers[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the Authorization header must be `Bearer` and a key")
        key = value.strip()
    else:
        key = plain[0].strip() if plain else ""
    raw = key.encode("latin-1")
    if len(raw) > _MOST_KEY_BYTES:
        raise Unauthenticated("this cannot be an API key: it is too long")
    return raw or None


def _digest(key: bytes | None) -> str:
    return hashlib.sha256(key or b"").hexdigest()


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
        if origin.lower() in (f"{scheme}://{headers.get('host', '').lower()}" for scheme in ("http", "https")):
            continue
        raise Forbidden(f"calls from the web page at {origin[:100]!r} are not allowed; see allowed_origins")


def _host_name(host: str) -> str:
    """Empty where it is no name or address with at most a port: no user, no path, no second host behind a trick."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else ""


def _names(allowed: Collection[str]) -> set[str]:
    return {_host_name(host) for host in allowed}
