from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers

from proxy.errors import Forbidden, Unauthenticated
from proxy.server.auth import check_host, check_origin, credentials_from
from proxy.settings.schema import Settings


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in pairs])


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"admin_key": SecretStr("12345678"), **values})


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ([("authorization", "Bearer abc")], b"abc"),
        ([("authorization", "bearer   abc ")], b"abc"),
        ([("x-api-key", "abc")], b"abc"),
        ([("authorization", "Bearer abc"), ("x-api-key", "abc")], b"abc"),
        ([("authorization", "Bearer "), ("x-api-key", "abc")], b"abc"),
        ([("authorization", "Bearer \xe9")], b"\xe9"),
        ([("authorization", "Bearer abc\xa0")], b"abc\xa0"),
        ([("authorization", "Bearer ")], None),
        ([], None),
    ],
)
def test_the_key_is_read_from_the_headers(sent: list[tuple[str, str]], key: bytes | None) -> None:
    assert credentials_from(headers(*sent)) == key


@pytest.mark.parametrize(
    "sent",
    [
        [("authorization", "Basic abc")],
        [("authorization", "abc")],
        [("authorization", "Bearer " + "x" * 10_000)],
        [("authorization", "Bearer a"), ("authorization", "Bearer b")],
        [("x-api-key", "a"), ("x-api-key", "a")],
        [("authorization", "Bearer abc"), ("x-api-key", "other")],
    ],
)
def test_headers_that_hold_no_key_or_several_are_refused(sent: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated):
        credentials_from(headers(*sent))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "llm.example:80"])
def test_the_names_of_this_server_are_allowed_hosts(host: str) -> None:
    check_host(headers(("host", host)), settings(allowed_hosts=["llm.example"]))


@pytest.mark.parametrize(
    "sent", [["evil.example"], ["127.0.0.1.evil.example"], [""], [], ["localhost", "evil.example"], ["[::1"]]
)
def test_other_hosts_are_forbidden_on_loopback(sent: list[str]) -> None:
    with pytest.raises(Forbidden):
        check_host(headers(*(("host", host) for host in sent)), settings())


def test_beyond_loopback_any_host_is_allowed_unless_allowed_hosts_is_set() -> None:
    check_host(headers(("host", "proxy:8000")), settings(host="0.0.0.0"))
    with pytest.raises(Forbidden):
        check_host(headers(("host", "proxy:8000")), settings(host="0.0.0.0", allowed_hosts=["llm.example"]))


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://page.example"])
def test_this_servers_pages_and_allowed_origins_may_call(origin: str) -> None:
    check_origin(headers(("host", "localhost:8000"), ("origin", origin)), ("https://page.example",))


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "https://page.example.evil.example"]
)
def test_other_origins_are_forbidden(origin: str) -> None:
    with pytest.raises(Forbidden):
        check_origin(headers(("host", "localhost:8000"), ("origin", origin)), ("https://page.example",))
