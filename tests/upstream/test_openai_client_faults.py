from __future__ import annotations

import gzip

import pytest

from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from proxy.upstream.pool import MAX_HEADER_VALUE_BYTES
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import BODY, SHORT, WHOLE, a_model, completion_of, error_of, stream_of
from tests.support.raw_upstream import CHUNK, DONE, END, JSON, STREAM_HEAD, RawUpstream, Reply, chunked, plain
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("reply", "lost"),
    [
        (Reply((), "reset"), True),
        (Reply((), "close"), True),
        (Reply((b"HTTP/1.1 200 O",), "close"), True),
        (Reply((SHORT[:60],), "close"), True),
        (Reply((SHORT[:-20],), "reset"), False),
        (Reply((SHORT,), "close"), False),
        (Reply((b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n" + JSON,), "close"), False),
        (Reply((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n50\r\n" + JSON[:20],), "close"), False),
        (Reply((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + JSON,), "close"), False),
        (Reply((b"SMTP ready\r\n\r\n",), "close"), False),
        (Reply((b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_HEADER_VALUE_BYTES + 1) + b"\r\n\r\n",), "close"), False),
        (plain(b"", status=b"204 No Content"), False),
        (plain(b""), False),
        (plain(b"\xff\xfe{}"), False),
        (plain(b'{"error": {"message": "boom"}}'), False),
        (plain(b"[" * 100_000), False),
    ],
)
async def test_a_response_without_a_completion_is_one_request_and_an_error(
    upstream: UpstreamClient, reply: Reply, lost: bool
) -> None:
    """`lost`: nothing was answered, so that the model may be asked once more; else it has done its work."""
    async with RawUpstream(reply) as server:
        failure = await error_of(upstream, a_model(server), completion_of)
        assert (failure.connection_lost, len(server.bodies)) == (lost, 1)


@pytest.mark.parametrize(
    ("reply", "lost", "chunks"),
    [
        (Reply((STREAM_HEAD + b"\r\n",), "reset"), True, 0),
        (Reply((STREAM_HEAD + b"\r\n",), "close"), False, 0),
        (Reply(chunked(end=b""), "close"), True, 0),
        (Reply(chunked(end=b""), "reset"), True, 0),
        (Reply(chunked(CHUNK, end=b""), "reset"), False, 1),
        (Reply((*chunked(CHUNK, end=b""), b"50\r\nda"), "close"), False, 1),
        (Reply(chunked(CHUNK)), False, 1),
        (Reply(chunked(CHUNK, b"data: {nonsense\n\n")), False, 1),
        (Reply(chunked(b"data: 7\n\n")), False, 0),
        (Reply(chunked(CHUNK, b'data: {"error": {"message": "boom"}}\n\n', END, DONE)), False, 1),
        (Reply(chunked(DONE)), False, 0),
        (Reply(chunked()), False, 0),
        (plain(b"", status=b"204 No Content", head=b""), False, 0),
    ],
)
async def test_a_stream_that_ends_before_its_answer_is_an_error(
    upstream: UpstreamClient, reply: Reply, lost: bool, chunks: int
) -> None:
    seen = []

    async def ask(upstream: UpstreamClient, record: ModelRecord) -> None:
        async for block in PulledBlocks(await upstream.stream(record, {**BODY, "stream": True})):
            seen.extend(block)

    async with RawUpstream(reply) as server:
        failure = await error_of(upstream, a_model(server), ask)
        assert (failure.connection_lost, len(seen), len(server.bodies)) == (lost, chunks, 1)


@pytest.mark.parametrize("status", [b"300 Many", b"302 Found", b"304 Same", b"307 Elsewhere"])
async def test_no_redirect_is_followed(upstream: UpstreamClient, status: bytes) -> None:
    async with RawUpstream(WHOLE) as elsewhere, RawUpstream() as server:
        location = f"location: {elsewhere.url}\r\n".encode()
        server.script.append(plain(b"", head=location, status=status))
        for ask in (completion_of, stream_of):
            assert "redirect" in (await error_of(upstream, a_model(server), ask)).message
        assert elsewhere.connections == 0


async def test_a_huge_error_is_shortened_and_its_connection_closed(upstream: UpstreamClient) -> None:
    async with RawUpstream(plain(b'{"error": "' + b"x" * 2**20, status=b"400 Bad")) as server:
        for ask in (completion_of, stream_of):
            failure = await error_of(upstream, a_model(server), ask)
            assert (failure.status, len(failure.body or b"")) == (400, 16 * 2**10)
        await until(lambda: server.open == 0)


async def test_retry_after_is_kept_however_it_is_spelt(upstream: UpstreamClient) -> None:
    async with RawUpstream(
        plain(b"{}", head=b"Retry-After: 7\r\nRETRY-AFTER-MS: 7000\r\n", status=b"429 No")
    ) as server:
        failure = await error_of(upstream, a_model(server), completion_of)

    assert failure.headers == {"retry-after": "7", "retry-after-ms": "7000"}


@pytest.mark.parametrize(
    "reply",
    [
        Reply((b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + JSON,), "close"),
        plain(gzip.compress(JSON), head=b"content-encoding: gzip\r\n"),
        plain(head=b"x-long: " + b"y" * 30_000 + b"\r\n"),
        plain(head=b"content-type: application/json\r\n" + b"".join(b"x-%d: y\r\n" % each for each in range(100))),
        Reply((b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", *plain().pieces)),
        Reply(tuple(bytes((byte,)) for byte in plain().pieces[0])),
    ],
)
async def test_unusual_but_complete_responses_arrive_unchanged(upstream: UpstreamClient, reply: Reply) -> None:
    async with RawUpstream(reply) as server:
        assert await completion_of(upstream, a_model(server)) == JSON.replace(b"theirs", b"ours")


@pytest.mark.parametrize(
    "reply",
    [
        Reply((b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", CHUNK, END), "close"),
        Reply((STREAM_HEAD + b"content-encoding: gzip\r\n\r\n", gzip.compress(CHUNK + END)), "close"),
        Reply(chunked(b"\xef\xbb\xbf", CHUNK.replace(b"\n", b"\r\n"), END)),
        Reply(chunked(*(bytes((byte,)) for byte in CHUNK + END))),
        Reply(chunked(CHUNK, DONE)),
        Reply(chunked(b": ping\n\nevent: x\nid: 3\n\n", CHUNK, b"retry: 1\n\n", END[:-2])),
    ],
)
async def test_unusual_but_complete_streams_arrive_unchanged(upstream: UpstreamClient, reply: Reply) -> None:
    async with RawUpstream(reply) as server:
        found = await stream_of(upstream, a_model(server))

    whole_events = [each[6:].strip().replace(b"theirs", b"ours") for each in (CHUNK, END)]
    assert found == whole_events[: len(found)]
    assert found


async def test_events_that_are_read_together_come_in_one_block(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(CHUNK * 2000 + END))) as server:
        stream = PulledBlocks(await upstream.stream(a_model(server), {**BODY, "stream": True}))
        sizes = [len(block) async for block in stream]

    assert sum(sizes) == 2001
    assert len(sizes) < 200
