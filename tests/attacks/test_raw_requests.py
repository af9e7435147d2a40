from __future__ import annotations

import pytest

from tests.attacks.conftest import ADMIN, Attacked
from tests.support.raw_http import send

HOST = b"host: localhost\r\n"
BODY = b'{"model":"fair","messages":[{"role":"user","content":"hi"}]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"content-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
WHOLE = POST + LENGTH + b"\r\n" + BODY
NEXT = b"GET /admin/models HTTP/1.1\r\n" + HOST + b"\r\n"
KEY = f"authorization: {ADMIN['authorization']}\r\n".encode()

# Where one server sees one request, another may see two: the second would come in under the first one's key.
TWO_READINGS = [
    POST + LENGTH + CHUNKED + b"\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + LENGTH + b"\r\n0\r\n\r\n" + NEXT,
    POST + LENGTH + b"content-length: 5\r\n\r\n" + BODY,
    POST + LENGTH + LENGTH + b"\r\n" + BODY,
    POST + b"content-length: 60, 60\r\n\r\n" + BODY,
    POST + b"content-length: +60\r\n\r\n" + BODY,
    POST + b"content-length: -1\r\n\r\n" + BODY,
    POST + b"content-length: 0x3c\r\n\r\n" + BODY,
    POST + b"content-length: 6 0\r\n\r\n" + BODY,
    POST + b"content-length: 99999999999999999999999999\r\n\r\n" + BODY,
    POST + b"content-length:\r\n\r\n" + BODY,
    POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding: identity\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding: \x0bchunked\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b" transfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b"x-a: b\r\n lambda: 0.5\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b"x-a: b\rlambda: 7\r\n" + LENGTH + b"\r\n" + BODY,
    (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    POST + b"lambda: 0.1\n" + LENGTH + b"\r\n" + BODY,
    POST + b"lambda: 0\x00.1\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b"lam\x00bda: 0.1\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b"no colon\r\n" + LENGTH + b"\r\n" + BODY,
    POST + b": no name\r\n" + LENGTH + b"\r\n" + BODY,
    POST + CHUNKED + b"\r\nzz\r\n",
    POST + CHUNKED + b"\r\n-1\r\n",
    POST + CHUNKED + b"\r\n0x3c\r\n" + BODY + b"\r\n0\r\n\r\n",
    POST + CHUNKED + b"\r\nfffffffffffffffff\r\n",
    POST + CHUNKED + b"\r\n3c\n" + BODY + b"\n0\n\n",
    POST + CHUNKED + b"\r\n3c \r\n" + BODY + b"\r\n0\r\n\r\n",
    POST + CHUNKED + b"\r\n3b\r\n" + BODY + b"\r\n0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\n" + HOST + b"\r\n",
    b"get /healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    b"FOO /healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /healthz /admin/models HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /v1/models/\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /v1/\x00models HTTP/1.1\r\n" + HOST + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\xff" * 100 + b"\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("raw", TWO_READINGS)
def test_an_ambiguous_request_is_refused(attacked: Attacked, raw: bytes) -> None:
    (answer,) = send(attacked.address, raw)

    assert (answer.status, answer.code, answer.closed) == (400, "invalid_http_request", True)
    assert attacked.fair.history == []


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"xchunked", b"deflate", b"chunked\r\ntransfer-encoding: chunked"]
)
def test_other_transfer_codings_are_refused(attacked: Attacked, coding: bytes) -> None:
    (answer,) = send(attacked.address, POST + b"transfer-encoding: " + coding + b"\r\n\r\n0\r\n\r\n" + NEXT)

    assert answer.status in (400, 501)
    assert answer.closed


def test_chunks_in_http_1_0_are_refused(attacked: Attacked) -> None:
    (answer,) = send(attacked.address, POST.replace(b"1.1", b"1.0", 1) + CHUNKED + b"\r\n0\r\n\r\n" + NEXT)

    assert answer.status == 501


@pytest.mark.parametrize("version", [b"1.0\r\n", b"1.1\r\n", None])
def test_a_request_without_a_host_gets_no_further_than_health(attacked: Attacked, version: bytes | None) -> None:
    end = b"\r\n" if version is None else b" HTTP/" + version
    (health,) = send(attacked.address, b"GET /healthz" + end + b"\r\n")
    (models,) = send(attacked.address, b"GET /v1/models" + end + b"\r\n")

    assert (health.status, models.status) == (200, 403)


def test_what_follows_a_body_is_a_request_of_its_own(attacked: Attacked) -> None:
    """And shows its own key."""
    first, second = send(attacked.address, WHOLE.replace(LENGTH, LENGTH + KEY) + NEXT)

    assert (first.status, second.status) == (200, 401)


def test_a_key_in_a_trailer_is_not_accepted(attacked: Attacked) -> None:
    (answer,) = send(attacked.address, NEXT[:-2] + CHUNKED + b"\r\n0\r\n" + KEY + b"\r\n")

    assert answer.status == 401


def test_an_upgrade_to_http_2_with_a_body_is_answered_in_http_1(attacked: Attacked) -> None:
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    (answer,) = send(attacked.address, POST + offer + LENGTH + b"\r\n", BODY)

    assert (answer.status, answer.json()["model"]) == (200, "fair")


def test_a_body_cannot_hide_a_request_behind_an_upgrade(attacked: Attacked) -> None:
    offer = b"connection: upgrade\r\nupgrade: websocket\r\n"
    hidden = b"POST /admin/models HTTP/1.1\r\n" + HOST + KEY + b"content-length: 0\r\n\r\n"
    (answer,) = send(attacked.address, POST + offer + b"content-length: %d\r\n\r\n" % len(hidden), hidden)

    assert (answer.status, "not JSON" in answer.json()["error"]["message"]) == (400, True)


def test_continue_is_sent_only_to_authorized_clients(attacked: Attacked) -> None:
    """A body that will not be read is not asked for."""
    raw = b"POST /admin/models HTTP/1.1\r\n" + HOST + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n"
    (answer,) = send(attacked.address, raw, wait_s=0.3)

    assert answer.status == 401


@pytest.mark.parametrize("name", [b"x-http-method-override", b"x-method-override", b"x-http-method"])
def test_the_method_is_the_one_of_the_request(attacked: Attacked, name: bytes) -> None:
    (answer,) = send(attacked.address, WHOLE.replace(LENGTH, LENGTH + name + b": DELETE\r\n"))

    assert (answer.status, answer.json()["model"]) == (200, "fair")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_of_http_1_0_gets_its_answer_without_chunks(attacked: Attacked, stream: bool) -> None:
    body = b'{"model": "fair", "stream": %s, "messages": [{"role": "user", "content": "hi"}]}'
    body %= str(stream).lower().encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"content-length: %d\r\nconnection: keep-alive\r\n\r\n" % len(body)
    (answer,) = send(attacked.address, head + body, wait_s=5.0)

    assert (answer.status, answer.closed, "transfer-encoding" in answer.headers) == (200, True, False)
    assert ("content-length" in answer.headers) is not stream
    assert answer.body[:6] == b"data: " if stream else answer.json()["model"] == "fair"
    assert not stream or answer.body.endswith(b"data: [DONE]\n\n")


def test_the_next_request_of_http_1_1_is_chunked_again(attacked: Attacked) -> None:
    body = b'{"model": "fair", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    (answer,) = send(attacked.address, head + b"content-length: %d\r\n\r\n" % len(body) + body, wait_s=1.0)

    assert (answer.status, answer.headers["transfer-encoding"], answer.closed) == (200, "chunked", False)
