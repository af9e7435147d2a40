from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet
from tests.support.proxy_process import uniform_profile

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize("origin", ["http://[", "null", "javascript:alert(1)", "//127.0.0.1"])
def test_a_malformed_origin_is_refused(http: httpx.Client, origin: str) -> None:
    reply = http.get("/v1/models", headers={"origin": origin})

    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "permission_denied"


@pytest.mark.parametrize("item", [b"[],", b"0,"])
def test_a_body_of_very_many_values_is_refused(http: httpx.Client, item: bytes) -> None:
    body = b'{"model": "auto", "messages": [{"role": "user", "content": [' + item * 320_000 + b"0]}]}"
    reply = http.post("/v1/route", content=body, headers={"content-type": "application/json"})

    assert reply.status_code == 400
    assert "more than 300000" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("provider", 5, "provider"),
        ("provider", {"allow_fallbacks": "no"}, "provider.allow_fallbacks"),
        ("uniroute", {"fallbacks": "no"}, "uniroute.fallbacks"),
    ],
)
def test_a_wrong_option_is_named_as_the_caller_wrote_it(http: httpx.Client, field: str, value: Any, param: str) -> None:
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK, field: value})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("clusters", [1, 63, 65])
def test_a_profile_of_another_length_is_refused(fleet: Fleet, clusters: int) -> None:
    profile = {**uniform_profile(0.2), "errors": [0.1] * clusters, "labels": [1.0] * clusters}
    reply = fleet.proxy.admin("POST", "/admin/models/fair/profile", profile)

    assert reply.status_code == 400
    assert "clusters" in reply.json()["error"]["message"]
