from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.support.keyed_proxy import ASK, KeyedProxy, MadeKey


def test_a_key_is_created_listed_changed_and_revoked_and_its_secret_is_in_one_response_only(
    keyed_proxy: KeyedProxy,
) -> None:
    terms = {"models": ["fair"], "role": "client", "expires_in_s": 3600, "lambda_min": 0.05, "usd_per_day": 2.5}
    made = keyed_proxy.proxy.admin("POST", "/admin/keys", {"name": "team", **terms, "requests_per_minute": 1000})
    card = made.json()
    key = MadeKey(card["id"], card.pop("key"))

    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    assert keyed_proxy.client(key).chat.completions.create(model="auto", messages=ASK).model == "fair"
    assert keyed_proxy.proxy.admin("GET", f"/admin/keys/{key.id}").json() == card
    assert card in keyed_proxy.proxy.admin("GET", "/admin/keys").json()["keys"]
    change = {"models": None, "usd_per_day": None, "usd_per_month": 9, "name": "another team"}
    changed = keyed_proxy.proxy.admin("PATCH", f"/admin/keys/{key.id}", change)
    assert changed.json() == {**card, **change}
    assert keyed_proxy.client(key).chat.completions.create(model="good", messages=ASK).model == "good"
    assert keyed_proxy.proxy.admin("DELETE", f"/admin/keys/{key.id}").status_code == 204
    with pytest.raises(openai.AuthenticationError):
        keyed_proxy.client(key).models.list()
    assert keyed_proxy.proxy.admin("GET", f"/admin/keys/{key.id}").json()["revoked"] is True
    assert keyed_proxy.seen_anywhere(key.secret) == []
    assert key.secret not in changed.text


def test_expiry_is_given_as_a_time_or_a_duration_and_can_be_changed(keyed_proxy: KeyedProxy) -> None:
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
    key = keyed_proxy.make(expires_at=at.isoformat())
    path = f"/admin/keys/{key.id}"
    expires_at = keyed_proxy.proxy.admin("GET", path).json()["expires_at"]
    assert expires_at == at.isoformat().replace("+00:00", "Z")
    assert keyed_proxy.opens(key)
    assert keyed_proxy.proxy.admin("PATCH", path, {"expires_in_s": 0}).status_code == 200
    refused = keyed_proxy.call(key, "GET", "/v1/models")
    assert (refused.status_code, "has expired" in refused.text) == (401, True)
    assert keyed_proxy.proxy.admin("POST", f"{path}/rotate").status_code == 409
    assert keyed_proxy.proxy.admin("PATCH", path, {"expires_at": None}).json()["expires_at"] is None
    assert keyed_proxy.opens(key)


