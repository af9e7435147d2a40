"""Sessions of the page, in a cookie that every worker can check.

    PRINCIPAL.ISSUED.NONCE.MAC

The MAC's key is derived from the admin key, and the MAC covers the digest of the client key that opened the session: a
session ends with its key, with a rotation of it, and with the admin key. Redis holds those that were ended before their
time. Before anybody has logged in, a cookie of the principal "-" ties the form to the browser.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from proxy.errors import Forbidden
from proxy.server.auth import DASHBOARD, KeyAuthenticator, Principal
from proxy.server.requests import headers_of
from proxy.settings.schema import Settings
from proxy.storage.audit_log import ANONYMOUS, ROOT
from proxy.storage.redis import Store, StoreUnavailable

COOKIE = "uniroute_session"

MAX_SESSION_S = 12 * 3600

# Clocks of replicas differ.
MAX_SKEW_S = 60

MAX_ENDED = 10_000

_TOKEN = re.compile(r"([A-Za-z0-9_-]{1,128})\.([0-9]{1,12})\.([A-Za-z0-9_-]{22})\.([A-Za-z0-9_-]{43})")


class SessionRequired(Exception):
    """Nobody is logged in, or no longer."""


@dataclass(frozen=True, slots=True)
class Session:
    """Who looks at the page."""

    principal: Principal
    nonce: str
    issued: int
    """Unix seconds."""
    form_token: str = field(repr=False)
    """To be sent back by every form."""

    @property
    def logged_in(self) -> bool:
        return self.principal.id != ANONYMOUS

    @property
    def may_write(self) -> bool:
        key = self.principal.key
        return self.principal.id == ROOT or (key is not None and key.role == "admin")


class Sessions:
    """Open, check and end sessions."""

    def __init__(
        self, settings: Settings, authenticator: KeyAuthenticator, clock: Callable[[], float] = time.time
    ) -> None:
        self._authenticator = authenticator
        self._clock = clock
        admin_key = settings.admin_key
        self._secret = (
            hmac.digest(admin_key.get_secret_value().encode(), b"sessions of the dashboard", hashlib.sha256)
            if admin_key
            else None
        )
        # Ended by this process: they stay so while Redis is away.
        self._ended: dict[str, None] = {}

    @property
    def possible(self) -> bool:
        """Whether an admin key is set, from which the cookies' key is derived."""
        return self._secret is not None

    def open(self, principal: Principal, digest: str) -> tuple[Session, str]:
        """Return a new session and its cookie. `digest`: of the key that opens it."""
        issued, nonce = int(self._clock()), secrets.token_urlsafe(16)
        content = f"{principal.id}.{issued}.{nonce}"
        return self._session(principal, issued, nonce), f"{content}.{self._mac('session', content, digest)}"

    def open_anonymous(self) -> tuple[Session, str]:
        return self.open(Principal(ANONYMOUS), "")

    async def find(self, request: Request, store: Store) -> Session | None:
        """Return the session of a request's cookie; None if there is none, or it has ended."""
        session = self.check(request.cookies.get(COOKIE, ""))
        if session is None or session.nonce in self._ended:
            return None
        if session.logged_in and await self._was_ended(session, store):
            return None
        return session

    def check(self, cookie: str) -> Session | None:
        """Return the session that a cookie stands for, if its key still opens."""
        found = _TOKEN.fullmatch(cookie)
        if found is None or self._secret is None:
            return None
        principal_id, issued, nonce, mac = found.groups()
        age_s = self._clock() - int(issued)
        if not -MAX_SKEW_S <= age_s < MAX_SESSION_S:
            return None
        for digest, principal in self._keys_of(principal_id):
            expected = self._mac("session", f"{principal_id}.{issued}.{nonce}", digest)
            if hmac.compare_digest(mac, expected):
                return self._session(principal, int(issued), nonce)
        return None

    async def end(self, session: Session, store: Store) -> None:
        """End a session on all replicas; on this process alone if Redis does not answer."""
        if len(self._ended) >= MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        self._ended[session.nonce] = None
        try:
            async with store.operation("end a session") as client:
                await client.set(_ended_key(session), "1", ex=MAX_SESSION_S)
        except StoreUnavailable:
            pass

    async def _was_ended(self, session: Session, store: Store) -> bool:
        try:
            async with store.operation("look for a session") as client:
                return bool(await client.exists(_ended_key(session)))
        except StoreUnavailable:
            return False

    def _keys_of(self, principal_id: str) -> list[tuple[str, Principal]]:
        """Return the digests that the session of this principal may have been opened by."""
        if principal_id == ANONYMOUS:
            return [("", Principal(ANONYMOUS))]
        if principal_id == ROOT:
            return [(self._authenticator.root_digest or "", Principal(ROOT))]
        return [
            (digest, Principal(key.id, key))
            for digest, key in self._authenticator.digests_of(principal_id)
            if key.role != "client"
        ]

    def _session(self, principal: Principal, issued: int, nonce: str) -> Session:
        return Session(principal, nonce, issued, self._mac("form", principal.id, nonce))

    def _mac(self, *parts: str) -> str:
        assert self._secret is not None
        digest = hmac.digest(self._secret, "\n".join(parts).encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _ended_key(session: Session) -> str:
    return f"uniroute:dashboard:ended:{session.nonce}"


def set_cookie(response: Response, request: Request, cookie: str | None) -> None:
    """Set the session's cookie; None: delete it.

    A browser names the scheme that it uses in Origin, also behind a proxy that ends TLS.
    """
    origins = headers_of(request.scope).getlist("origin")
    secure = request.scope["scheme"] == "https" or any(origin.lower().startswith("https://") for origin in origins)
    response.set_cookie(
        COOKIE,
        cookie or "",
        max_age=MAX_SESSION_S if cookie else 0,
        path=request.scope.get("root_path", "") + DASHBOARD,
        secure=secure,
        httponly=True,
        samesite="strict",
    )


def check_form(session: Session, request: Request, token: str) -> None:
    """Refuse a form that another site has sent. Raises Forbidden.

    `allowed_origins` may read the API; they may not use an operator's session.
    """
    headers = headers_of(request.scope)
    host = next(iter(headers.getlist("host")), "").lower()
    origins = [origin.lower() for origin in headers.getlist("origin")]
    if len(origins) != 1 or origins[0] not in (f"http://{host}", f"https://{host}"):
        raise Forbidden("forms of this page are taken from this page alone: the Origin is missing, or another")
    if not hmac.compare_digest(token.encode(), session.form_token.encode()):
        raise Forbidden("this form was made for another session: go back, load the page again, and repeat it")
