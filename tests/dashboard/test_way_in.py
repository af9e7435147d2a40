from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest

from proxy.server.auth import MAX_UNDELAYED_PER_S
from tests.dashboard.site import Site, Visitor, open_site
from tests.support.proxy_process import ADMIN_KEY
from tests.support.waiting import wait_until

VIEWS = (
    *("", "/models", "/model?name=large", "/cluster?id=0", "/curve", "/curve/change", "/explain", "/keys"),
    *("/now/events", "/savings", "/quality"),
)


def test_every_view_sends_a_stranger_to_the_form(site: Site) -> None:
    with site.visitor(None) as stranger:
        answers = [stranger.get(view) for view in VIEWS if view]

    assert {(reply.status_code, reply.headers["location"]) for reply in answers} == {(303, "/dashboard/login")}


@pytest.mark.parametrize("role", ["viewer", "admin"])
def test_the_admin_key_and_keys_of_these_roles_open_the_page(site: Site, role: str) -> None:
    made = site.make_key(role)
    with site.visitor(made["key"]) as visitor, site.visitor() as root:
        assert visitor.get("/models").status_code == 200
        assert root.get("/models").status_code == 200
        assert f"a {role}" in visitor.get("/models").text


def test_a_client_key_opens_nothing(site: Site) -> None:
    made = site.make_key("client")
    with site.visitor(None) as visitor:
        reply = visitor.log_in(made["key"])
        assert reply.status_code == 403
        assert visitor.get("/models").status_code == 303
        headers = {"authorization": f"Bearer {made['key']}"}
        assert visitor.client.get("/models", headers=headers).status_code == 303


def test_a_wrong_key_is_refused_and_not_shown_again(site: Site) -> None:
    with site.visitor(None) as visitor:
        reply = visitor.log_in("ur-" + "x" * 43)

    assert reply.status_code == 401
    assert "x" * 43 not in reply.text


def test_a_flood_of_wrong_keys_is_slowed_down_as_for_the_api(site: Site) -> None:
    with site.visitor(None) as visitor:
        page = visitor.get("/login")
        token = re.findall(r'name="token" value="([^"]+)"', page.text)[0]
        cookie = page.headers["set-cookie"].partition(";")[0]
        started = time.monotonic()
        for _ in range(4 * MAX_UNDELAYED_PER_S):
            headers = {"cookie": cookie, "origin": site.proxy.url}
            data = {"token": token, "key": "wrong"}
            httpx.post(f"{site.url}/login", data=data, headers=headers, timeout=60)

    assert time.monotonic() - started > 0.5


def test_the_cookie_is_kept_from_scripts_and_other_sites(site: Site) -> None:
    with site.visitor(None) as visitor:
        cookie = visitor.log_in(ADMIN_KEY).headers["set-cookie"]

    assert re.search(r"; HttpOnly", cookie)
    assert re.search(r"; SameSite=strict", cookie, re.IGNORECASE)
    assert re.search(r"; Path=/dashboard", cookie)
    assert re.search(r"; Max-Age=43200", cookie)
    assert "Secure" not in cookie
    assert ADMIN_KEY not in cookie


def test_the_cookie_is_secure_where_the_browser_speaks_https(site: Site) -> None:
    with site.visitor(None) as visitor:
        visitor.client.headers["origin"] = site.proxy.url.replace("http://", "https://")
        assert "; Secure" in visitor.log_in(ADMIN_KEY).headers["set-cookie"]


def test_who_logs_out_is_out_also_with_the_cookie_of_before(site: Site) -> None:
    with site.visitor() as visitor:
        cookie = visitor.client.cookies["uniroute_session"]
        assert visitor.send("/logout", {}).status_code == 303
        visitor.client.cookies.set("uniroute_session", cookie, domain="127.0.0.1", path="/dashboard")
        headers = {"cookie": f"uniroute_session={cookie}"}
        assert httpx.get(f"{site.url}/models", headers=headers).status_code == 303


def test_a_session_ends_with_its_key(site: Site) -> None:
    made = site.make_key("viewer")
    with site.visitor(made["key"]) as visitor:
        assert visitor.get("/models").status_code == 200
        site.proxy.admin("DELETE", f"/admin/keys/{made['id']}")
        assert visitor.get("/models").status_code == 303


def test_a_session_ends_with_the_secret_that_opened_it(site: Site) -> None:
    made = site.make_key("viewer")
    with site.visitor(made["key"]) as visitor:
        site.proxy.admin("POST", f"/admin/keys/{made['id']}/rotate", {})
        assert visitor.get("/models").status_code == 303


def test_a_session_loses_what_its_key_loses(site: Site) -> None:
    made = site.make_key("admin")
    with site.visitor(made["key"]) as visitor:
        assert "Add a model" in visitor.get("/models").text
        site.proxy.admin("PATCH", f"/admin/keys/{made['id']}", {"role": "viewer"})
        assert "Add a model" not in visitor.get("/models").text
        site.proxy.admin("PATCH", f"/admin/keys/{made['id']}", {"role": "client"})
        assert visitor.get("/models").status_code == 303


