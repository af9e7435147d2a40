from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.settings.outbound import Outbound, OutboundError, Proxies, ssl_context, trust_of
from proxy.settings.schema import Settings
from proxy.storage.price_feed import PriceFeedError, fetch_price_map
from proxy.upstream.client import UpstreamClient
from tests.support.direct_calls import KEY, a_model, completion_of, error_of, stream_of
from tests.support.raw_upstream import RawUpstream, plain
from tests.support.tls import served_by

PROXY = "http://proxy.example:3128"
FAR = "http://far.invalid/v1"


@pytest.mark.parametrize(
    ("environ", "http", "https"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": PROXY}, PROXY, None),
        ({"https_proxy": PROXY}, None, PROXY),
        ({"ALL_PROXY": PROXY}, PROXY, PROXY),
        ({"All_Proxy": PROXY}, PROXY, PROXY),
        ({"http_proxy": "http://small:1", "HTTP_PROXY": "http://LARGE:1"}, "http://small:1", None),
        ({"http_proxy": "", "HTTP_PROXY": PROXY}, None, None),
        ({"HTTP_PROXY": "  proxy.example:3128 "}, PROXY, None),
        (
            {"HTTPS_PROXY": "https://me:pw@proxy.example", "ALL_PROXY": "socks5://s"},
            OutboundError,
            "https://me:pw@proxy.example",
        ),
        ({"ALL_PROXY": "socks5h://127.0.0.1:1080", "HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY}, PROXY, PROXY),
    ],
)
def test_each_scheme_has_its_proxy_and_lower_case_wins(environ: dict[str, str], http: Any, https: Any) -> None:
    proxies = Proxies(environ)
    for scheme, expected in (("http", http), ("https", https)):
        if expected is OutboundError:
            with pytest.raises(OutboundError):
                proxies.for_url(f"{scheme}://far.example/v1")
        else:
            assert proxies.for_url(f"{scheme}://far.example/v1") == expected


@pytest.mark.parametrize(
    ("listed", "host", "direct"),
    [
        ("far.example", "far.example", True),
        ("far.example", "a.far.example", True),
        ("far.example", "notfar.example", False),
        (".far.example", "a.b.far.example", True),
        (".far.example", "far.example", True),
        ("*.far.example", "a.far.example", True),
        ("FAR.example.", "far.EXAMPLE", True),
        ("far.example:8000", "far.example:8000", True),
        ("far.example:8000", "far.example:8001", False),
        ("far.example:80", "far.example", True),
        ("http://far.example", "far.example", True),
        ("a, far.example", "far.example", True),
        ("a far.example", "far.example", True),
        ("*", "far.example", True),
        ("a,*", "far.example", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.9.9.9/8", "10.1.2.3", True),
        ("10.0.0.0/8:8000", "10.1.2.3:8000", True),
        ("10.1.2.3", "10.1.2.3:9", True),
        ("10.1.2.3:9", "10.1.2.3:8", False),
        ("10.0.0.0/8", "[::ffff:10.1.2.3]", True),
        ("fd00::/8", "[fd12::1]", True),
        ("[fd00::]/8", "[fd12::1]", True),
        ("fd00::/8", "[fe12::1]", False),
        ("fd12::1", "[fd12:0::1]", True),
        ("[fd12::1]", "[fd12::1]:8000", True),
        ("[fd12::1]:8000", "[fd12::1]:8000", True),
        ("[fd12::1]:8000", "[fd12::1]:8001", False),
        ("10.0.0.0/8", "10.example", False),
        ("0.0.0.0/0", "10.1.2.3", True),
        ("0.0.0.0/0", "far.example", False),
        ("localhost,[::1]", "far.example", False),
        ("::1/200,[::,a/b,///,:::", "far.example", False),
        ("", "far.example", False),
        ("", "localhost:8000", True),
        ("", "models.localhost", True),
        ("", "127.3.2.1", True),
        ("", "[::1]:11434", True),
        ("", "0.0.0.0:11434", True),
        ("", "localhost.example", False),
    ],
)
def test_no_proxy_and_this_machine_are_reached_directly(listed: str, host: str, *, direct: bool) -> None:
    proxies = Proxies({"ALL_PROXY": PROXY, "NO_PROXY": listed})
    assert proxies.for_url(f"http://{host}/v1") == (None if direct else PROXY)


@pytest.mark.parametrize(
    "value",
    [
        *("socks5://h:1", "socks5h://h:1", "SOCKS4://h", "socks://h", "ftp://h", "http://", "http:///", "://", ":::"),
        *("http://h:99999", "http://h:port", "http://[::1", "http://a b", "a b", "http://h:0", "\x00", "http://h\x7f"),
        *("file:///x", "http://" + "a" * 70, "http://.", "http://[nonsense]:1", "//h:1", "é" * 300),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_sentence_without_its_value(value: str) -> None:
    proxies = Proxies({"HTTPS_PROXY": value, "NO_PROXY": "far.example"})
    assert proxies.for_url("http://other.example") is proxies.for_url("https://far.example") is None
    (problem,) = proxies.problems
    assert ("HTTPS_PROXY" in problem, len(value) > 8 and value in problem) == (True, False)
    with pytest.raises(OutboundError):
        proxies.for_url("https://other.example")


def test_an_unusable_entry_of_no_proxy_is_named() -> None:
    (problem,) = Proxies({"NO_PROXY": "localhost,10.0.0.0/99,[::1]"}).problems
    assert "'10.0.0.0/99'" in problem


@pytest.mark.parametrize(
    ("value", "environ", "trust"),
    [
        (None, {}, True),
        (False, {}, False),
        ("false", {}, False),
        ("TRUE", {}, True),
        (None, {"SSL_VERIFY": "False"}, False),
        (True, {"SSL_VERIFY": "false"}, True),
        (None, {"SSL_VERIFY": "true"}, True),
        (None, {"SSL_VERIFY": ""}, True),
        (None, {"SSL_VERIFY": "/etc"}, "/etc"),
        ("/etc", {}, "/etc"),
    ],
)
def test_trust_is_configured_per_model_or_for_all(value: Any, environ: dict[str, str], trust: Any) -> None:
    assert trust_of(value, environ) == trust


@pytest.mark.parametrize("value", ["/nowhere.pem", "maybe", 0, 1, [], {}, ""])
def test_ssl_verify_that_is_neither_boolean_nor_path_is_refused(value: Any) -> None:
    with pytest.raises(OutboundError, match="ssl_verify must be true, false or the path"):
        trust_of(value, {})


def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("no certificate")
    for file in (tmp_path / "empty.pem", tmp_path / "missing.pem"):
        outbound = Outbound({"SSL_CERT_FILE": str(file)})
        (problem,) = outbound.problems()
        assert f"SSL_CERT_FILE: {file}" in problem
        with pytest.raises(OutboundError):
            outbound.context()


def test_only_false_accepts_any_certificate(certificate: Path) -> None:
    modes = [ssl_context(trust, {}).verify_mode for trust in (True, False, str(certificate))]
    assert modes == [ssl.CERT_REQUIRED, ssl.CERT_NONE, ssl.CERT_REQUIRED]


@pytest.mark.parametrize("forward", ["relay", "translate"])
async def test_ssl_verify_of_a_model_counts_in_both_modes_and_for_it_alone(certificate: Path, forward: str) -> None:
    upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY})
    async with RawUpstream(plain(), tls=served_by(certificate)) as server:
        for trusted in (False, str(certificate)):
            assert b'"hi"' in await completion_of(upstream, a_model(server, ssl_verify=trusted, **params_of(forward)))
        for refused in (None, True):
            await error_of(upstream, a_model(server, ssl_verify=refused, **params_of(forward)), completion_of)
        assert len(server.bodies) == 2
    await upstream.aclose()


@pytest.mark.parametrize("forward", ["relay", "translate"])
async def test_an_unusable_proxy_fails_only_the_models_that_need_it(
    forward: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"ALL_PROXY": "socks5h://proxy.example:1", "NO_PROXY": "localhost,[::1],fd00::/8", "SSL_VERIFY": "maybe"}
    upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY, **odd})
    assert [record.getMessage() for record in caplog.records if "ALL_PROXY" in record.getMessage()] == [
        "environment: ALL_PROXY names a SOCKS proxy, which cannot be used here; give an HTTP proxy"
    ]
    async with RawUpstream(plain()) as near:
        assert b'"hi"' in await completion_of(upstream, a_model(near, **params_of(forward)))
        for ask in (completion_of, stream_of):
            failure = await error_of(upstream, a_model(near, api_base=FAR, **params_of(forward)), ask)
            assert "cannot be reached: ALL_PROXY names a SOCKS proxy" in failure.message
    await upstream.aclose()


@pytest.mark.parametrize("forward", ["relay", "translate"])
async def test_both_modes_use_the_same_proxy_and_no_proxy(forward: str) -> None:
    async with RawUpstream(plain()) as proxy:
        named = f"127.0.0.1:{proxy.port}"
        upstream = UpstreamClient(
            Settings(), {"MODEL_API_KEY": KEY, "HTTP_PROXY": named, "NO_PROXY": "192.0.2.0/24,fd00::/8"}
        )
        await completion_of(upstream, a_model(proxy, api_base=FAR, **params_of(forward)))
        assert proxy.heads[0].startswith(b"POST http://far.invalid/v1/chat/completions HTTP/1.1\r\n")
        assert await goes_direct(upstream, a_model(proxy, api_base="http://192.0.2.7/v1", **params_of(forward)))
        assert len(proxy.heads) == 1
        await upstream.aclose()


async def goes_direct(upstream: UpstreamClient, record: Any) -> bool:
    """Tell whether the call fails: nothing answers at that address."""
    try:
        async with asyncio.timeout(0.3):
            await completion_of(upstream, record)
    except (TimeoutError, UpstreamError):
        return True
    return False


async def test_the_price_feed_uses_the_same_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://proxy.example:1")
    monkeypatch.setenv("NO_PROXY", "localhost,[::1]")
    async with RawUpstream(plain(b"{}")) as server:
        with pytest.raises(PriceFeedError, match="prices stay as they are"):
            await fetch_price_map(server.url)
        assert len(server.heads) == 1
    with pytest.raises(PriceFeedError, match="HTTP_PROXY names a SOCKS proxy"):
        await fetch_price_map(FAR)


def params_of(forward: str) -> dict[str, Any]:
    """Return parameters by which a model is called directly or through litellm."""
    return {} if forward == "relay" else {"drop_params": True}
