from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import APIError, BadRequest, Forbidden, ServiceUnavailable, Unauthenticated
from proxy.server.requests import Headers, RequestHeaders, headers_of, path_of
from proxy.server.responses import render_error
from proxy.settings.schema import Settings, is_loopback
from proxy.storage.audit_log import ANONYMOUS, ROOT
from proxy.storage.client_keys import ClientKey, Role
from proxy.storage.snapshot import RoutingSnapshot

# Keys of the ASGI scope: the caller's ClientKey or None, and the caller's id, for the audit log.
KEY_IN_SCOPE = "uniroute.key"

PRINCIPAL = "uniroute.who"

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

# Clients look for the server at `/` before they send a key.
UNAUTHENTICATED_PATHS = frozenset({"/", "/healthz", "/readyz"})

_ADMIN: Final = "/admin"

DASHBOARD: Final = "/dashboard"

# Of paths that operators use: one test tells them from those of clients.
_OPERATORS: Final = (_ADMIN, DASHBOARD)

_METRICS: Final = "/metrics"

# Where OpenAI's client for Azure sends its key. It opens no admin path: they are no part of Azure's API.
_AZURE_KEY_HEADER = "api-key"

_ORIGIN = frozenset({b"origin"})

_MAX_KEY_BYTES = 4096

_MAX_CACHED_HOSTS, _MAX_CACHED_HOST_CHARS = 64, 255

_STORE_RETRY_AFTER_S = "2"


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: `root`, the id of a client key, or `-` if no key is needed."""

    id: str
    key: ClientKey | None = None


_ANONYMOUS = Principal(ANONYMOUS)


class KeyAuthenticator:
    """Find out whose key a secret is, by the current snapshot."""

    def __init__(
        self,
        settings: Settings,
        current_snapshot: Callable[[], RoutingSnapshot],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._current_snapshot = current_snapshot
        self._clock = clock
        self.throttle = AuthFailureThrottle(time.monotonic)
        admin_key = settings.admin_key
        self.root_digest = _digest(admin_key.get_secret_value().encode()) if admin_key else None

    def authenticate(self, secret: bytes | None) -> Principal:
        """Look the digest up and compare it again in constant time; the secret itself is compared with nothing.

        Raises:
            Unauthenticated, ServiceUnavailable.
        """
        digest = _digest(secret) if secret else ""
        if self.root_digest is not None and hmac.compare_digest(digest, self.root_digest):
            return Principal(ROOT)
        snapshot, now = self._current_snapshot(), self._clock()
        key = snapshot.keys.get(digest)
        if key is None and not snapshot.is_loaded:
            raise ServiceUnavailable(
                "the models and API keys here were not read yet: the store, Redis, does not answer; try again",
                headers={"retry-after": _STORE_RETRY_AFTER_S},
            )
        if key is None or key.revoked or not key.matches(digest, now):
            raise Unauthenticated("no valid API key was given; send one as Authorization: Bearer …, or as x-api-key")
        if key.expired(now):
            raise Unauthenticated("this API key has expired; ask whoever made it for another one")
        return Principal(key.id, key)

    def digests_of(self, key_id: str) -> list[tuple[str, ClientKey]]:
        """Return the digests that open for the client key of this id now: of its secret, and of the one before."""
        now = self._clock()
        return [
            (digest, key)
            for digest, key in self._current_snapshot().keys.items()
            if key.id == key_id and not key.expired(now) and key.matches(digest, now)
        ]


class RequestAuthorizer:
    """Let a request in by its path, Host, Origin and key."""

    def __init__(
        self,
        settings: Settings,
        current_snapshot: Callable[[], RoutingSnapshot],
        clock: Callable[[], float] = time.time,
        authenticator: KeyAuthenticator | None = None,
    ) -> None:
        self._settings = settings
        self._current_snapshot = current_snapshot
        authenticator = authenticator or KeyAuthenticator(settings, current_snapshot, clock)
        self._throttle = authenticator.throttle
        self._authenticate_key = authenticator.authenticate
        self._root_digest = authenticator.root_digest
        # most requests bring one of few values of Host
        self._allowed_hosts_cache: set[bytes] = set()

    def authenticate(self, path: str, headers: RequestHeaders) -> Principal:
        """Return the caller, whose role is still to be checked.

        Raises:
            APIError: the caller is not known, or not let in; `refusal` makes the answer.
        """
        if path in UNAUTHENTICATED_PATHS:
            return _ANONYMOUS
        if not path.isprintable():
            raise BadRequest("the path holds characters that cannot be printed")
        self._check_address(headers)
        if path.startswith(_OPERATORS):
            if is_dashboard(path):
                return _ANONYMOUS  # its routes check the cookie of its sessions
            if is_admin_side(path):
                if self._root_digest is None:
                    raise Forbidden("the admin side is off: set UNIROUTE_ADMIN_KEY and start again")
                return self._authenticate_key(credentials_from(headers))
        if not self._current_snapshot().keys_required:
            return _ANONYMOUS
        return self._authenticate_key(credentials_from(headers, ("x-api-key", _AZURE_KEY_HEADER)))

    async def refusal(self, error: APIError) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Return the status, body and headers for a caller that was not let in; after a while, if many are not."""
        status, body, headers = render_error(error)
        if status == 401:
            # The official clients try again unless they are told that it will not help.
            headers = {**headers, "www-authenticate": "Bearer", "x-should-retry": "false"}
            await self._throttle.delay()
        return status, body, headers

    def _check_address(self, headers: RequestHeaders) -> None:
        host = headers.value(b"host")
        if host not in self._allowed_hosts_cache:
            check_host(headers, self._settings)
            if host and len(self._allowed_hosts_cache) < _MAX_CACHED_HOSTS and len(host) <= _MAX_CACHED_HOST_CHARS:
                self._allowed_hosts_cache.add(host)
        if headers.has_any(_ORIGIN):
            check_origin(headers, self._settings.allowed_origins)


