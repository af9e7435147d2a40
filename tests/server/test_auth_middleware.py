from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.types import Message

from proxy.server.auth import KEY_IN_SCOPE, PRINCIPAL, AuthMiddleware, RequestAuthorizer
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey, digest_of
from proxy.storage.snapshot import build_state
from proxy.storage.state_reader import StoredState
from tests.support.makers import snapshot_inputs

ROOT_KEY = "root-key-of-the-tests"
SECRET = "ur-" + "s" * 43
EARLIER = "ur-" + "e" * 43
NOON = 1_700_000_000.0
KEY = ClientKey("k1", "team", digest_of(SECRET), NOON)
GRACED = replace(KEY, previous_digest=digest_of(EARLIER), previous_until=NOON + 60)
REFUSED = "ur-" + "x" * 43
BEARER = {"authorization": f"Bearer {SECRET}"}


class Server:
    """Put AuthMiddleware before an app that answers 200 with the caller."""

    def __init__(
        self,
        *keys: ClientKey,
        root: str | None = ROOT_KEY,
        now: float = NOON,
        latched: bool = True,
        read: bool = True,
    ) -> None:
        """Set up the server. `read`: whether the store has answered since this process started."""
        settings = Settings(admin_key=SecretStr(root) if root else None)
        stored = (
            StoredState(version=1, keys={key.id: key for key in keys}, keys_exist=bool(keys)) if read else StoredState()
        )
        state = build_state(stored, snapshot_inputs(), keys_latched=latched)
        self.now = now
        self._auth = AuthMiddleware(self._app, RequestAuthorizer(settings, lambda: state, lambda: self.now))

    def __call__(
        self, path: str = "/v1/models", method: str = "GET", *headers: tuple[bytes, bytes], **more: Any
    ) -> tuple[int, str]:
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [*headers], **more}
        scope["headers"].append((b"host", b"localhost"))
        return asyncio.run(self._exchange(scope))

    async def _exchange(self, scope: dict[str, Any]) -> tuple[int, str]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        await self._auth(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        key = scope[KEY_IN_SCOPE]
        await PlainTextResponse(f"{scope[PRINCIPAL]} {key.id if key else None}")(scope, receive, send)


def bearer(secret: str | bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + (secret if isinstance(secret, bytes) else secret.encode())


def plain(secret: str) -> tuple[bytes, bytes]:
    return b"x-api-key", secret.encode()


def test_before_keys_were_read_no_key_is_called_wrong() -> None:
    server = Server(KEY, read=False)

    assert server("/v1/models", "GET", bearer(SECRET))[0] == 503
    assert server("/v1/models")[0] == 503
    assert server("/v1/models", "GET", bearer(ROOT_KEY)) == (200, "root None")


def test_client_key_root_key_and_no_key_make_different_principals() -> None:
    server = Server(KEY)
    assert server("/v1/models", "GET", bearer(SECRET)) == (200, "k1 k1")
    assert server("/v1/models", "GET", plain(SECRET)) == (200, "k1 k1")
    assert server("/admin/keys", "POST", bearer(ROOT_KEY)) == (200, "root None")
    assert server("/healthz") == (200, "- None")
    assert Server(latched=False)("/v1/models") == (200, "- None")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [bearer("")],
        [bearer(REFUSED)],
        [bearer(SECRET[:-1])],
        [bearer(SECRET + "s")],
        [bearer(SECRET.upper())],
        [bearer(digest_of(SECRET))],
        [bearer(SECRET + "\0")],
        [bearer("\0")],
        [bearer("x" * 10_000)],
        [bearer(SECRET + " " * 10 + SECRET)],
        [bearer("ключ-ürgh-🔑")],
        [bearer(SECRET.encode() + b"\xa0")],
        [bearer(SECRET.encode() + b"\x85")],
        [bearer(b"\xff\xfe")],
        [bearer(SECRET), bearer(SECRET)],
        [plain(SECRET), plain(SECRET)],
        [bearer(SECRET), plain(REFUSED)],
        [bearer(REFUSED), plain(SECRET)],
        [bearer(ROOT_KEY), plain(SECRET)],
        [(b"authorization", b"Basic " + SECRET.encode())],
        [(b"authorization", SECRET.encode())],
        [(b"cookie", b"api_key=" + SECRET.encode())],
        [(b"proxy-authorization", b"Bearer " + SECRET.encode())],
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/models"])
def test_anything_but_one_valid_key_is_refused(headers: list[tuple[bytes, bytes]], path: str) -> None:
    assert Server(replace(KEY, role="admin"))(path, "GET", *headers)[0] == 401


def test_a_key_in_the_query_is_not_read() -> None:
    for name in ("api_key", "key", "access_token", "x-api-key", "authorization"):
        query = f"{name}={SECRET}".encode()
        assert Server(KEY)("/v1/models", "GET", query_string=query)[0] == 401


def test_both_headers_may_hold_the_same_key() -> None:
    assert Server(KEY)("/v1/models", "GET", bearer(SECRET), plain(SECRET)) == (200, "k1 k1")


def test_a_revoked_key_and_its_previous_secret_are_refused() -> None:
    server = Server(replace(GRACED, revoked=True))
    assert [server("/v1/models", "GET", bearer(secret))[0] for secret in (SECRET, EARLIER)] == [401, 401]


def test_a_key_expires_by_this_machines_clock_even_if_that_is_set_back() -> None:
    server = Server(replace(GRACED, expires_at=NOON + 10))
    assert server("/v1/models", "GET", bearer(SECRET))[0] == 200
    server.now = NOON + 10
    status, body = server("/v1/models", "GET", bearer(SECRET))
    assert (status, "has expired" in body) == (401, True)
    assert server("/v1/models", "GET", bearer(EARLIER))[0] == 401
    server.now = NOON + 9
    assert server("/v1/models", "GET", bearer(SECRET))[0] == 200


def test_the_secret_before_a_rotation_is_valid_within_its_grace_period() -> None:
    server = Server(GRACED)
    assert server("/v1/models", "GET", bearer(EARLIER)) == (200, "k1 k1")
    server.now = NOON + 60
    assert [server("/v1/models", "GET", bearer(secret))[0] for secret in (EARLIER, SECRET)] == [401, 200]


ALLOWED = {
    "client": [200, 200, 200, 403, 403, 403, 403],
    "viewer": [200, 403, 403, 200, 200, 403, 403],
    "admin": [200, 200, 200, 200, 200, 200, 200],
}
CALLS = [
    *(("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/route"), ("GET", "/metrics")),
    *(("GET", "/admin/keys"), ("POST", "/admin/keys"), ("DELETE", "/admin/models/a")),
]


@pytest.mark.parametrize("role", ALLOWED)
def test_a_role_allows_its_own_calls_alone(role: Any) -> None:
    server = Server(replace(KEY, role=role))
    assert [server(path, method, bearer(SECRET))[0] for method, path in CALLS] == ALLOWED[role]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "get", "PROPFIND"])