def test_a_cookie_that_was_changed_anywhere_opens_nothing(site: Site) -> None:
    with site.visitor() as visitor:
        cookie = visitor.client.cookies["uniroute_session"]
    principal, issued, nonce, mac = cookie.split(".")
    forged = (
        f"{principal}.{int(issued) + 5}.{nonce}.{mac}",
        f"{principal}.{issued}.{nonce[::-1]}.{mac}",
        f"other.{issued}.{nonce}.{mac}",
        f"-.{issued}.{nonce}.{mac}",
        f"{principal}.{issued}.{nonce}.{mac[::-1]}",
        f"{principal}.{issued}.{nonce}",
        "",
    )
    for each in forged:
        headers = {"cookie": f"uniroute_session={each}"}
        assert httpx.get(f"{site.url}/models", headers=headers).status_code == 303


def test_a_viewer_reads_and_changes_nothing(site: Site) -> None:
    made = site.make_key("viewer")
    with site.visitor(made["key"]) as visitor:
        pages = visitor.get("/models").text + visitor.get("/keys").text + visitor.get("/model?name=large").text
        assert not re.search(r"action=\"[^\"]*/(models|keys|keys/revoke|model/\w+)\"", pages)
        forms: dict[str, dict[str, str]] = {
            "/models": {"model_name": "m", "model": "openai/m"},
            "/model/price": {"name": "large", "input_cost_per_token": "1", "output_cost_per_token": "1"},
            "/model/profile": {"name": "large"},
            "/model/remove": {"name": "large"},
            "/keys": {"name": "more"},
            "/keys/revoke": {"id": made["id"]},
        }
        assert {visitor.send(path, form).status_code for path, form in forms.items()} == {403}
        assert visitor.send("/explain", {"text": "What is 2 + 2?"}).status_code == 200
    assert wait_until(lambda: f"who={made['id']} action=dashboard/keys/revoke target=- outcome=403" in site.proxy.log)


@pytest.mark.parametrize("path", ["/login", "/logout", "/models", "/keys", "/keys/revoke", "/model/price", "/explain"])
def test_a_form_without_its_token_or_of_another_site_is_refused(site: Site, path: str) -> None:
    form = {"name": "x", "id": "x", "text": "x", "key": ADMIN_KEY}
    with site.visitor() as visitor, site.visitor() as other:
        token = other.get("/keys").text.split('name="token" value="')[1].split('"')[0]
        assert visitor.client.post(path, data=form).status_code == 403
        assert visitor.client.post(path, data={**form, "token": token}).status_code == 403
        for origin in ("http://evil.example", "null"):
            visitor.client.headers["origin"] = origin
            assert visitor.client.post(path, data={**form, "token": _own_token(visitor)}).status_code == 403
        del visitor.client.headers["origin"]
        assert visitor.client.post(path, data={**form, "token": _own_token(visitor)}).status_code == 403


def _own_token(visitor: Visitor) -> str:
    origin = visitor.client.headers.pop("origin", None)
    page = visitor.get("/keys").text
    if origin is not None:
        visitor.client.headers["origin"] = origin
    return page.split('name="token" value="')[1].split('"')[0]


def test_an_allowed_origin_of_the_api_may_not_use_a_session(tmp_path: Path, embedder_cache: Path) -> None:
    with (
        open_site(tmp_path, embedder_cache, allowed_origins=["http://app.example"]) as site,
        site.visitor() as visitor,
    ):
        token = _own_token(visitor)
        visitor.client.headers["origin"] = "http://app.example"
        assert visitor.client.post("/explain", data={"text": "x", "token": token}).status_code == 403


def test_a_session_is_known_to_a_server_that_was_started_again_and_its_end_too(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with open_site(tmp_path, embedder_cache) as site, site.visitor() as visitor, site.visitor() as gone:
        cookie, ended = (each.client.cookies["uniroute_session"] for each in (visitor, gone))
        gone.send("/logout", {})
    with open_site(tmp_path, embedder_cache) as again:
        found = [
            httpx.get(f"{again.url}/models", headers={"cookie": f"uniroute_session={each}"}).status_code
            for each in (cookie, ended)
        ]
    assert found == [200, 303]


def test_without_an_admin_key_the_page_says_how_to_set_it(tmp_path: Path, embedder_cache: Path) -> None:
    with open_site(tmp_path, embedder_cache, admin_key=False) as site, site.visitor(None) as visitor:
        for path in ("/login", "/models"):
            reply = visitor.get(path)
            assert reply.status_code == 403
            assert "UNIROUTE_ADMIN_KEY" in reply.text


def test_logging_in_is_logged_by_the_id_of_the_key(site: Site) -> None:
    made = site.make_key("viewer")
    with site.visitor(made["key"]):
        line = f"who={made['id']} action=dashboard.login"
        assert wait_until(lambda: line in site.proxy.log)