def test_a_rotation_returns_a_new_secret_and_the_old_one_works_in_its_grace_period_only(
    keyed_proxy: KeyedProxy,
) -> None:
    first = keyed_proxy.make()
    reply = keyed_proxy.proxy.admin("POST", f"/admin/keys/{first.id}/rotate", {"grace_s": 600})
    second = MadeKey(first.id, reply.json()["key"])
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
    assert [keyed_proxy.opens(key) for key in (first, second)] == [True, True]
    third = MadeKey(first.id, keyed_proxy.proxy.admin("POST", f"/admin/keys/{first.id}/rotate").json()["key"])
    assert [keyed_proxy.opens(key) for key in (first, second, third)] == [False, False, True]
    assert [keyed_proxy.seen_anywhere(key.secret) for key in (first, second, third)] == [[], [], []]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "name"),
    ({"name": " "}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": "t", "models": []}, "models"),
    ({"name": "t", "models": ["a b"]}, "models"),
    ({"name": "t", "models": "fair"}, "models"),
    ({"name": "t", "role": "root"}, "role"),
    ({"name": "t", "role": ["admin"]}, "role"),
    ({"name": "t", "expires_at": "tomorrow"}, "expires_at"),
    ({"name": "t", "expires_at": "2999-01-01T00:00:00"}, "expires_at"),
    ({"name": "t", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
    ({"name": "t", "expires_at": 4102444800}, "expires_at"),
    ({"name": "t", "expires_in_s": -1}, "expires_in_s"),
    ({"name": "t", "expires_in_s": 0}, "expires_in_s"),
    ({"name": "t", "expires_in_s": "1h"}, "expires_in_s"),
    ({"name": "t", "expires_in_s": True}, "expires_in_s"),
    ({"name": "t", "expires_in_s": 60, "expires_at": "2999-01-01T00:00:00Z"}, "expires_at"),
    ({"name": "t", "lambda_default": "much"}, "lambda_default"),
    ({"name": "t", "lambda_min": -1}, "lambda_min"),
    ({"name": "t", "lambda_min": 2, "lambda_max": 1}, "lambda_min"),
    ({"name": "t", "lambda_max": 1, "lambda_default": 2}, "lambda_default"),
    ({"name": "t", "requests_per_minute": 0}, "requests_per_minute"),
    ({"name": "t", "requests_per_minute": 1.5}, "requests_per_minute"),
    ({"name": "t", "tokens_per_minute": True}, "tokens_per_minute"),
    ({"name": "t", "usd_per_day": "5"}, "usd_per_day"),
    ({"name": "t", "usd_per_month": -0.01}, "usd_per_month"),
    ({"name": "t", "usd_per_week": 5}, "usd_per_week"),
    ({"name": "t", "digest": "00"}, "digest"),
    ({"name": "t", "revoked": True}, "revoked"),
    ({"name": "t", "id": "mine"}, "id"),
]


@pytest.mark.parametrize(("body", "field"), BAD)
def test_an_invalid_key_body_is_refused_by_field_and_creates_nothing(
    keyed_proxy: KeyedProxy, body: dict[str, Any], field: str
) -> None:
    before = keyed_proxy.proxy.admin("GET", "/admin/keys").json()["keys"]
    reply = keyed_proxy.proxy.admin("POST", "/admin/keys", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text
    assert f"`{field}" in reply.json()["error"]["message"]
    assert keyed_proxy.proxy.admin("GET", "/admin/keys").json()["keys"] == before


def test_an_invalid_change_of_a_key_changes_nothing(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make(lambda_max=1.0)
    path = f"/admin/keys/{key.id}"
    before = keyed_proxy.proxy.admin("GET", path).json()
    refused = [
        keyed_proxy.proxy.admin("PATCH", path, {"lambda_min": 2}),
        keyed_proxy.proxy.admin("PATCH", path, {"name": None}),
        keyed_proxy.proxy.admin("POST", f"{path}/rotate", {"grace_s": 31 * 86_400}),
        keyed_proxy.proxy.admin("POST", f"{path}/rotate", {"grace": 5}),
    ]
    assert [(reply.status_code, reply.json()["error"]["param"]) for reply in refused] == [
        *((400, "lambda_min"), (400, "name"), (400, "grace_s"), (400, "grace"))
    ]
    assert keyed_proxy.proxy.admin("GET", path).json() == before


def test_an_unknown_key_is_not_found_and_a_revoked_one_cannot_come_back(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make()
    assert [keyed_proxy.proxy.admin("DELETE", f"/admin/keys/{key.id}").status_code for _ in range(2)] == [204, 204]
    conflict = [
        keyed_proxy.proxy.admin("PATCH", f"/admin/keys/{key.id}", {"role": "admin"}),
        keyed_proxy.proxy.admin("POST", f"/admin/keys/{key.id}/rotate"),
    ]
    missing = [
        keyed_proxy.proxy.admin(method, f"/admin/keys/nobody{more}", {})
        for method, more in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate"))
    ]
    assert [reply.status_code for reply in conflict] == [409, 409]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in missing] == [(404, "key_not_found")] * 4
    assert not keyed_proxy.opens(key)


def test_a_viewer_reads_and_spends_nothing(keyed_proxy: KeyedProxy) -> None:
    viewer = keyed_proxy.make(role="viewer")
    reads = ("/admin/models", "/admin/keys", "/admin/audit", "/metrics", "/v1/models", f"/admin/keys/{viewer.id}")
    assert [keyed_proxy.call(viewer, "GET", path).status_code for path in reads] == [200] * len(reads)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        keyed_proxy.client(viewer).chat.completions.create(model="fair", messages=ASK)
    assert caught.value.code == "permission_denied"
    writes = [
        keyed_proxy.call(viewer, "POST", "/admin/keys", {"name": "x", "role": "admin"}),
        keyed_proxy.call(viewer, "PATCH", f"/admin/keys/{viewer.id}", {"role": "admin"}),
        keyed_proxy.call(viewer, "POST", f"/admin/keys/{viewer.id}/rotate"),
        keyed_proxy.call(viewer, "DELETE", "/admin/models/fair"),
        keyed_proxy.call(viewer, "POST", "/v1/route", {"model": "auto", "messages": ASK}),
    ]
    assert [reply.status_code for reply in writes] == [403] * len(writes)
    assert keyed_proxy.proxy.admin("GET", f"/admin/keys/{viewer.id}").json()["role"] == "viewer"


def test_an_admin_key_administers_but_cannot_touch_the_root_key(keyed_proxy: KeyedProxy) -> None:
    admin = keyed_proxy.make(role="admin")
    made = keyed_proxy.call(admin, "POST", "/admin/keys", {"name": "by the admin", "role": "admin"})
    other = MadeKey(made.json()["id"], made.json()["key"])
    assert made.status_code == 201
    assert keyed_proxy.client(admin).chat.completions.create(model="fair", messages=ASK).model == "fair"
    assert keyed_proxy.call(other, "DELETE", f"/admin/keys/{admin.id}").status_code == 204
    assert keyed_proxy.call(admin, "GET", "/admin/keys").status_code == 401
    assert keyed_proxy.call(other, "DELETE", f"/admin/keys/{other.id}").status_code == 204
    assert keyed_proxy.proxy.admin("GET", "/admin/keys").status_code == 200


def test_a_client_key_makes_no_keys_and_reads_no_metrics(keyed_proxy: KeyedProxy) -> None:
    client = keyed_proxy.make()
    calls = [
        keyed_proxy.call(client, "POST", "/admin/keys", {"name": "x", "role": "admin"}),
        keyed_proxy.call(client, "GET", "/admin/keys"),
        keyed_proxy.call(client, "GET", "/metrics"),
        keyed_proxy.call(client, "PATCH", f"/admin/keys/{client.id}", {"role": "admin"}),
    ]
    assert [reply.status_code for reply in calls] == [403] * 4


def test_a_key_sets_lambda_and_bounds_that_of_requests(keyed_proxy: KeyedProxy) -> None:
    best, cheap = keyed_proxy.make(lambda_default=0.0, lambda_max=0.2), keyed_proxy.make(lambda_min=0.05)

    def ask(key: MadeKey, model: str = "auto", **more: Any) -> str:
        return str(keyed_proxy.client(key).chat.completions.create(model=model, messages=ASK, **more).model)

    assert ask(best) == "good"
    assert ask(best, extra_headers={"lambda": "0.1"}) == "fair"
    assert (ask(best, "uniroute/best"), ask(cheap, "uniroute/cheap"), ask(cheap)) == ("good", "fair", "fair")
    for key, outside in ((best, "0.3"), (cheap, "0")):
        with pytest.raises(openai.BadRequestError, match="for this key it is") as caught:
            ask(key, extra_headers={"lambda": outside})
        assert caught.value.param == "lambda"
        with pytest.raises(openai.BadRequestError, match="for this key it is"):
            ask(key, extra_body={"uniroute": {"lambda": float(outside)}})
    for key, name in ((best, "uniroute/cheap"), (cheap, "uniroute/best")):
        with pytest.raises(openai.PermissionDeniedError, match="for this key λ is"):
            ask(key, name)
        listed = {model.id for model in keyed_proxy.client(key).models.list()}
        assert name not in listed
        assert {"auto", "uniroute/auto", "fair", "good"} < listed


def test_a_key_in_the_url_or_given_twice_is_not_accepted(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make()
    raw = [("authorization", f"Bearer {key.secret}"), ("authorization", f"Bearer {key.secret}")]
    url = f"{keyed_proxy.proxy.url}/v1/models"
    refused = [
        httpx.get(f"{url}?api_key={key.secret}"),
        httpx.get(url, headers=raw),
        httpx.get(url, headers=[("x-api-key", key.secret), ("x-api-key", key.secret)]),
        httpx.get(url, headers={**key.headers, "x-api-key": "another"}),
        httpx.get(url, headers={"authorization": f"Bearer {key.secret}{'x' * 10_000}"}),
        httpx.get(url, headers={b"authorization": "Bearer ключ".encode()}),
    ]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(401, "invalid_api_key")] * 6
    assert keyed_proxy.opens(key)


@pytest.mark.parametrize("sent", [b"\0", b"KEY\0", b"\0KEY", b"KEY\r\n\tKEY", b"\x7fKEY"])
def test_a_key_with_bytes_that_no_header_holds_is_refused_and_the_server_keeps_serving(
    keyed_proxy: KeyedProxy, sent: bytes
) -> None:
    key = keyed_proxy.make()
    address = urlsplit(keyed_proxy.proxy.url)
    head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer "
    with socket.create_connection((address.hostname, address.port or 0), 5) as client:
        client.sendall(head + sent.replace(b"KEY", key.secret.encode()) + b"\r\n\r\n")
        answer = client.recv(65_536)
    assert answer.split(b" ", 2)[1] in (b"400", b"401"), answer
    assert keyed_proxy.opens(key)
