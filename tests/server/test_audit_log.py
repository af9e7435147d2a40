from __future__ import annotations

from typing import Any

from tests.support.keyed_proxy import KeyedProxy, MadeKey
from tests.support.proxy_process import model_entry, uniform_profile


def test_every_write_is_logged_and_stored_with_its_actor(keyed_proxy: KeyedProxy) -> None:
    admin = keyed_proxy.make(role="admin")
    made = keyed_proxy.call(admin, "POST", "/admin/keys", {"name": "x"}, **{"x-request-id": "req-audit-1"})
    price = {"input_cost_per_token": 1e-5, "output_cost_per_token": 4e-5}
    keyed_proxy.call(admin, "PUT", "/admin/models/good/pricing", price, **{"x-request-id": "req-audit-2"})
    expected = [
        {"who": admin.id, "action": "keys.create", "target": made.json()["id"], "outcome": "201"},
        {"who": admin.id, "action": "models.price", "target": "good", "outcome": "200"},
    ]
    for number, line in enumerate(expected, 1):
        assert keyed_proxy.audit_lines(f"req-audit-{number}") == [{**line, "request": f"req-audit-{number}"}]
    kept = [{name: line[name] for name in ("who", "action", "target", "request")} for line in keyed_proxy.trail(2)]
    assert kept == [
        {"who": admin.id, "action": "models.price", "target": "good", "request": "req-audit-2"},
        {"who": admin.id, "action": "keys.create", "target": made.json()["id"], "request": "req-audit-1"},
    ]
    assert keyed_proxy.trail(3)[2]["who"] == "root"


def test_a_refused_write_is_logged_and_not_stored(keyed_proxy: KeyedProxy) -> None:
    client = keyed_proxy.make()
    before = keyed_proxy.trail()
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
        keyed_proxy.call(key, method, path, body, **{**headers, "x-request-id": name})
        (line,) = keyed_proxy.audit_lines(name)
        assert (line["who"], line["outcome"]) == (who, status), (method, path)
    assert keyed_proxy.trail() == before


def test_no_input_of_a_caller_breaks_the_audit_line_or_puts_a_secret_into_it(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make()
    path = f"/admin/models/x%0Awho=root%20action=keys.create%00%F0%9F%94%91{key.secret}/" + "y" * 500
    keyed_proxy.proxy.admin("DELETE", f"/admin/keys/{key.secret}")
    keyed_proxy.call(None, "DELETE", path, **{"x-request-id": "req-forged"})
    (line,) = keyed_proxy.audit_lines("req-forged")
    assert (line["who"], line["action"]) == ("-", "models.remove")
    assert len(line["target"]) <= 200
    keyed_proxy.call(None, "DELETE", f"/admin/models/{'y' * 180}/{key.secret}", **{"x-request-id": "req-cut"})
    (cut,) = keyed_proxy.audit_lines("req-cut")
    assert cut["target"] == f"{'y' * 180}/***"
    assert "\nwho=" not in keyed_proxy.proxy.log
    assert key.secret[:20] not in keyed_proxy.proxy.log


def test_the_audit_log_is_read_in_pages(keyed_proxy: KeyedProxy) -> None:
    keyed_proxy.make()
    assert len(keyed_proxy.trail(1)) == 1
    for wrong in ("0", "1001", "-1", "x", "1e2", "", "٣", "1&limit=2"):
        reply = keyed_proxy.proxy.admin("GET", f"/admin/audit?limit={wrong}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "limit"), wrong
    assert len(keyed_proxy.proxy.admin("GET", "/admin/audit").json()["entries"]) <= 100


def test_starting_and_cancelling_a_job_are_logged_too(keyed_proxy: KeyedProxy) -> None:
    body = {**model_entry("measured", "http://127.0.0.1:9/v1"), "profile": uniform_profile(0.5)}
    assert keyed_proxy.proxy.admin("POST", "/admin/models", body).status_code == 201
    job = keyed_proxy.proxy.admin("POST", "/admin/models/measured/profile", {"prompts": 1000}).json()["job"]
    keyed_proxy.proxy.admin("DELETE", f"/admin/jobs/{job}")
    assert keyed_proxy.proxy.admin("DELETE", "/admin/models/measured").status_code == 204
    seen = [(line["action"], line["target"]) for line in keyed_proxy.trail(4)]
    assert seen == [
        *(("models.remove", "measured"), ("jobs.cancel", job)),
        *(("models.profile", "measured"), ("models.add", "measured")),
    ]
