"""The relay over upstreams that break, lie and linger: real sockets, and what became of each connection."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import UpstreamFailure
from proxy.settings import Settings
from proxy.state.records import ModelRecord
from proxy.upstream.relay import LONGEST_HEADER
from proxy.upstream.upstream import Upstream
from tests.support.makers import a_record, until
from tests.support.raw_upstream import DONE, END, JSON, SAID, STREAM_HEAD, RawUpstream, Said, chunked, plain

KEY = "sk-canary-of-the-relay"
BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
SOON_S = 1.0
WHOLE = Said(chunked(SAID, END, DONE))


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    opened = Upstream(Settings(), {"ARM_API_KEY": KEY})
    yield opened
    await opened.aclose()


def a_model(server: RawUpstream, **params: Any) -> ModelRecord:
    stated = {"model": "openai/theirs", "api_base": server.url, "api_key": "os.environ/ARM_API_KEY"}
    return replace(a_record("ours"), litellm_params={**stated, **params})


async def whole(upstream: Upstream, record: ModelRecord) -> bytes:
    return (await upstream.complete(record, BODY)).named("ours")


async def streamed(upstream: Upstream, record: ModelRecord) -> list[bytes]:
    found: list[bytes] = []
    stream: Any = await upstream.stream(record, {**BODY, "stream": True})
    try:
        async for block in stream:
            found += [chunk.named("ours") for chunk in block]
    finally:
        await stream.aclose()
    return found


async def failing(upstream: Upstream, record: ModelRecord, ask: Callable[..., Any]) -> UpstreamFailure:
    with pytest.raises(UpstreamFailure) as caught:
        async with asyncio.timeout(5):
            await ask(upstream, record)
    assert KEY not in f"{caught.value.message}{caught.value.body!r}{caught.value.headers}"
    return caught.value


SHORT = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + JSON


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (Said((), "reset"), True),
        (Said((), "close"), True),
        (Said((b"HTTP/1.1 200 O",), "close"), True),
        (Said((SHORT[:60],), "close"), True),
        (Said((SHORT[:-20],), "reset"), False),
        (Said((SHORT,), "close"), False),
        (Said((b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n" + JSON,), "close"), False),
        (Said((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n50\r\n" + JSON[:20],), "close"), False),
        (Said((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + JSON,), "close"), False),
        (Said((b"SMTP ready\r\n\r\n",), "close"), False),
        (Said((b"HTTP/1.1 200 OK\r\nx: " + b"y" * (LONGEST_HEADER + 1) + b"\r\n\r\n",), "close"), False),
        (plain(b"", status=b"204 No Content"), False),
        (plain(b""), False),
        (plain(b"\xff\xfe{}"), False),
        (plain(b'{"error": {"message": "boom"}}'), False),
        (plain(b"[" * 100_000), False),
    ],
)
async def test_an_answer_that_is_none_is_one_request_and_a_failure(upstream: Upstream, said: Said, lost: bool) -> None:
    """`lost`: nothing was answered, so that the model may be asked once more; else it has done its work."""
    async with RawUpstream(said) as server:
        failure = await failing(upstream, a_model(server), whole)
        assert (failure.lost, len(server.bodies)) == (lost, 1)


@pytest.mark.parametrize(
    ("said", "lost", "chunks"),
    [
        (Said((STREAM_HEAD + b"\r\n",), "reset"), False, 0),
        (Said((STREAM_HEAD + b"\r\n",), "close"), False, 0),
        (Said(chunked(end=b""), "close"), True, 0),
        (Said(chunked(end=b""), "reset"), True, 0),
        (Said(chunked(SAID, end=b""), "reset"), False, 1),
        (Said((*chunked(SAID, end=b""), b"50\r\nda"), "close"), False, 1),
        (Said(chunked(SAID)), False, 1),
        (Said(chunked(SAID, b"data: {nonsense\n\n")), False, 1),
        (Said(chunked(b"data: 7\n\n")), False, 0),
        (Said(chunked(SAID, b'data: {"error": {"message": "boom"}}\n\n', END, DONE)), False, 1),
        (Said(chunked(DONE)), False, 0),
        (Said(chunked()), False, 0),
        (plain(b"", status=b"204 No Content", head=b""), False, 0),
        (plain(JSON), False, 0),
    ],
)
async def test_a_stream_that_ends_before_its_answer_is_a_failure(
    upstream: Upstream, said: Said, lost: bool, chunks: int
) -> None:
    seen = []

    async def ask(upstream: Upstream, record: ModelRecord) -> None:
        async for block in await upstream.stream(record, {**BODY, "stream": True}):
            seen.extend(block)

    async with RawUpstream(said) as server:
        failure = await failing(upstream, a_model(server), ask)
        assert (failure.lost, len(seen), len(server.bodies)) == (lost, chunks, 1)


@pytest.mark.parametrize("status", [b"300 Many", b"302 Found", b"304 Same", b"307 Elsewhere"])
async def test_no_redirect_is_followed(upstream: Upstream, status: bytes) -> None:
    async with RawUpstream(WHOLE) as elsewhere, RawUpstream() as server:
        location = f"location: {elsewhere.url}\r\n".encode()
        server.script.append(plain(b"", head=location, status=status))
        for ask in (whole, streamed):
            assert "redirect" in (await failing(upstream, a_model(server), ask)).message
        assert elsewhere.connections == 0


async def test_an_error_of_a_megabyte_is_cut_and_its_connection_closed(upstream: Upstream) -> None:
    async with RawUpstream(plain(b'{"error": "' + b"x" * 2**20, status=b"400 Bad")) as server:
        for ask in (whole, streamed):
            failure = await failing(upstream, a_model(server), ask)
            assert (failure.status, len(failure.body or b"")) == (400, 16 * 2**10)
        await until(lambda: server.open == 0)


async def test_the_wait_that_an_upstream_asks_for_is_kept_however_it_is_spelt(upstream: Upstream) -> None:
    async with RawUpstream(
        plain(b"{}", head=b"Retry-After: 7\r\nRETRY-AFTER-MS: 7000\r\n", status=b"429 No")
    ) as server:
        failure = await failing(upstream, a_model(server), whole)

    assert failure.headers == {"retry-after": "7", "retry-after-ms": "7000"}


@pytest.mark.parametrize(
    "said",
    [
        Said((b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + JSON,), "close"),
        plain(gzip.compress(JSON), head=b"content-encoding: gzip\r\n"),
        plain(head=b"x-long: " + b"y" * 30_000 + b"\r\n"),
        plain(head=b"content-type: application/json\r\n" + b"".join(b"x-%d: y\r\n" % each for each in range(100))),
        Said((b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", *plain().pieces)),
        Said(tuple(bytes((byte,)) for byte in plain().pieces[0])),
    ],
)
async def test_odd_but_whole_answers_arrive_as_they_are(upstream: Upstream, said: Said) -> None:
    async with RawUpstream(said) as server:
        assert await whole(upstream, a_model(server)) == JSON.replace(b"theirs", b"ours")


@pytest.mark.parametrize(
    "said",
    [
        Said((b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", SAID, END), "close"),
        Said((STREAM_HEAD + b"content-encoding: gzip\r\n\r\n", gzip.compress(SAID + END)), "close"),
        Said(chunked(b"\xef\xbb\xbf", SAID.replace(b"\n", b"\r\n"), END)),
        Said(chunked(*(bytes((byte,)) for byte in SAID + END))),
        Said(chunked(SAID, DONE)),
        Said(chunked(b": ping\n\nevent: x\nid: 3\n\n", SAID, b"retry: 1\n\n", END[:-2])),
    ],
)
async def test_odd_but_whole_streams_arrive_as_they_are(upstream: Upstream, said: Said) -> None:
    async with RawUpstream(said) as server:
        found = await streamed(upstream, a_model(server))

    whole_events = [each[6:].strip().replace(b"theirs", b"ours") for each in (SAID, END)]
    assert found == whole_events[: len(found)]
    assert found


async def test_thousands_of_events_in_one_reading_are_blocks_of_many(upstream: Upstream) -> None:
    async with RawUpstream(Said(chunked(SAID * 2000 + END))) as server:
        sizes = [len(block) async for block in await upstream.stream(a_model(server), {**BODY, "stream": True})]

    assert sum(sizes) == 2001
    assert len(sizes) < 200


@pytest.mark.parametrize(
    "after",
    [(), (SAID * 3,), (b"data: {broken\n\n",), (b"x" * 2**21,)],
    ids=["silence", "events", "nonsense", "flood"],
)
async def test_what_comes_after_done_is_waited_for_by_nobody(upstream: Upstream, after: tuple[bytes, ...]) -> None:
    """The coding of the body never ends: its connection is given up, and not used again."""
    async with RawUpstream(Said(chunked(SAID, END, DONE, *after, end=b""), "hang"), WHOLE) as server:
        async with asyncio.timeout(SOON_S / 2):
            assert len(await streamed(upstream, a_model(server))) == 2
        await until(lambda: server.open == 0, 3)
        assert len(await streamed(upstream, a_model(server))) == 2
        assert server.connections == 2


async def test_connections_are_used_again(upstream: Upstream) -> None:
    async with RawUpstream(WHOLE) as server:
        for _ in range(5):
            assert len(await streamed(upstream, a_model(server))) == 2
            await asyncio.sleep(0.02)  # the end of the coding may come behind the last word
        server.script.append(plain())
        server.script.popleft()
        for _ in range(5):
            await whole(upstream, a_model(server))
        assert server.connections == 1


async def test_a_kept_connection_that_the_server_closed_costs_no_request(upstream: Upstream) -> None:
    async with RawUpstream(Said(plain().pieces, "close")) as server:
        for _ in range(5):
            await whole(upstream, a_model(server))
            await until(lambda: server.open == 0)
            await asyncio.sleep(0.01)  # until it has reached this side
        assert (len(server.bodies), server.connections) == (5, 5)


async def test_a_kept_connection_that_dies_under_a_request_is_told_as_lost_and_not_repeated_here(
    upstream: Upstream,
) -> None:
    async with RawUpstream(plain(), Said((), "reset"), plain()) as server:
        await whole(upstream, a_model(server))
        failure = await failing(upstream, a_model(server), whole)
        assert (failure.lost, len(server.bodies), server.connections) == (True, 2, 1)
        await whole(upstream, a_model(server))


@pytest.mark.parametrize(
    "said",
    [
        Said((), "hang"),
        Said((SHORT,), "hang"),
        Said((STREAM_HEAD + b"\r\n",), "hang"),
        Said(chunked(SAID, end=b""), "hang"),
        Said(chunked(SAID, END, end=b""), "hang"),
    ],
    ids=["before the headers", "in a body", "after the headers", "after a chunk", "after the last word"],
)
@pytest.mark.parametrize("ask", [whole, streamed])
async def test_leaving_at_any_stage_closes_the_connection(
    upstream: Upstream, said: Said, ask: Callable[..., Any]
) -> None:
    async with RawUpstream(said) as server:
        asking = asyncio.create_task(ask(upstream, a_model(server)))
        await until(lambda: bool(server.bodies))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: server.open == 0, SOON_S)


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 3 * 2**20])
async def test_a_large_body_arrives_whole(upstream: Upstream, size: int) -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "é" * (size // 2)}]}
    async with RawUpstream(plain()) as server:
        await upstream.complete(a_model(server), body)
        assert len(server.bodies[0]) > size - 100
        assert b"\xc3\xa9" * (size // 2) in server.bodies[0]


async def test_many_streams_at_once_leave_no_connection_behind(upstream: Upstream) -> None:
    async with RawUpstream(WHOLE) as server:
        found = await asyncio.gather(*(streamed(upstream, a_model(server)) for _ in range(200)))
        assert {len(chunks) for chunks in found} == {2}
        before = server.connections
        await asyncio.sleep(0.1)
        await asyncio.gather(*(streamed(upstream, a_model(server)) for _ in range(100)))
        assert (before <= 200, server.connections - before) == (True, 0)
        await upstream.aclose()
        await until(lambda: server.open == 0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by itself, for 127.0.0.1; with its key in one file."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    out = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *names, *out], check=True, capture_output=True)
    made.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return made


def served_by(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_an_unknown_certificate_is_said_to_be_the_reason(upstream: Upstream, certificate: Path) -> None:
    async with RawUpstream(plain(), tls=served_by(certificate)) as server:
        for ask in (whole, streamed):
            failure = await failing(upstream, a_model(server), ask)
            assert ("certificate" in failure.message, failure.lost) == (True, False)
        assert server.bodies == []


async def test_a_certificate_of_the_systems_is_taken_where_it_is_asked_for(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    upstream = Upstream(Settings(), {"ARM_API_KEY": KEY, "SSL_CERT_FILE": str(certificate)})
    async with RawUpstream(plain(), tls=served_by(certificate)) as server:
        assert await whole(upstream, a_model(server)) == JSON.replace(b"theirs", b"ours")
    await upstream.aclose()


async def test_a_proxy_of_the_environment_is_used_but_for_those_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawUpstream(plain()) as proxy, RawUpstream(plain()) as near:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        upstream = Upstream(Settings(), {"ARM_API_KEY": KEY})
        far = a_model(near, api_base="http://far.invalid/v1")
        await whole(upstream, far)
        await whole(upstream, a_model(near))
        await upstream.aclose()
        assert (len(proxy.bodies), len(near.bodies)) == (1, 1)
        assert proxy.heads[0].startswith(b"POST http://far.invalid/v1/chat/completions HTTP/1.1\r\n")


async def test_a_proxy_that_refuses_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawUpstream(plain(b"", status=b"407 Who are you")) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        upstream = Upstream(Settings(), {"ARM_API_KEY": KEY})
        failure = await failing(upstream, a_model(proxy, api_base="https://far.invalid/v1"), whole)
        await upstream.aclose()
        assert ("407" in failure.message, failure.lost, len(proxy.heads)) == (True, False, 1)
        assert KEY.encode() not in proxy.heads[0]
