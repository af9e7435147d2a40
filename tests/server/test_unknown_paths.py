from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet
from tests.support.keyed_proxy import KeyedProxy
from tests.support.proxy_process import ADMIN_KEY
from tests.support.raw_http import Answer, send
from tests.support.waiting import wait_until

BODY: Any = {"model": "fair", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat//completions", "/chat/completions",
        "/chat/completions/", "//chat/completions//", "///v1/chat/completions", "/v1/v1/chat/completions",
    ],
)  # fmt: skip
def test_a_path_that_is_plain_is_served(http: httpx.Client, fleet: Fleet, path: str) -> None:
    reply = http.post(httpx.URL(fleet.url).copy_with(raw_path=path.encode()), json=BODY)

    assert (reply.status_code, reply.json()["model"]) == (200, "fair")


@pytest.mark.parametrize(
    "path", ["/v1/models/", "/models", "//v1/models", "/healthz/", "//readyz", "/models/fair", "/v1//models/fair/"]
)
def test_a_plain_path_is_served_to_get_and_head(http: httpx.Client, fleet: Fleet, path: str) -> None:
    url = httpx.URL(fleet.url).copy_with(raw_path=path.encode())

    assert (http.get(url).status_code, http.head(url).status_code) == (200, 200)


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/openai/deployments/fair/chat/completions?api-version=2024-10-21", "Azure's path"),
        ("POST", "/openai/v1/chat/completions", "without /openai"),
        ("POST", "/api/chat", "Ollama's API"),
        ("POST", "/v1beta/models/x:generateContent", "Gemini's API"),
        ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("GET", "/health", "did you mean /healthz?"),
        ("GET", "/nothing", "Served are POST /v1/chat/completions"),
        ("HEAD", "/nothing", ""),
    ],
)
def test_an_unknown_path_gets_an_error_with_what_is_served_and_the_likely_mistake(
    http: httpx.Client, fleet: Fleet, method: str, path: str, hint: str
) -> None:
    reply = http.request(method, path, headers={"x-request-id": f"lost-{len(path)}-{method}"})
    message = f"nothing is served at {method} {path.partition('?')[0]}"

    assert reply.status_code == 404
    if method != "HEAD":
        error = reply.json()["error"]
        assert error["code"] == "unknown_path"
        assert message in error["message"]
        assert hint in error["message"]
    line = f"request=lost-{len(path)}-{method} status=404: {message}"
    assert wait_until(lambda: line in fleet.proxy.log)


def test_head_is_served_where_get_is_with_its_length_and_no_body(fleet: Fleet) -> None:
    for path in (b"/v1/models", b"/healthz", b"/readyz", b"/metrics", b"/openapi.json", b"/v1/models/auto"):
        (answer,) = raw(fleet, b"HEAD %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % path)

        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["content-length"]) > 0


def test_an_unsupported_method_gets_an_error_with_those_that_are_served(http: httpx.Client) -> None:
    reply = http.head("/v1/chat/completions")
    message = http.get("/v1/chat/completions").json()["error"]["message"]

    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert message == "GET is not served at /v1/chat/completions; POST is"


def test_a_name_that_is_routed_is_a_model_that_can_be_looked_up(http: httpx.Client) -> None:
    assert http.get("/v1/models/gpt-4o").json()["owned_by"] == "uniroute"
    assert http.get("/v1/models/some/name").json()["id"] == "some/name"
    assert http.get("/v1/models/fair").json()["owned_by"] == "config"


def test_azures_header_is_accepted_for_client_keys_and_not_for_administrators(keyed_proxy: KeyedProxy) -> None:
    made = keyed_proxy.make(name="azure").secret
    url = keyed_proxy.proxy.url
    statuses = [httpx.get(f"{url}/v1/models", headers={"api-key": key}).status_code for key in (made, "wrong", "")]
    both = httpx.get(f"{url}/v1/models", headers={"api-key": made, "authorization": "Bearer other"})

    assert statuses == [200, 401, 401]
    assert (both.status_code, "hold different API keys" in both.text) == (401, True)
    assert httpx.get(f"{url}/admin/models", headers={"api-key": ADMIN_KEY}).status_code == 401


@pytest.mark.parametrize(
    "path", ["//admin/models", "/admin/models/", "/v1/admin/models", "/admin//models", "/models/../admin/models"]
)
def test_admin_paths_have_one_spelling_and_are_authorized_by_what_is_served(fleet: Fleet, path: str) -> None:
    (answer,) = raw(fleet, b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % path.encode())

    assert b"litellm_params" not in answer.body
    assert answer.status in (401, 404) or answer.json()["owned_by"] == "uniroute"


def raw(fleet: Fleet, request: bytes) -> list[Answer]:
    url = httpx.URL(fleet.url)
    return send((url.host, url.port or 80), request, wait_s=5.0)
