from __future__ import annotations

import pytest

from proxy.upstream.direct_target import build_head


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nhost: b"},
        {"x": "a\nb"},
        {"x": "a\rb"},
        {"x": "a\0b"},
        {"x\r\ny": "a"},
        {"x: y": "a"},
        {"": "a"},
        {"host": "a\r\n\r\nGET / HTTP/1.1"},
        {"x": "\ud800"},
    ],
)
def test_a_header_with_a_line_break_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        build_head("http://h/v1", headers, None)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/v1",
        "h/v1",
        "http://",
        "http://h:99999/v1",
        "http://a b/v1",
        "http://a\0b/v1",
        "http://a\x1fb/v1",
        "https://a..b/v1",
        "https://.b/v1",
        f"https://{'a' * 70}/v1",
    ],
)
@pytest.mark.parametrize("as_proxy", [False, True])
def test_an_impossible_address_is_refused(url: str, as_proxy: bool) -> None:
    """When the model is first asked, and not as a fault of this server when it connects."""
    with pytest.raises(ValueError):
        build_head("http://h/v1" if as_proxy else url, {}, url if as_proxy else None)


def test_proxies_other_than_http_are_refused() -> None:
    with pytest.raises(ValueError, match="HTTP proxy"):
        build_head("https://h/v1", {}, "socks5://127.0.0.1:1080")


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://h", "/", "h"),
        ("http://H:80/v1/", "/v1/", "h"),
        ("http://h:8080/v1?a=b c&d=%20#e", "/v1?a=b%20c&d=%20", "h:8080"),
        ("https://[::1]/v1", "/v1", "[::1]"),
        ("https://[::1]:8443/v1", "/v1", "[::1]:8443"),
        ("http://bücher.example/ü?x=é", "/%C3%BC?x=%C3%A9", "xn--bcher-kva.example"),
        ("http://my_service:8000/v1", "/v1", "my_service:8000"),
        ("http://h/a b\\c\0d", "/a%20b%5Cc%00d", "h"),
        ("http://h/v1\r\nx: y", "/v1x:%20y", "h"),
    ],
)
def test_an_address_becomes_a_request_line_and_a_host(url: str, line: str, host: str) -> None:
    assert build_head(url, {}, None).prebuilt.decode() == f"POST {line} HTTP/1.1\r\nhost: {host}\r\n"


def test_a_user_in_the_address_is_authorized_unless_there_is_a_key() -> None:
    assert build_head("http://u:p%40@h", {}, None).headers["authorization"] == "Basic dTpwQA=="
    assert build_head("http://u:p@h", {"authorization": "Bearer k"}, None).headers["authorization"] == "Bearer k"


def test_a_stated_content_length_is_dropped() -> None:
    heads = build_head("http://h", {"content-length": "1", "transfer-encoding": "chunked"}, None)
    assert heads.prebuilt == b"POST / HTTP/1.1\r\nhost: h\r\n"


def test_a_proxy_gets_the_whole_address_whatever_the_host_header_says() -> None:
    heads = build_head("http://h:81/v1?a", {"host": "b c"}, "http://me:p%40ss@p:3128")
    assert heads.prebuilt.decode().split("\r\n")[:-1] == [
        "POST http://h:81/v1?a HTTP/1.1",
        "host: b c",
        "proxy-authorization: Basic bWU6cEBzcw==",
    ]


def test_proxy_credentials_are_not_sent_through_the_tunnel() -> None:
    heads = build_head("https://h/v1", {}, "http://me:secret@p:3128")
    assert heads.prebuilt == b"POST /v1 HTTP/1.1\r\nhost: h\r\n"


def test_headers_of_a_request_win_over_those_of_the_address() -> None:
    heads = build_head("http://h", {"x": "a", "y": "b"}, None)
    assert heads.render({"x": "c"}) == b"POST / HTTP/1.1\r\nx: c\r\ny: b\r\nhost: h\r\n"