class AuthMiddleware:
    """Put the key and the id of a caller that is let in into the scope, and answer the others."""

    def __init__(self, app: ASGIApp, authorizer: RequestAuthorizer) -> None:
        self.app = app
        self._authorizer = authorizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            path = path_of(scope)
            caller = self._authorizer.authenticate(path, headers_of(scope))
            scope[KEY_IN_SCOPE], scope[PRINCIPAL] = caller.key, caller.id
            check_role(caller, scope["method"], path)
        except APIError as error:
            status, body, headers = await self._authorizer.refusal(error)
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)


# Failures within a second that are answered at once: people who mistype, a client whose key has just expired.
MAX_UNDELAYED_PER_S = 20

DELAY_S = 0.5

# Beyond these a failure is answered at once: each that waits holds a connection.
MAX_DELAYED = 512


class AuthFailureThrottle:
    """Slow down a flood of wrong keys.

    One for all callers: addresses are cheap, and behind a reverse proxy all callers have the same.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._second = 0
        self._failures = 0
        self._delayed = 0

    async def delay(self) -> None:
        """Wait before a caller is told that its key is wrong."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._failures = second, 0
        self._failures += 1
        if self._failures <= MAX_UNDELAYED_PER_S or self._delayed >= MAX_DELAYED:
            return
        self._delayed += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._delayed -= 1


def is_admin_side(path: str) -> bool:
    return path == _ADMIN or path.startswith(f"{_ADMIN}/")


def is_dashboard(path: str) -> bool:
    return path == DASHBOARD or path.startswith(f"{DASHBOARD}/")


def check_role(caller: Principal, method: str, path: str) -> None:
    """Check that the role of the caller's key allows this call. Raises Forbidden."""
    role: Role | None = None if caller.key is None else caller.key.role
    if role is None or role == "admin":
        return
    if role == "viewer":
        if method not in SAFE_METHODS:
            raise Forbidden("a key of the role viewer may only read; asking models needs the role client")
    elif is_admin_side(path):
        raise Forbidden("this call needs the admin key, or a key of the role admin")
    elif path == _METRICS:  # they tell of all models, and of what all keys have spent
        raise Forbidden("the metrics need a key of the role viewer or admin")


def credentials_from(headers: Headers, key_headers: Sequence[str] = ("x-api-key",)) -> bytes | None:
    """Return the key that was sent.

    Args:
        key_headers: headers that hold nothing but a key.

    Raises:
        Unauthenticated: there is more than one, or it cannot be a key.
    """
    bearers, plain = headers.getlist("authorization"), [headers.getlist(name) for name in key_headers]
    if len(bearers) > 1 or any(len(values) > 1 for values in plain):
        raise Unauthenticated("more than one API key was given")
    candidates = [_bearer_token(value) for value in bearers]
    candidates += [value.strip(" \t") for values in plain for value in values]
    keys = {key for key in candidates if key}
    if len(keys) > 1:
        raise Unauthenticated(
            f"Authorization and {' and '.join(key_headers)} hold different API keys; send one of them"
        )
    key = "".join(keys).encode("latin-1")
    if len(key) > _MAX_KEY_BYTES:
        raise Unauthenticated("this cannot be an API key: it is too long")
    return key or None


def _bearer_token(value: str) -> str:
    scheme, _, token = value.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header must be `Bearer` and a key")
    return token.strip(" \t")


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


def check_host(headers: Headers, settings: Settings) -> None:
    """Allow only names of this server. On loopback that stops web pages which rebind a name of theirs to it.

    Raises:
        Forbidden: there is not exactly one Host, or it is not allowed.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1:
        raise Forbidden("a request needs exactly one Host header")
    name = _host_name(hosts[0])
    if not name:
        raise Forbidden(f"the Host {hosts[0][:100]!r} is not the name of a host")
    allow_any = not is_loopback(settings.host) and not settings.allowed_hosts
    allowed = {_host_name(host) for host in settings.allowed_hosts}
    if allow_any or name in LOOPBACK_NAMES or name == settings.host or name in allowed:
        return
    raise Forbidden(f"the Host {hosts[0][:100]!r} is not served here; add it to allowed_hosts if it should be")


def check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """Allow calls from web pages of this server and of `allowed` origins. Raises Forbidden."""
    for origin in headers.getlist("origin"):
        if origin in allowed:
            continue
        host = next(iter(headers.getlist("host")), "").lower()
        if origin.lower() in (f"http://{host}", f"https://{host}"):
            continue
        raise Forbidden(f"calls from the web page at {origin[:100]!r} are not allowed; see allowed_origins")


def _host_name(host: str) -> str:
    """Return the name or address without its port; empty if there is anything else in it: a user, a path."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else ""
