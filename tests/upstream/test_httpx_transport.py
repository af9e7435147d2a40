"""httpx over our connections: the same requests, answers and errors as over its own transport."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from httpx._transports.default import _load_httpcore_exceptions

from proxy.settings.outbound import Outbound, OutboundConnectError, OutboundError
from proxy.upstream import pool as pool_module
from proxy.upstream.httpx_transport import (
    CALL,
    CONNECT_ERRORS,
    READ_ERRORS,
    WRITE_ERRORS,
    ConnectionLost,
    PooledTransport,
)
from proxy.upstream.pool import ConnectionPool
from tests.support.connection_pool import serve_connect_proxy, served
from tests.support.raw_upstream import JSON, STREAM_HEAD, RawUpstream, Reply, chunked, plain
from tests.support.tls import served_by
from tests.support.waiting import until

KEY = "sk-canary-of-the-transport"
MIB = 2**20
HEAD = b"HTTP/1.1 200 OK\r\n"
PACKED = gzip.compress(JSON, mtime=0)
CODED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@asynccontextmanager
async def client_of_ours(
    environ: dict[str, str] | None = None, *, max_open: int = 10, timeouts: Any = 30
) -> AsyncIterator[httpx.AsyncClient]:
    outbound = Outbound(environ or {})
    pool = ConnectionPool(max_open, outbound.context)
    async with httpx.AsyncClient(
        transport=PooledTransport(pool, outbound), timeout=timeouts, trust_env=False
    ) as client:
        yield client
    await pool.aclose()


@asynccontextmanager
async def client_of_httpcore(
    environ: dict[str, str] | None = None, *, max_open: int = 10, timeouts: Any = 30
) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=max_open)
    verify = Outbound(environ or {}).context()
    proxy = (environ or {}).get("ALL_PROXY")
    transport = httpx.AsyncHTTPTransport(verify=verify, trust_env=False, limits=limits, proxy=proxy)
    async with httpx.AsyncClient(transport=transport, timeout=timeouts, trust_env=False) as client:
        yield client


class Call:
    def __init__(self) -> None:
        self.trust: bool | None = None
        self.responses: set[Any] = set()


CLIENTS: tuple[Callable[..., Any], ...] = (client_of_ours, client_of_httpcore)
BOTH = pytest.mark.parametrize("client_of", CLIENTS, ids=["ours", "httpcore"])


def seen(response: httpx.Response) -> tuple[Any, ...]:
    """Return all that a caller sees of a response."""
    told = response.status_code, response.headers.raw, response.content, response.http_version, response.reason_phrase
    return (*told, response.headers.get_list("x-twice"))


@pytest.mark.parametrize(
    "reply",
    [
        plain(),
        plain(b""),
        plain(b"", head=b"content-type: text/plain\r\n", status=b"204 Nothing to say"),
        plain(b"no", status=b"500 My mistake"),
        plain(b"no", status=b"299 \xfcnlich"),
        plain(head=b"X-Twice: a\r\nx-twice:   b  \r\nX-Empty:\r\nSet-Cookie: a=b\r\nx-odd: \xe9\xff\r\n"),
        Reply((HEAD + b"\r\n", b"until ", b"the end"), "close"),
        Reply((b"HTTP/1.0 200 OK\r\n\r\nold",), "close"),
        Reply((b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nold",), "close"),
        Reply(chunked(b"one", b"two", end=b"0\r\ntrailer: x\r\n\r\n")),
        Reply((b"HTTP/1.1 100 Continue\r\n\r\n", *plain().pieces)),
        Reply((b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + plain().pieces[0],)),
        Reply(tuple(bytes((byte,)) for byte in plain().pieces[0])),
        Reply((HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",)),
    ],
)
async def test_a_response_is_the_same_as_over_httpcore(reply: Reply) -> None:
    async with RawUpstream(reply) as server:
        found = []
        for client_of in CLIENTS:
            async with client_of() as client:
                found.append(seen(await client.post(server.url, content=b"{}")))

    assert found[0] == found[1]


@BOTH
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", HEAD + b"content-length: 5\r\n\r\n"),
        ("HEAD", CODED),
        ("GET", b"HTTP/1.1 304 Same\r\ncontent-length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 None\r\ncontent-length: 5\r\n\r\n"),
    ],
)
async def test_a_response_that_has_no_body_is_not_waited_for(client_of: Any, method: str, answer: bytes) -> None:
    async with RawUpstream(Reply((answer,))) as server, client_of() as client:
        for _ in range(2):
            response = await client.request(method, server.url)
            assert (response.content, response.headers.get("content-length", "5")) == (b"", "5")

        assert {head.split(b" ")[0] for head in server.heads} == {method.encode()}


async def test_a_body_where_none_may_be_is_no_part_of_the_next_response() -> None:
    with_body = Reply((HEAD + b"content-length: 5\r\n\r\nextra",))
    async with RawUpstream(with_body, plain()) as server, client_of_ours() as client:
        assert (await client.head(server.url)).content == b""
        assert (await client.get(server.url)).content == JSON


LENGTH = HEAD + b"content-length: 100\r\n\r\n"
FAULTS: dict[str, tuple[Reply, type[httpx.TransportError]]] = {
    "closed before the head": (Reply((), "close"), httpx.RemoteProtocolError),
    "closed within the head": (Reply((HEAD + b"x: y",), "close"), httpx.RemoteProtocolError),
    "reset before the head": (Reply((), "reset"), httpx.ReadError),
    "closed within the body": (Reply((LENGTH + b"half",), "close"), httpx.RemoteProtocolError),
    "closed within a chunk": (Reply((CODED + b"50\r\nhalf",), "close"), httpx.RemoteProtocolError),
    "closed between chunks": (Reply(chunked(b"half", end=b""), "close"), httpx.RemoteProtocolError),
    "reset within the body": (Reply((LENGTH + b"half",), "reset"), httpx.ReadError),
    "reset in a body without length": (Reply((HEAD + b"\r\nhalf",), "reset"), httpx.ReadError),
    "not HTTP": (Reply((b"SMTP ready\r\n\r\n",), "close"), httpx.RemoteProtocolError),
    "no length of a chunk": (Reply((CODED + b"zz\r\nhalf",), "hang"), httpx.RemoteProtocolError),
    "two lengths": (
        Reply((HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi!",), "hang"),
        httpx.RemoteProtocolError,
    ),
    "a huge header": (Reply((HEAD + b"x: " + b"y" * MIB + b"\r\n\r\n",), "hang"), httpx.RemoteProtocolError),
    "huge headers": (Reply((HEAD + b"x: y\r\n" * MIB + b"\r\n",), "hang"), httpx.RemoteProtocolError),
    "silence": (Reply((), "hang"), httpx.ReadTimeout),
    "silence within the head": (Reply((HEAD,), "hang"), httpx.ReadTimeout),
    "silence within the body": (Reply((LENGTH + b"half",), "hang"), httpx.ReadTimeout),
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_response_is_the_same_error_as_over_httpcore(client_of: Any, fault: str) -> None:
    reply, kind = FAULTS[fault]
    timeouts = httpx.Timeout(30, read=0.1 if "silence" in fault else 30)
    async with RawUpstream(reply) as server, client_of(timeouts=timeouts) as client:
        with pytest.raises(httpx.TransportError) as caught:
            await client.post(server.url, content=b"{}")
        assert (isinstance(caught.value, kind), str(caught.value.request.url)) == (True, server.url)
        await until(lambda: server.open == 0)


@BOTH
async def test_an_upstream_that_cannot_be_reached_is_a_connect_error(client_of: Any, certificate: Path) -> None:
    async with RawUpstream(plain(), tls=served_by(certificate)) as untrusted, client_of() as client:
        for url in ("http://127.0.0.1:1/v1", "https://127.0.0.1:1/v1", "http://far.invalid/v1", untrusted.url):
            with pytest.raises(httpx.ConnectError):
                await client.post(url, content=b"{}")


@BOTH
async def test_a_handshake_without_an_answer_is_a_connect_timeout(client_of: Any) -> None:
    async with (
        RawUpstream(Reply((), "hang")) as silent,
        client_of(timeouts=httpx.Timeout(30, connect=0.1)) as client,
    ):
        with pytest.raises(httpx.ConnectTimeout):
            await client.get(silent.url.replace("http:", "https:"))


@BOTH
async def test_waiting_too_long_for_a_slot_is_a_pool_timeout(client_of: Any) -> None:
    async with (
        RawUpstream(Reply((), "hang")) as server,
        client_of(max_open=1, timeouts=httpx.Timeout(30, pool=0.05)) as client,
    ):
        first = asyncio.create_task(client.get(server.url))
        await until(lambda: server.open == 1)
        with pytest.raises(httpx.PoolTimeout):
            await client.get(server.url)
        first.cancel()
        await asyncio.wait({first})
        await until(lambda: server.open == 0)


@BOTH
async def test_an_upstream_that_reads_nothing_is_a_write_timeout(client_of: Any) -> None:
    over = asyncio.Event()

    async def handle(*_: Any) -> None:
        await over.wait()

    async with served(handle) as origin, client_of(timeouts=httpx.Timeout(30, write=0.1)) as client:
        with pytest.raises(httpx.WriteTimeout):
            await client.post(f"http://127.0.0.1:{origin.port}", content=bytes(40 * MIB))
        over.set()


@BOTH
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (plain(b"", status=b"407 Who are you"), httpx.ProxyError),
        (Reply((), "close"), httpx.RemoteProtocolError),
    ],
)
async def test_a_proxy_that_opens_no_tunnel_is_the_same_error(client_of: Any, reply: Reply, kind: Any) -> None:
    async with RawUpstream(reply) as proxy, client_of({"ALL_PROXY": f"http://127.0.0.1:{proxy.port}"}) as client:
        with pytest.raises(kind):
            await client.get("https://far.invalid/v1")


@BOTH
async def test_an_address_that_is_not_http_is_refused(client_of: Any) -> None:
    async with client_of() as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/x")


@BOTH
@pytest.mark.parametrize(
    "headers",
    [
        {"x-a": f"{KEY}\r\nx-b: c"},
        {"x-a": f"{KEY}\n"},
        {"authorization": f"Bearer {KEY}\r"},
        {"x-a": f"{KEY}\0"},
        {"x a": KEY},
        {"x-a\r\nx-b": KEY},
        {"x-a:": KEY},
        {"": KEY},
    ],
)
async def test_a_header_that_would_be_another_is_not_sent(client_of: Any, headers: Any) -> None:
    async with RawUpstream(plain()) as server, client_of() as client:
        with pytest.raises(httpx.LocalProtocolError) as caught:
            await client.get(server.url, headers=headers)

        assert (server.heads, KEY in str(caught.value) and client_of is client_of_ours) == ([], False)


async def test_unusable_proxies_and_certificates_are_named() -> None:
    async with client_of_ours({"HTTP_PROXY": "socks5://proxy.example:1", "SSL_CERT_FILE": "/nowhere.pem"}) as client:
        for url, name in (("http://far.invalid/v1", "HTTP_PROXY"), ("https://127.0.0.1/v1", "SSL_CERT_FILE")):
            with pytest.raises(OutboundConnectError, match=name):
                await client.get(url)


@pytest.mark.parametrize("url", [f"http://{'a' * 70}/x", "http://a..b/x"])
async def test_a_host_name_that_no_resolver_takes_is_a_connect_error(url: str) -> None:
    async with client_of_ours() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(url)


def test_every_error_of_a_connection_has_its_class_of_httpx() -> None:
    ours = [
        each
        for each in vars(pool_module).values()
        if inspect.isclass(each) and issubclass(each, Exception) and each.__module__ == pool_module.__name__
    ]
    assert len(ours) >= 5
    for each in (*ours, TimeoutError, ssl.SSLError, ConnectionResetError, OutboundError):
        assert any(issubclass(each, known) for table in (CONNECT_ERRORS, READ_ERRORS) for known in table), each
    for table in (CONNECT_ERRORS, WRITE_ERRORS, READ_ERRORS):
        known = list(table)
        for place, each in enumerate(known):
            assert not any(issubclass(each, before) for before in known[:place]), f"{each} is hidden by one before it"


def test_every_class_of_httpx_that_httpcore_raises_is_raised_here_too() -> None:
    raised: set[type] = {httpx.LocalProtocolError, httpx.UnsupportedProtocol}  # both without a table
    for table in (CONNECT_ERRORS, WRITE_ERRORS, READ_ERRORS):
        raised.update(*(each.__mro__ for each in table.values()))
    of_httpcore = _load_httpcore_exceptions()

    assert len(of_httpcore) >= 14
    assert set(of_httpcore.values()) <= raised


async def in_full(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the request as it came, and close."""
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    if length is None and b"transfer-encoding" in head.lower():
        body = b""
        while not body.endswith(b"\r\n0\r\n\r\n"):
            size = await reader.readline()
            body += size + await reader.readexactly(int(size, 16) + 2)
    else:
        body = await reader.readexactly(length or 0)
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + head + body)


