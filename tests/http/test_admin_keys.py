"""/admin/keys on a real server, and what its keys may do there: terms, roles, rotation, bounds of λ, the audit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.keyed import ASK, KeyedProxy, MadeKey
from tests.support.server import ProxyProcess, arm, uniform_profile
from tests.support.upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[KeyedProxy]:
    """At λ=0.1 "fair" is chosen, at λ=0 "good"."""
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [arm("fair", upstream.url, price=1e-7), arm("good", upstream.url, price=1e-5)],
            "uniroute": {"profile": {"on_start": False}},
        }
        folder = tmp_path_factory.mktemp("admin-keys")
        environ = {"ARM_API_KEY": "sk-x"}
        with ProxyProcess(folder, embedder_cache, config, environ) as proxy, KeyedProxy(proxy) as opened:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            opened.make(name="closes the door")
            yield opened


def test_a_key_is_made_shown_changed_and_revoked_and_its_text_is_in_one_answer_alone(keyed: KeyedProxy) -> None:
    terms = {"models": ["fair"], "role": "client", "expires_in_s": 3600, "lambda_min": 0.05, "usd_per_day": 2.5}
    made = keyed.proxy.admin("POST", "/admin/keys", {"name": "team", **terms, "requests_per_minute": 1000})
    card = made.json()
    key = MadeKey(card["id"], card.pop("key"))

    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    assert keyed.client(key).chat.completions.create(model="auto", messages=ASK).model == "fair"
    assert keyed.proxy.admin("GET", f"/admin/keys/{key.id}").json() == card
    assert card in keyed.proxy.admin("GET", "/admin/keys").json()["keys"]
    change = {"models": None, "usd_per_day": None, "usd_per_month": 9, "name": "another team"}
    changed = keyed.proxy.admin("PATCH", f"/admin/keys/{key.id}", change)
    assert changed.json() == {**card, **change}
    assert keyed.client(key).chat.completions.create(model="good", messages=ASK).model == "good"
    assert keyed.proxy.admin("DELETE", f"/admin/keys/{key.id}").status_code == 204
    with pytest.raises(openai.AuthenticationError):
        keyed.client(key).models.list()
    assert keyed.proxy.admin("GET", f"/admin/keys/{key.id}").json()["revoked"] is True
    assert keyed.seen_anywhere(key.secret) == []
    assert key.secret not in changed.text


def test_expiry_is_stated_as_a_time_or_a_while_and_can_be_moved(keyed: KeyedProxy) -> None:
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
    key = keyed.make(expires_at=at.isoformat())
    path = f"/admin/keys/{key.id}"
    shown = keyed.proxy.admin("GET", path).json()["expires_at"]
    assert shown == at.isoformat().replace("+00:00", "Z")
    assert keyed.opens(key)
    assert keyed.proxy.admin("PATCH", path, {"expires_in_s": 0}).status_code == 200
    refused = keyed.call(key, "GET", "/v1/models")
    assert (refused.status_code, "has expired" in refused.text) == (401, True)
    assert keyed.proxy.admin("POST", f"{path}/rotate").status_code == 409
    assert keyed.proxy.admin("PATCH", path, {"expires_at": None}).json()["expires_at"] is None
    assert keyed.opens(key)


def test_a_rotation_shows_a_new_secret_and_the_old_one_opens_for_its_grace_alone(keyed: KeyedProxy) -> None:
    first = keyed.make()
    reply = keyed.proxy.admin("POST", f"/admin/keys/{first.id}/rotate", {"grace_s": 600})
    second = MadeKey(first.id, reply.json()["key"])
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
    assert [keyed.opens(key) for key in (first, second)] == [True, True]
    third = MadeKey(first.id, keyed.proxy.admin("POST", f"/admin/keys/{first.id}/rotate").json()["key"])
    assert [keyed.opens(key) for key in (first, second, third)] == [False, False, True]
    assert [keyed.seen_anywhere(key.secret) for key in (first, second, third)] == [[], [], []]


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
def test_a_body_that_makes_no_key_is_refused_by_field_and_makes_none(
    keyed: KeyedProxy, body: dict[str, Any], field: str
) -> None:
    before = keyed.proxy.admin("GET", "/admin/keys").json()["keys"]
    reply = keyed.proxy.admin("POST", "/admin/keys", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text
    assert f"`{field}" in reply.json()["error"]["message"]
    assert keyed.proxy.admin("GET", "/admin/keys").json()["keys"] == before


def test_a_change_that_leaves_no_key_is_refused_whole(keyed: KeyedProxy) -> None:
    key = keyed.make(lambda_max=1.0)
    path = f"/admin/keys/{key.id}"
    before = keyed.proxy.admin("GET", path).json()
    refused = [
        keyed.proxy.admin("PATCH", path, {"lambda_min": 2}),
        keyed.proxy.admin("PATCH", path, {"name": None}),
        keyed.proxy.admin("POST", f"{path}/rotate", {"grace_s": 31 * 86_400}),
        keyed.proxy.admin("POST", f"{path}/rotate", {"grace": 5}),
    ]
    assert [(reply.status_code, reply.json()["error"]["param"]) for reply in refused] == [
        *((400, "lambda_min"), (400, "name"), (400, "grace_s"), (400, "grace"))
    ]
    assert keyed.proxy.admin("GET", path).json() == before


def test_an_unknown_key_is_not_found_and_a_revoked_one_cannot_come_back(keyed: KeyedProxy) -> None:
    key = keyed.make()
    assert [keyed.proxy.admin("DELETE", f"/admin/keys/{key.id}").status_code for _ in range(2)] == [204, 204]
    conflict = [
        keyed.proxy.admin("PATCH", f"/admin/keys/{key.id}", {"role": "admin"}),
        keyed.proxy.admin("POST", f"/admin/keys/{key.id}/rotate"),
    ]
    missing = [
        keyed.proxy.admin(method, f"/admin/keys/nobody{more}", {})
        for method, more in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate"))
    ]
    assert [reply.status_code for reply in conflict] == [409, 409]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in missing] == [(404, "key_not_found")] * 4
    assert not keyed.opens(key)


def test_a_viewer_reads_and_spends_nothing(keyed: KeyedProxy) -> None:
    viewer = keyed.make(role="viewer")
    reads = ("/admin/models", "/admin/keys", "/admin/audit", "/metrics", "/v1/models", f"/admin/keys/{viewer.id}")
    assert [keyed.call(viewer, "GET", path).status_code for path in reads] == [200] * len(reads)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        keyed.client(viewer).chat.completions.create(model="fair", messages=ASK)
    assert caught.value.code == "permission_denied"
    writes = [
        keyed.call(viewer, "POST", "/admin/keys", {"name": "x", "role": "admin"}),
        keyed.call(viewer, "PATCH", f"/admin/keys/{viewer.id}", {"role": "admin"}),
        keyed.call(viewer, "POST", f"/admin/keys/{viewer.id}/rotate"),
        keyed.call(viewer, "DELETE", "/admin/models/fair"),
        keyed.call(viewer, "POST", "/v1/route", {"model": "auto", "messages": ASK}),
    ]
    assert [reply.status_code for reply in writes] == [403] * len(writes)
    assert keyed.proxy.admin("GET", f"/admin/keys/{viewer.id}").json()["role"] == "viewer"


def test_an_admin_key_administers_but_cannot_touch_the_root_key(keyed: KeyedProxy) -> None:
    admin = keyed.make(role="admin")
    made = keyed.call(admin, "POST", "/admin/keys", {"name": "by the admin", "role": "admin"})
    other = MadeKey(made.json()["id"], made.json()["key"])
    assert made.status_code == 201
    assert keyed.client(admin).chat.completions.create(model="fair", messages=ASK).model == "fair"
    assert keyed.call(other, "DELETE", f"/admin/keys/{admin.id}").status_code == 204
    assert keyed.call(admin, "GET", "/admin/keys").status_code == 401
    assert keyed.call(other, "DELETE", f"/admin/keys/{other.id}").status_code == 204
    assert keyed.proxy.admin("GET", "/admin/keys").status_code == 200


def test_a_client_key_makes_no_keys_and_reads_no_metrics(keyed: KeyedProxy) -> None:
    client = keyed.make()
    calls = [
        keyed.call(client, "POST", "/admin/keys", {"name": "x", "role": "admin"}),
        keyed.call(client, "GET", "/admin/keys"),
        keyed.call(client, "GET", "/metrics"),
        keyed.call(client, "PATCH", f"/admin/keys/{client.id}", {"role": "admin"}),
    ]
    assert [reply.status_code for reply in calls] == [403] * 4


def test_a_key_states_lambda_and_holds_requests_within_its_bounds(keyed: KeyedProxy) -> None:
    best, cheap = keyed.make(lambda_default=0.0, lambda_max=0.2), keyed.make(lambda_min=0.05)

    def ask(key: MadeKey, model: str = "auto", **more: Any) -> str:
        return str(keyed.client(key).chat.completions.create(model=model, messages=ASK, **more).model)

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
        listed = {model.id for model in keyed.client(key).models.list()}
        assert name not in listed
        assert {"auto", "uniroute/auto", "fair", "good"} < listed


def test_every_write_is_a_line_in_the_log_and_in_the_store_with_who_did_it(keyed: KeyedProxy) -> None:
    admin = keyed.make(role="admin")
    made = keyed.call(admin, "POST", "/admin/keys", {"name": "x"}, **{"x-request-id": "req-audit-1"})
    price = {"input_cost_per_token": 1e-5, "output_cost_per_token": 4e-5}
    keyed.call(admin, "PUT", "/admin/models/good/pricing", price, **{"x-request-id": "req-audit-2"})
    expected = [
        {"who": admin.id, "action": "keys.create", "target": made.json()["id"], "outcome": "201"},
        {"who": admin.id, "action": "models.price", "target": "good", "outcome": "200"},
    ]
    for number, line in enumerate(expected, 1):
        assert keyed.audit_lines(f"req-audit-{number}") == [{**line, "request": f"req-audit-{number}"}]
    kept = [{name: line[name] for name in ("who", "action", "target", "request")} for line in keyed.trail(2)]
    assert kept == [
        {"who": admin.id, "action": "models.price", "target": "good", "request": "req-audit-2"},
        {"who": admin.id, "action": "keys.create", "target": made.json()["id"], "request": "req-audit-1"},
    ]
    assert keyed.trail(3)[2]["who"] == "root"


def test_a_refused_write_is_a_line_in_the_log_and_changes_no_trail(keyed: KeyedProxy) -> None:
    client = keyed.make()
    before = keyed.trail()
    bad_key, bad_body = MadeKey("-", "ur-nonsense"), {"name": "x", "role": "root"}
    root = {"authorization": "Bearer admin-key-of-the-tests"}
    calls: list[tuple[MadeKey | None, str, str, Any, dict[str, str], str, str]] = [
        (None, "POST", "/admin/keys", {}, {}, "-", "401"),
        (bad_key, "DELETE", "/admin/models/good", None, {}, "-", "401"),
        (client, "POST", "/admin/keys", {}, {}, client.id, "403"),
        (None, "POST", "/admin/keys", bad_body, root, "root", "400"),
        (None, "DELETE", "/admin/keys/nobody", None, root, "root", "404"),
        (None, "POST", "/admin/nothing", {}, root, "root", "404"),
        (None, "PATCH", "/admin/models/good", {}, {**root, "host": "evil.example"}, "-", "403"),
    ]
    for number, (key, method, path, body, headers, who, status) in enumerate(calls):
        name = f"req-refused-{number}"
        keyed.call(key, method, path, body, **{**headers, "x-request-id": name})
        (line,) = keyed.audit_lines(name)
        assert (line["who"], line["outcome"]) == (who, status), (method, path)
    assert keyed.trail() == before


def test_nothing_that_a_caller_writes_breaks_the_audit_line_or_puts_a_secret_in_it(keyed: KeyedProxy) -> None:
    key = keyed.make()
    path = f"/admin/models/x%0Awho=root%20action=keys.create%00%F0%9F%94%91{key.secret}/" + "y" * 500
    keyed.proxy.admin("DELETE", f"/admin/keys/{key.secret}")
    keyed.call(None, "DELETE", path, **{"x-request-id": "req-forged"})
    (line,) = keyed.audit_lines("req-forged")
    assert (line["who"], line["action"]) == ("-", "models.remove")
    assert len(line["target"]) <= 200
    keyed.call(None, "DELETE", f"/admin/models/{'y' * 180}/{key.secret}", **{"x-request-id": "req-cut"})
    (cut,) = keyed.audit_lines("req-cut")
    assert cut["target"] == f"{'y' * 180}/***"
    assert "\nwho=" not in keyed.proxy.log
    assert key.secret[:20] not in keyed.proxy.log


def test_the_trail_is_read_by_page_size(keyed: KeyedProxy) -> None:
    keyed.make()
    assert len(keyed.trail(1)) == 1
    for wrong in ("0", "1001", "-1", "x", "1e2", "", "٣", "1&limit=2"):
        reply = keyed.proxy.admin("GET", f"/admin/audit?limit={wrong}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "limit"), wrong
    assert len(keyed.proxy.admin("GET", "/admin/audit").json()["entries"]) <= 100


def test_measuring_and_cancelling_leave_their_lines_too(keyed: KeyedProxy) -> None:
    body = {**arm("measured", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.5)}
    assert keyed.proxy.admin("POST", "/admin/models", body).status_code == 201
    job = keyed.proxy.admin("POST", "/admin/models/measured/profile", {"prompts": 1000}).json()["job"]
    keyed.proxy.admin("DELETE", f"/admin/jobs/{job}")
    assert keyed.proxy.admin("DELETE", "/admin/models/measured").status_code == 204
    seen = [(line["action"], line["target"]) for line in keyed.trail(5)]
    assert seen == [
        *(("models.remove", "measured"), ("jobs.cancel", job)),
        *(("models.profile", "measured"), ("models.profile", "measured"), ("models.add", "measured")),
    ]


def test_a_key_in_an_address_or_twice_is_no_key(keyed: KeyedProxy) -> None:
    key = keyed.make()
    raw = [("authorization", f"Bearer {key.secret}"), ("authorization", f"Bearer {key.secret}")]
    url = f"{keyed.proxy.url}/v1/models"
    refused = [
        httpx.get(f"{url}?api_key={key.secret}"),
        httpx.get(url, headers=raw),
        httpx.get(url, headers=[("x-api-key", key.secret), ("x-api-key", key.secret)]),
        httpx.get(url, headers={**key.headers, "x-api-key": "another"}),
        httpx.get(url, headers={"authorization": f"Bearer {key.secret}{'x' * 10_000}"}),
        httpx.get(url, headers={b"authorization": "Bearer ключ".encode()}),
    ]
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(401, "invalid_api_key")] * 6
    assert keyed.opens(key)