def test_a_viewer_may_use_safe_methods_alone(method: str) -> None:
    for path in ("/admin/models/a", "/v1/chat/completions", "/somewhere"):
        assert Server(replace(KEY, role="viewer"))(path, method, bearer(SECRET))[0] == 403


@pytest.mark.parametrize("role", ["client", "viewer", "admin"])
def test_without_a_root_key_admin_paths_are_forbidden_to_every_key(role: Any) -> None:
    server = Server(replace(KEY, role=role), root=None)
    for path in ("/admin", "/admin/keys", "/admin/nothing"):
        status, body = server(path, "GET", bearer(SECRET))
        assert (status, "UNIROUTE_ADMIN_KEY" in body) == (403, True)
    assert server("/v1/models", "GET", bearer(SECRET))[0] == 200


def test_a_stored_key_with_the_root_keys_digest_does_not_shadow_it() -> None:
    imposter = ClientKey("k2", "imposter", digest_of(ROOT_KEY), NOON, expires_at=NOON - 1)
    assert Server(imposter)("/admin/keys", "DELETE", bearer(ROOT_KEY)) == (200, "root None")


def test_no_key_does_not_match_the_digest_of_an_empty_one() -> None:
    nothing = ClientKey("k0", "nothing", digest_of(""), NOON, role="admin")
    for path in ("/admin/keys", "/v1/models"):
        assert Server(nothing)(path)[0] == 401
        assert Server(nothing)(path, "GET", bearer(""))[0] == 401


@pytest.mark.parametrize("path", ["/gateway/admin/keys", "/gateway/admin", "/gateway/metrics"])
def test_roles_are_checked_on_the_path_below_the_mount_prefix(path: str) -> None:
    server = Server(KEY)
    assert server(path, "GET", bearer(SECRET), root_path="/gateway")[0] == 403
    assert server(path, "GET", root_path="/gateway")[0] == 401
    assert server("/gateway/healthz", "GET", root_path="/gateway")[0] == 200


def test_a_web_socket_is_closed() -> None:
    async def exchange() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        auth = Server(KEY)._auth
        await auth({"type": "websocket", "path": "/v1/models", "headers": []}, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(exchange()) == [{"type": "websocket.close", "code": 1008}]


def test_an_allowed_host_allows_neither_another_nor_two_of_them() -> None:
    server = Server(latched=False)
    assert server()[0] == 200
    for hosts in ([b"evil.example"], [b"localhost", b"localhost"], [b"localhost", b"evil.example"], []):
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b""}
        headers = [(b"host", host) for host in hosts]
        assert asyncio.run(server._exchange({**scope, "headers": headers}))[0] == 403
        assert asyncio.run(server._exchange({**scope, "headers": headers}))[0] == 403