async def pieces() -> AsyncIterator[bytes]:
    yield b"one"
    yield b""
    yield b"x" * 300_000


REQUESTS: dict[str, dict[str, Any]] = {
    "nothing": {"method": "GET"},
    "JSON": {"json": {"a": "ü"}, "headers": [("X-Twice", "a"), ("x-twice", "b"), ("content-length", "10")]},
    "empty": {"content": b""},
    "deleted": {"method": "DELETE"},
    "a form": {"data": {"a": "b c"}},
    "a file": {
        "files": {"file": ("a.txt", b"text" * 100_000)},
        "headers": {"content-type": "multipart/form-data; boundary=x"},
    },
    "a body": {"content": b"y" * 3_000_000},
    "an iterator with a length": {"content": pieces, "headers": {"content-length": "300003"}},
    "tabs": {"method": "PUT", "headers": {"x": "a\tb c"}},
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_request_is_the_same_as_over_httpcore(kind: str) -> None:
    found = []
    async with served(in_full) as origin:
        for client_of in CLIENTS:
            request = {"method": "POST", "url": f"http://127.0.0.1:{origin.port}/a b?q=ü&r=%20", **REQUESTS[kind]}
            if request.get("content") is pieces:
                request["content"] = pieces()
            async with client_of() as client:
                head, _, body = (await client.request(**request)).content.partition(b"\r\n\r\n")
            found.append((sorted(head.split(b"\r\n")), body))

    in_lower_case = [(sorted(line.lower() for line in head), body) for head, body in found]
    assert in_lower_case[0] == in_lower_case[1]


async def test_a_body_of_unknown_length_arrives_whole() -> None:
    async with served(in_full) as origin, client_of_ours() as client:
        head, _, body = (await client.post(f"http://127.0.0.1:{origin.port}", content=pieces())).content.partition(
            b"\r\n\r\n"
        )

    read = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        read, body = read + body[: int(size, 16)], body[int(size, 16) + 2 :]
    assert (read, b"content-length" in head.lower()) == (b"one" + b"x" * 300_000, False)


async def test_a_request_whose_body_fails_is_no_request() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    async with RawUpstream(plain()) as server, client_of_ours(max_open=1) as client:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await client.post(server.url, content=failing())
        assert (await client.get(server.url)).content == JSON
        assert server.connections == 3


@pytest.mark.parametrize("body", [bytes(30 * MIB), None], ids=["of known length", "of unknown length"])
async def test_an_answer_before_the_request_is_through_is_read(body: bytes | None) -> None:
    over, heads = asyncio.Event(), []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(MIB)

    async def handle(head: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(b"HTTP/1.1 413 Too large\r\ncontent-length: 5\r\n\r\nlarge")
        await over.wait()

    async with served(handle) as origin, client_of_ours() as client:
        for _ in range(2):
            response = await client.post(f"http://127.0.0.1:{origin.port}", content=body or endless())
            assert (response.status_code, response.content) == (413, b"large")
        over.set()
    assert len(heads) == 2


async def test_plain_requests_go_through_the_proxy_with_their_whole_address() -> None:
    async with RawUpstream(plain()) as proxy:
        environ = {"HTTP_PROXY": f"http://me:p%40ss@127.0.0.1:{proxy.port}", "NO_PROXY": "near.invalid"}
        async with client_of_ours(environ) as client:
            for _ in range(2):
                await client.post("http://far.invalid:8080/v1?a=b", content=b"{}")
            with pytest.raises(httpx.ConnectError):
                await client.get("http://near.invalid/v1")

    assert (len(proxy.heads), proxy.connections) == (2, 1)
    lines = proxy.heads[0].split(b"\r\n")
    assert lines[0] == b"POST http://far.invalid:8080/v1?a=b HTTP/1.1"
    assert b"proxy-authorization: Basic bWU6cEBzcw==" in lines
    assert b"Host: far.invalid:8080" in lines


async def test_requests_over_tls_go_through_a_tunnel_and_their_certificate_is_checked(certificate: Path) -> None:
    tunnels = []

    async with RawUpstream(plain(), tls=served_by(certificate)) as server:

        async def tunnel(head: bytes, *ends: Any) -> None:
            tunnels.append(head)
            await serve_connect_proxy(b"CONNECT 127.0.0.1:%d HTTP/1.1" % server.port, *ends)

        async with served(tunnel) as proxy, client_of_ours({"HTTPS_PROXY": f"127.0.0.1:{proxy.port}"}) as client:
            call = Call()
            with pytest.raises(httpx.ConnectError):
                await client.get("https://far.invalid/v1", extensions={CALL: call})
            call.trust = False
            for _ in range(2):
                response = await client.get("https://far.invalid/v1?a=b", extensions={CALL: call})
                assert response.content == JSON

    assert [head.split(b"\r\n")[0] for head in tunnels] == [b"CONNECT far.invalid:443 HTTP/1.1"] * 2
    assert [head.split(b"\r\n")[0] for head in server.heads] == [b"GET /v1?a=b HTTP/1.1"] * 2


@pytest.mark.parametrize("tls", [False, True])
async def test_connections_are_used_again(certificate: Path, tls: bool) -> None:
    script = [plain(), Reply(chunked(JSON)), plain(b"", status=b"204 None"), plain(b"no", status=b"500 No"), plain()]
    environ = {"SSL_CERT_FILE": str(certificate)} if tls else {}
    async with (
        RawUpstream(*script, tls=served_by(certificate) if tls else None) as server,
        client_of_ours(environ) as client,
    ):
        for _ in script:
            await client.post(server.url, content=b"{}")

        assert (server.connections, len(server.bodies)) == (1, len(script))


@pytest.mark.parametrize("more", [plain(b"other").pieces[0], b"H", b"{}"])
async def test_what_follows_a_response_is_not_the_next(more: bytes) -> None:
    async with RawUpstream(Reply((plain().pieces[0] + more,)), plain()) as server, client_of_ours() as client:
        for _ in range(2):
            assert (await client.get(server.url)).content == JSON

        assert server.connections == 2


async def test_a_kept_connection_that_the_upstream_closed_is_not_used() -> None:
    async with RawUpstream(Reply(plain().pieces, "close")) as server, client_of_ours() as client:
        for _ in range(3):
            assert (await client.get(server.url)).content == JSON
            await until(lambda: server.open == 0)
            await asyncio.sleep(0.01)  # until that has reached this side

        assert server.connections == 3


async def test_no_more_connections_are_open_than_allowed_and_all_requests_are_answered() -> None:
    async with RawUpstream(plain()) as server, client_of_ours(max_open=3) as client:
        found = await asyncio.gather(*(client.post(server.url, content=b"{}") for _ in range(50)))

        assert {response.content for response in found} == {JSON}
        assert (server.connections, len(server.bodies)) == (3, 50)


async def test_a_stream_arrives_as_it_is_sent_and_gives_its_connection_back_at_its_end() -> None:
    going = asyncio.Event()

    async def handle(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await going.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain().pieces[0])

    async with served(handle) as origin, client_of_ours(max_open=1) as client:
        async with client.stream("POST", f"http://127.0.0.1:{origin.port}", content=b"") as response:
            parts = aiter(response.aiter_bytes())
            assert await anext(parts) == b"one"
            going.set()
            assert [part async for part in parts] == [b"two"]
        assert (await client.get(f"http://127.0.0.1:{origin.port}")).content == JSON


async def test_a_stream_that_is_closed_early_closes_its_connection() -> None:
    async with RawUpstream(Reply(chunked(b"one", end=b""), "hang")) as server, client_of_ours(max_open=1) as client:
        for _ in range(3):
            async with client.stream("POST", server.url, content=b"") as response:
                assert await anext(aiter(response.aiter_bytes())) == b"one"
        await until(lambda: server.open == 0)
        assert server.connections == 3


async def test_a_large_body_is_read_only_as_fast_as_its_reader() -> None:
    sent = asyncio.Event()

    async def handle(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % (32 * MIB))
        for piece in [bytes(MIB)] * 32:
            writer.write(piece)
            await writer.drain()
        sent.set()

    async with (
        served(handle) as origin,
        client_of_ours() as client,
        client.stream("GET", f"http://127.0.0.1:{origin.port}") as response,
    ):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent.wait(), 0.2)
        assert sum([len(part) async for part in response.aiter_bytes()]) == 32 * MIB


@pytest.mark.parametrize("tls", [False, True])
async def test_a_request_cancelled_at_any_moment_leaves_neither_connection_nor_slot(
    certificate: Path, tls: bool
) -> None:
    environ = {"SSL_CERT_FILE": str(certificate)} if tls else {}
    replies = Reply(chunked(JSON[:9], end=b""), "hang"), Reply(chunked(JSON))
    for reply in replies:
        async with RawUpstream(reply, tls=served_by(certificate) if tls else None) as server:
            async with client_of_ours(environ, max_open=2) as client:
                for steps in range(40):
                    asking = [asyncio.create_task(client.post(server.url, content=b"{}")) for _ in range(3)]
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    for each in asking:
                        each.cancel()
                    await asyncio.wait(asking)
                if reply is replies[1]:
                    assert (await client.post(server.url, content=b"{}")).content == JSON
            await until(lambda: server.open == 0)


async def test_a_call_knows_what_it_has_open_until_that_is_closed() -> None:
    async with (
        RawUpstream(plain(), Reply(chunked(b"one", end=b""), "hang"), Reply((), "hang")) as server,
        client_of_ours() as client,
    ):
        call = Call()
        await client.get(server.url, extensions={CALL: call})
        assert call.responses == set()

        request = client.build_request("GET", server.url, extensions={CALL: call})
        response = await client.send(request, stream=True)
        waiting = asyncio.create_task(client.get(server.url, extensions={CALL: call}))
        await until(lambda: len(server.heads) == 3)
        assert len(call.responses) == 2
        for each in tuple(call.responses):
            each.close()

        with pytest.raises(ConnectionLost):
            await waiting
        with pytest.raises(httpx.StreamClosed):
            await response.aread()
        await until(lambda: server.open == 0)
        assert call.responses == set()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        (b"gzip", PACKED),
        (b"GZIP", PACKED),
        (b"deflate", zlib.compress(JSON)),
        (b"identity", JSON),
        (b"none", PACKED),
    ],
    ids=["gzip", "GZIP", "deflate", "identity", "none"],
)
async def test_a_compressed_body_is_decompressed_once(coding: bytes, packed: bytes) -> None:
    head = b"content-encoding: %s\r\n" % coding
    async with RawUpstream(plain(packed, head), plain(packed, head)) as server, client_of_ours() as client:
        response = await client.get(server.url)
        assert (response.content, "content-encoding" in response.headers) == (JSON, False)
        await client.get(server.url)

        assert server.connections == 1


@pytest.mark.parametrize("coding", [b"br", b"zstd"])
async def test_a_coding_that_was_not_asked_for_and_is_not_known_is_left_as_it_is(coding: bytes) -> None:
    packed = b"\x28\xb5\x2f\xfd\x04\x00 what that coding makes of it"
    async with RawUpstream(plain(packed, b"content-encoding: %s\r\n" % coding)) as server, client_of_ours() as client:
        assert (await client.get(server.url)).content == packed


@pytest.mark.parametrize(
    "packed", [PACKED[:-8] + bytes(8), PACKED + b"more", b"\x1f\x8bnonsense"], ids=["odd", "longer", "nonsense"]
)
async def test_a_body_that_cannot_be_decompressed_is_an_error(packed: bytes) -> None:
    async with RawUpstream(plain(packed, b"content-encoding: gzip\r\n")) as server, client_of_ours() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(server.url)
        await until(lambda: server.open == 0)
