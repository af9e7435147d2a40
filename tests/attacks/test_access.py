from __future__ import annotations

import pytest

from tests.attacks.conftest import ADMIN, Attacked
from tests.support.raw_http import send

ADMIN_KEY = ADMIN["authorization"].removeprefix("Bearer ").encode()


def get(attacked: Attacked, target: bytes, *headers: bytes, method: bytes = b"GET") -> int:
    lines = b"".join(line + b"\r\n" for line in (headers or (b"host: localhost",)))
    answers = send(attacked.address, b"%s %s HTTP/1.1\r\n%s\r\n" % (method, target, lines))
    assert len(answers) == 1
    assert set(answers[0].json()) != {"models", "state_version"}, "the admin side was open"
    return answers[0].status


@pytest.mark.parametrize(
    "target",
    [
        b"/admin/models", b"/admin/models/", b"/admin", b"/admin/", b"//admin/models", b"/admin//models",
        b"/./admin/models", b"/v1/../admin/models", b"/v1/models/../../admin/models", b"/healthz/../admin/models",
        b"/%61dmin/models", b"/admin%2fmodels", b"/admin%2Fmodels", b"/%2e%2e/admin/models", b"/v1/%2e%2e/admin/models",
        b"/v1/models/..%2f..%2fadmin%2fmodels", b"/healthz/%2e%2e/admin/models", b"/admin%252fmodels",
        b"/ADMIN/models", b"/Admin/Models", b"/admin;x=y/models", b"/admin/models;.json", b"/admin\\models",
        b"/admin/models%20", b"/%20admin/models", b"/admin/models?x=/healthz", b"/admin/models#/healthz",
        b"/healthz%2f..%2fadmin%2fmodels", b"/healthz?/admin/models", b"/healthz;/admin/models",
        b"/admin/models%00", b"/admin/models%0a", b"/admin%0a/models", b"/%0aadmin/models", b"/admin/models%e2%80%8b",
        b"/%ef%bc%81dmin/models", b"/adm%C4%B1n/models", b"/admin/models%c0%af", b"http://localhost/admin/models",
        b"http://localhost:80/healthz/../admin/models", b"/admin/models/fair", b"/admin/jobs/x",
    ],
)  # fmt: skip
def test_no_spelling_of_the_path_reaches_the_admin_api(attacked: Attacked, target: bytes) -> None:
    status = get(attacked, target)

    assert status in ((200,) if target.startswith(b"/healthz?") else (400, 401, 404))


@pytest.mark.parametrize("path", ["%00", "%0a", "%0d%0aset-cookie:x", "%7f", "%1b[2J", "%e2%80%ae", "auto%0a"])
def test_a_path_that_cannot_be_printed_is_refused_and_not_repeated(attacked: Attacked, path: str) -> None:
    (answer,) = send(attacked.address, f"GET /v1/models/{path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())

    assert (answer.status, "cannot be printed" in answer.json()["error"]["message"]) == (400, True)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example", b"localhost.evil.example", b"evil.example:80", b"localhost@evil.example", b"evil@localhost",
        b"user:pw@localhost", b"localhost:80@evil.example", b"localhost:evil", b"localhost:", b"localhost:80:80",
        b"localhost.", b"localhost/evil", b"localhost?evil", b"localhost#evil", b"localhost\\evil", b"localhost, evil",
        b"localhost evil", b"[::1", b"::1", b"[::2]", b"[::1]evil", b"[evil]", b"127.1", b"2130706433", b"0x7f.1",
        b"0.0.0.0", b"127.0.0.2", b"\xff", b"", b"http://localhost", b"%6cocalhost", b"localhost:000000080",
    ],
)  # fmt: skip
def test_a_host_that_is_not_allowed_is_refused(attacked: Attacked, host: bytes) -> None:
    assert get(attacked, b"/v1/models", b"host: " + host) == 403


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:1", b"127.0.0.1:99", b"[::1]", b"[::1]:8000"])
def test_a_host_of_this_machine_is_served(attacked: Attacked, host: bytes) -> None:
    assert get(attacked, b"/v1/models", b"host: " + host) == 200


