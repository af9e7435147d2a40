"""The guard as the server calls it: who comes in with which key, when, and to what. Real guard and state, no socket."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.types import Message

from proxy.server.auth import KEY_IN_SCOPE, PRINCIPAL, AuthMiddleware
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey, digest_of
from proxy.storage.reader import StoredState
from proxy.storage.snapshot import build_state
from tests.support.makers import snapshot_inputs

ROOT_KEY = "root-key-of-the-tests"
SECRET = "ur-" + "s" * 43
EARLIER = "ur-" + "e" * 43
NOON = 1_700_000_000.0
KEY = ClientKey("k1", "team", digest_of(SECRET), NOON)
GRACED = replace(KEY, previous_digest=digest_of(EARLIER), previous_until=NOON + 60)
REFUSED = "ur-" + "x" * 43
BEARER = {"authorization": f"Bearer {SECRET}"}


class Door:
    """A guard before an app that answers 200 with who came in."""

    def __init__(
        self,
        *keys: ClientKey,
        root: str | None = ROOT_KEY,
        now: float = NOON,
        latched: bool = True,
        read: bool = True,
    ) -> None:
        """`read`: whether the store has answered yet, since this process started."""
        settings = Settings(admin_key=SecretStr(root) if root else None)
        stored = (
            StoredState(version=1, keys={key.id: key for key in keys}, keys_exist=bool(keys)) if read else StoredState()
        )
        state = build_state(stored, snapshot_inputs(), keys_latched=latched)
        self.now = now
        self._guard = AuthMiddleware(self._app, settings, lambda: state, lambda: self.now)

    def __call__(
        self, path: str = "/v1/models", method: str = "GET", *headers: tuple[bytes, bytes], **more: Any
    ) -> tuple[int, str]:
        """Status and body."""
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [*headers], **more}
        scope["headers"].append((b"host", b"localhost"))
        return asyncio.run(self._exchange(scope))

    async def _exchange(self, scope: dict[str, Any]) -> tuple[int, str]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        await self._guard(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        key = scope[KEY_IN_SCOPE]
        await PlainTextResponse(f"{scope[PRINCIPAL]} {key.id if key else None}")(scope, receive, send)


def bearer(secret: str | bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + (secret if isinstance(secret, bytes) else secret.encode())


def plain(secret: str) -> tuple[bytes, bytes]:
    return b"x-api-key", secret.encode()


def test_before_any_key_could_be_read_none_is_called_wrong() -> None:
    door = Door(KEY, read=False)

    assert door("/v1/models", "GET", bearer(SECRET))[0] == 503
    assert door("/v1/models")[0] == 503
    assert door("/v1/models", "GET", bearer(ROOT_KEY)) == (200, "root None")


def test_a_key_the_root_key_and_no_key_are_told_apart() -> None:
    door = Door(KEY)
    assert door("/v1/models", "GET", bearer(SECRET)) == (200, "k1 k1")
    assert door("/v1/models", "GET", plain(SECRET)) == (200, "k1 k1")
    assert door("/admin/keys", "POST", bearer(ROOT_KEY)) == (200, "root None")
    assert door("/healthz") == (200, "- None")
    assert Door(latched=False)("/v1/models") == (200, "- None")


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
def test_what_is_not_one_good_key_opens_nothing(headers: list[tuple[bytes, bytes]], path: str) -> None:
    assert Door(replace(KEY, role="admin"))(path, "GET", *headers)[0] == 401


def test_a_key_in_the_query_is_no_key() -> None:
    for name in ("api_key", "key", "access_token", "x-api-key", "authorization"):
        query = f"{name}={SECRET}".encode()
        assert Door(KEY)("/v1/models", "GET", query_string=query)[0] == 401


def test_both_headers_may_hold_the_same_key() -> None:
    assert Door(KEY)("/v1/models", "GET", bearer(SECRET), plain(SECRET)) == (200, "k1 k1")


def test_a_revoked_key_opens_nothing_nor_does_its_earlier_secret() -> None:
    door = Door(replace(GRACED, revoked=True))
    assert [door("/v1/models", "GET", bearer(secret))[0] for secret in (SECRET, EARLIER)] == [401, 401]


def test_an_expired_key_opens_nothing_by_this_machines_clock_and_again_when_that_is_set_back() -> None:
    door = Door(replace(GRACED, expires_at=NOON + 10))
    assert door("/v1/models", "GET", bearer(SECRET))[0] == 200
    door.now = NOON + 10
    status, body = door("/v1/models", "GET", bearer(SECRET))
    assert (status, "has expired" in body) == (401, True)
    assert door("/v1/models", "GET", bearer(EARLIER))[0] == 401
    door.now = NOON + 9
    assert door("/v1/models", "GET", bearer(SECRET))[0] == 200


def test_the_secret_before_a_rotation_opens_within_its_grace() -> None:
    door = Door(GRACED)
    assert door("/v1/models", "GET", bearer(EARLIER)) == (200, "k1 k1")
    door.now = NOON + 60
    assert [door("/v1/models", "GET", bearer(secret))[0] for secret in (EARLIER, SECRET)] == [401, 200]


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
def test_a_role_opens_its_own_doors_alone(role: Any) -> None:
    door = Door(replace(KEY, role=role))
    assert [door(path, method, bearer(SECRET))[0] for method, path in CALLS] == ALLOWED[role]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "get", "PROPFIND"])
def test_a_viewer_reads_and_nothing_else_whatever_the_method_is_called(method: str) -> None:
    for path in ("/admin/models/a", "/v1/chat/completions", "/somewhere"):
        assert Door(replace(KEY, role="viewer"))(path, method, bearer(SECRET))[0] == 403


@pytest.mark.parametrize("role", ["client", "viewer", "admin"])
def test_without_a_root_key_there_is_no_admin_side_for_any_key(role: Any) -> None:
    door = Door(replace(KEY, role=role), root=None)
    for path in ("/admin", "/admin/keys", "/admin/nothing"):
        status, body = door(path, "GET", bearer(SECRET))
        assert (status, "UNIROUTE_ADMIN_KEY" in body) == (403, True)
    assert door("/v1/models", "GET", bearer(SECRET))[0] == 200


def test_no_key_in_the_store_can_stand_in_the_way_of_the_root_key() -> None:
    imposter = ClientKey("k2", "imposter", digest_of(ROOT_KEY), NOON, expires_at=NOON - 1)
    assert Door(imposter)("/admin/keys", "DELETE", bearer(ROOT_KEY)) == (200, "root None")


def test_an_empty_root_digest_is_not_the_digest_of_no_key() -> None:
    nothing = ClientKey("k0", "nothing", digest_of(""), NOON, role="admin")
    for path in ("/admin/keys", "/v1/models"):
        assert Door(nothing)(path)[0] == 401
        assert Door(nothing)(path, "GET", bearer(""))[0] == 401


@pytest.mark.parametrize("path", ["/gateway/admin/keys", "/gateway/admin", "/gateway/metrics"])
def test_a_prefix_that_the_server_is_mounted_under_hides_no_door(path: str) -> None:
    door = Door(KEY)
    assert door(path, "GET", bearer(SECRET), root_path="/gateway")[0] == 403
    assert door(path, "GET", root_path="/gateway")[0] == 401
    assert door("/gateway/healthz", "GET", root_path="/gateway")[0] == 200


def test_a_web_socket_is_closed() -> None:
    async def exchange() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        guard = Door(KEY)._guard
        await guard({"type": "websocket", "path": "/v1/models", "headers": []}, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(exchange()) == [{"type": "websocket.close", "code": 1008}]


def test_a_host_that_was_served_opens_the_door_to_no_other_and_not_to_two() -> None:
    door = Door(latched=False)
    assert door()[0] == 200
    for hosts in ([b"evil.example"], [b"localhost", b"localhost"], [b"localhost", b"evil.example"], []):
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b""}
        headers = [(b"host", host) for host in hosts]
        assert asyncio.run(door._exchange({**scope, "headers": headers}))[0] == 403
        assert asyncio.run(door._exchange({**scope, "headers": headers}))[0] == 403