@pytest.mark.parametrize(
    "headers",
    [
        (b"host: localhost", b"host: evil.example"),
        (b"host: localhost", b"host: localhost"),
        (b"x-forwarded-host: localhost", b"host: evil.example"),
        (b"forwarded: host=localhost", b"host: evil.example"),
        (b"x-original-host: localhost", b"host: evil.example"),
    ],
)
def test_only_one_host_header_is_accepted_and_nothing_replaces_it(
    attacked: Attacked, headers: tuple[bytes, ...]
) -> None:
    assert get(attacked, b"/v1/models", *headers) == 403


@pytest.mark.parametrize(
    "target", [b"http://evil.example/v1/models", b"https://localhost:99/v1/models", b"evil.example:443"]
)
def test_an_address_that_names_another_host_is_refused(attacked: Attacked, target: bytes) -> None:
    assert get(attacked, target) == 400
    assert get(attacked, b"localhost:443", method=b"CONNECT") == 400


def test_an_address_that_names_this_host_is_served(attacked: Attacked) -> None:
    assert get(attacked, b"http://localhost/v1/models") == 200


@pytest.mark.parametrize("rewritten", [b"x-original-url", b"x-rewrite-url", b"x-forwarded-prefix", b"x-forwarded-path"])
def test_no_header_changes_the_path(attacked: Attacked, rewritten: bytes) -> None:
    assert get(attacked, b"/admin/models", b"host: localhost", rewritten + b": /healthz") == 401
    assert get(attacked, b"/nothing", b"host: localhost", rewritten + b": /v1/models") == 404


@pytest.mark.parametrize(
    "key",
    [
        b"authorization: Bearer", b"authorization: Bearer  ", b"authorization: bearer x",
        b"authorization: " + ADMIN_KEY,
        b"authorization: Basic " + ADMIN_KEY, b"authorization: Bearer " + ADMIN_KEY[:-1],
        b"authorization: Bearer " + ADMIN_KEY + b"x", b"authorization: Bearer " + ADMIN_KEY.upper(),
        b"authorization: Bearer " + ADMIN_KEY + b"," + ADMIN_KEY, b"authorization: Bearer x " + ADMIN_KEY,
        b"authorization: Bearer " + b"k" * 10_000, b"authorization: Bearer \xff\xfe",
        b"authorization: Bearer \xe2\x80\x8b",
        b"authorization: Bearer *", b"authorization: Bearer ' OR 1=1 --", b"authorization: Bearer {{7*7}}",
        b'authorization: Bearer {"$ne": null}', b"x-api-key: ", b"x-api-key: *", b"api-key: " + ADMIN_KEY,
        b"cookie: key=" + ADMIN_KEY, b"authorization: Bearer x\r\nauthorization: Bearer " + ADMIN_KEY,
        b"x-api-key: " + ADMIN_KEY + b"\r\nx-api-key: x", b"authorization: Bearer x\r\nx-api-key: " + ADMIN_KEY,
    ],
)  # fmt: skip
def test_what_is_not_the_admin_key_is_refused(attacked: Attacked, key: bytes) -> None:
    assert get(attacked, b"/admin/models", b"host: localhost", *key.split(b"\r\n")) == 401


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE", b"PUT", b"PROPFIND", b"LOCK"])
@pytest.mark.parametrize("target", [b"/v1/chat/completions", b"/v1/models", b"/nothing"])
def test_other_methods_do_nothing(attacked: Attacked, method: bytes, target: bytes) -> None:
    raw = b"%s %s HTTP/1.1\r\nhost: localhost\r\ncookie: secret\r\n\r\n" % (method, target)
    (answer,) = send(attacked.address, raw)

    assert answer.status in (404, 405)
    assert b"secret" not in answer.body


@pytest.mark.parametrize(
    "origin",
    [b"http://evil.example", b"null", b"http://localhost.evil.example", b"file://", b"http://localhost:1", b"*"],
)
def test_other_origins_are_refused_even_with_the_key(attacked: Attacked, origin: bytes) -> None:
    key = f"authorization: {ADMIN['authorization']}".encode()
    assert get(attacked, b"/admin/models", b"host: localhost", b"origin: " + origin, key) == 403
