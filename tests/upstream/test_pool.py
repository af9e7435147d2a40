from __future__ import annotations

import asyncio
import gzip
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from proxy.upstream import pool as pool
from proxy.upstream.pool import (
    ConnectionClosed,
    ConnectionPool,
    HTTP11Connection,
    IncompleteResponse,
    Origin,
    ProxyError,
    RemoteProtocolError,
)
from tests.support.connection_pool import HEAD, all_slots_are_free, at, send_request, serve_connect_proxy, served
from tests.support.raw_upstream import JSON, RawUpstream, Reply, plain
from tests.support.tls import a_certificate, served_by
from tests.support.waiting import until

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
PACKED = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n"
OTHER = plain(b"other").pieces[0]
TUNNEL_OPENED = b"HTTP/1.1 200 OK\r\n\r\n"
MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def connections(certificate: Path) -> AsyncIterator[ConnectionPool]:
    """Allow two connections at once."""
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    opened = ConnectionPool(2, lambda _: ssl.create_default_context(cafile=certificate))
    yield opened
    await opened.aclose()


async def test_ten_requests_share_two_connections_though_some_are_cancelled(connections: ConnectionPool) -> None:
    async with RawUpstream(plain()) as server:
        asking = [asyncio.create_task(send_request(connections, at(server))) for _ in range(10)]
        await asyncio.sleep(0)
        for waiting in asking[3:9:2]:
            waiting.cancel()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert found.count((200, JSON)) == 7
        assert server.connections == 2
        await all_slots_are_free(connections, at(server))


@pytest.mark.parametrize("tls", [False, True])
async def test_a_cancelled_request_releases_its_slot_at_any_moment(
    connections: ConnectionPool, certificate: Path, tls: bool
) -> None:
    async with RawUpstream(plain(), tls=served_by(certificate) if tls else None) as server:
        origin = at(server, tls=tls)
        for turns in range(25):
            asking = [asyncio.create_task(send_request(connections, origin)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for one in asking[::-1] if turns % 2 else asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await all_slots_are_free(connections, origin)
        await connections.aclose()
        await until(lambda: server.open == 0)


async def test_requests_get_slots_in_order_of_arrival(certificate: Path) -> None:
    connections = ConnectionPool(1, lambda _: ssl.create_default_context())
    async with RawUpstream(plain()) as server:
        first = await connections.acquire(at(server), 1)
        await first.send(HEAD, b"{}")
        await first.wait_for_head()
        await until(lambda: first.ended)
        waiting = asyncio.create_task(send_request(connections, at(server)))
        await asyncio.sleep(0)
        connections.release(at(server), first)
        connections.discard(await connections.acquire(at(server), 1))
        assert (waiting.done(), server.connections) == (True, 1)


async def test_an_idle_connection_of_another_origin_is_closed_to_free_a_slot(connections: ConnectionPool) -> None:
    async with RawUpstream(plain()) as one, RawUpstream(plain()) as two, RawUpstream(plain()) as three:
        for server in (one, two, three):
            await send_request(connections, at(server))
        await until(lambda: (one.open, two.open, three.open) == (0, 1, 1))


async def test_an_idle_connection_is_closed_in_time(
    connections: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(pool, "SWEEP_INTERVAL_S", 0.02)
    async with RawUpstream(plain()) as server:
        for _ in range(2):
            await send_request(connections, at(server))
            await until(lambda: server.open == 0)
        assert server.connections == 2


async def test_a_connection_released_after_the_pool_closed_is_closed(connections: ConnectionPool) -> None:
    async with RawUpstream(plain()) as server:
        connection = await connections.acquire(at(server), 1)
        await connection.send(HEAD, b"{}")
        await until(lambda: connection.reusable)
        await connections.aclose()
        connections.release(at(server), connection)
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("extra", [OTHER, b"H", b"\r\n"])
async def test_bytes_on_an_idle_connection_close_it(connections: ConnectionPool, extra: bytes, seen: bool) -> None:
    writers = []

    async def handle(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(plain().pieces[0])
        await reader.read()

    async with served(handle) as origin:
        assert await send_request(connections, origin) == (200, JSON)
        os.write(writers[0].get_extra_info("socket").fileno(), extra)  # at once
        if seen:
            await asyncio.sleep(0.02)
        assert await send_request(connections, origin) == (200, JSON)
        assert len(writers) == 2


@pytest.mark.parametrize("more", [OTHER, OTHER[:20], b"H", b'{"more": 1}'])
async def test_bytes_after_a_response_are_not_the_next_response(connections: ConnectionPool, more: bytes) -> None:
    async with RawUpstream(Reply((plain().pieces[0] + more,)), plain()) as server:
        for _ in range(2):
            assert await send_request(connections, at(server)) == (200, JSON)
        assert server.connections == 2


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED + b"content-length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi!",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhi",
        b"HTTP/1.1 101 Over\r\n\r\n",
        CHUNKED + b"\r\n-2\r\nhi\r\n0\r\n\r\n",
        CHUNKED + b"\r\n" + b"f" * 17 + b"\r\nhi",
        CHUNKED + b"\r\n3\r\nhi\r\n0\r\n\r\n",
        PACKED + b"\r\n" + gzip.compress(b"hi", mtime=0) + b"more",
    ],
)
async def test_a_response_of_ambiguous_length_is_rejected(connections: ConnectionPool, head: bytes) -> None:
    async with RawUpstream(Reply((head,), "hang")) as server:
        with pytest.raises(RemoteProtocolError):
            await send_request(connections, at(server))
        await until(lambda: server.open == 0)


async def test_a_body_without_length_that_is_reset_is_incomplete(connections: ConnectionPool) -> None:
    async with RawUpstream(Reply((b"HTTP/1.1 200 OK\r\n\r\nhalf",), "reset")) as server:
        with pytest.raises(IncompleteResponse):
            await send_request(connections, at(server))


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 1000),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000),
        (CHUNKED + b"\r\n2\r\nhi\r\n0\r\nx: ", b"y" * 1000),
        (CHUNKED + b"\r\n2\r\nhi\r\n0\r\n", b"x: y\r\n" * 1000),
        (CHUNKED + b"\r\n2;x=", b"y" * 1000),
        (PACKED + b"\r\n" + gzip.compress(b"", mtime=0)[:10], b"\0\0\0\xff\xff" * 1000),
    ],
    ids=["header", "headers", "hints", "trailer", "trailers", "extension", "empty blocks"],
)
async def test_an_endless_response_without_a_body_is_rejected(
    connections: ConnectionPool, first: bytes, again: bytes
) -> None:
    async def handle(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(again)
            await writer.drain()

    async with served(handle) as origin:
        with pytest.raises(RemoteProtocolError):
            await send_request(connections, origin)


@pytest.mark.parametrize("chunk", [2000, MIB])
async def test_a_small_response_that_decompresses_to_a_huge_one_is_returned_in_small_pieces(
    connections: ConnectionPool, chunk: int
) -> None:
    packed = gzip.compress(bytes(30 * MIB))
    parts = [packed[start : start + chunk] for start in range(0, len(packed), chunk)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    whole = CHUNKED + b"content-encoding: gzip\r\n\r\n" + body + b"0\r\n\r\n"
    async with RawUpstream(Reply((whole,))) as server:
        connection = await connections.acquire(at(server), 5)
        await connection.send(HEAD, b"{}")
        sizes = []
        while piece := await connection.read():
            sizes.append(len(piece))
        connections.release(at(server), connection)

        assert (sum(sizes), max(sizes)) == (30 * MIB, pool.DECOMPRESSED_PIECE_BYTES)
        assert await send_request(connections, at(server)) == (200, bytes(30 * MIB))
        assert server.connections == 1


class Sink:
    """Take a body as it is fed, a piece at a time."""

    def __init__(self, connection: HTTP11Connection, *, greedy: bool = False) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[Exception | None] = []
        self._connection = connection
        self._greedy = greedy

    def on_data(self, piece: bytes) -> None:
        self.pieces.append(piece)
        if not self._greedy:
            self._connection.hold()

    def on_end(self, error: Exception | None) -> None:
        self.ends.append(error)

    async def all(self) -> tuple[bytes, list[Exception | None]]:
        """Feed until the end."""
        async with asyncio.timeout(60):
            while not self.ends:
                self._connection.feed(self)
                await asyncio.sleep(0)
        return b"".join(self.pieces), self.ends


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("packed", [False, True])
async def test_a_body_that_is_fed_is_the_same_however_often_it_is_held(
    connections: ConnectionPool, greedy: bool, packed: bool
) -> None:
    plain_body = os.urandom(300_000) + bytes(2 * MIB)
    body, head = (gzip.compress(plain_body), b"content-encoding: gzip\r\n") if packed else (plain_body, b"")
    parts = [body[start : start + 30_000] for start in range(0, len(body), 30_000)]
    pieces = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    async with RawUpstream(Reply((CHUNKED + head + b"\r\n", *pieces, b"0\r\n\r\n"))) as server:
        for _ in range(2):
            connection = await connections.acquire(at(server), 5)
            await connection.send(HEAD, b"{}")
            await connection.wait_for_head()
            sink = Sink(connection, greedy=greedy)
            assert await sink.all() == (plain_body, [None])
            assert max(map(len, sink.pieces)) <= 2 * pool.MAX_UNREAD_BYTES
            connections.release(at(server), connection)

        assert server.connections == 1


async def test_a_body_that_breaks_off_is_fed_up_to_there(connections: ConnectionPool) -> None:
    async with RawUpstream(Reply((CHUNKED + b"\r\n4\r\nhalf\r\n",), "reset")) as server:
        connection = await connections.acquire(at(server), 5)
        await connection.send(HEAD, b"{}")
        await connection.wait_for_head()
        body, (error,) = await Sink(connection).all()
        connections.discard(connection)

    assert (body, type(error)) == (b"half", IncompleteResponse)


async def test_a_body_whose_sink_holds_is_read_no_further_than_the_bound(connections: ConnectionPool) -> None:
    async def handle(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (32 * MIB))
        for piece in [bytes(MIB)] * 32:
            writer.write(piece)
            await writer.drain()

    async with served(handle) as origin:
        connection = await connections.acquire(origin, 1)
        await connection.send(HEAD, b"{}")
        await connection.wait_for_head()
        sink = Sink(connection)
        connection.feed(sink)
        await until(lambda: connection._reading_paused)
        assert connection._unread <= 2 * pool.MAX_UNREAD_BYTES
        assert await sink.all() == (bytes(32 * MIB), [None])
        connections.discard(connection)


async def test_a_large_body_is_read_only_as_fast_as_its_reader(connections: ConnectionPool) -> None:
    sent = asyncio.Event()

    async def handle(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (32 * MIB))
        for piece in [bytes(MIB)] * 32:
            writer.write(piece)
            await writer.drain()
        sent.set()

    async with served(handle) as origin:
        connection = await connections.acquire(origin, 1)
        await connection.send(HEAD, b"{}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent.wait(), 0.5)
        size = 0
        while piece := await connection.read():
            size += len(piece)
        connections.discard(connection)
        assert (size, sent.is_set()) == (32 * MIB, True)


@pytest.mark.parametrize("head", [b"content-length: 5\r\n", b""], ids=["stays", "ends"])
@pytest.mark.parametrize("status", [413, 200])
async def test_a_response_before_the_request_was_sent_is_read(
    connections: ConnectionPool, head: bytes, status: int
) -> None:
    """The upstream reads nothing of the body; and its connection, with half a request on it, is not used again."""
    over = asyncio.Event()
    heads = []

    async def handle(request_head: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(request_head)
        await asyncio.sleep(0.05)  # until all that fits is on the way
        writer.write(b"HTTP/1.1 %d Early\r\n%s\r\nlarge" % (status, head))
        if not head:
            writer.write_eof()
        await over.wait()

    async with served(handle) as origin:
        for _ in range(2):
            assert await send_request(connections, origin, bytes(30 * MIB)) == (status, b"large")
        over.set()
        assert len(heads) == 2


async def test_a_tunnel_through_a_proxy_is_reused(connections: ConnectionPool, certificate: Path) -> None:
    heads = []

    async def handle(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        await serve_connect_proxy(head, reader, writer)

    async with RawUpstream(plain(), tls=served_by(certificate)) as server, served(handle) as proxy:
        origin = at(server, f"http://me:p%40ss@127.0.0.1:{proxy.port}", tls=True)
        for _ in range(2):
            assert await send_request(connections, origin) == (200, JSON)
        assert heads == [
            b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nproxy-authorization: Basic bWU6cEBzcw==\r\n\r\n"
            % (server.port, server.port)
        ]
        assert not any(b"authorization" in head for head in server.heads)


async def test_a_tunnel_to_another_server_is_rejected_by_its_certificate(
    connections: ConnectionPool, tmp_path: Path
) -> None:
    other = served_by(a_certificate(tmp_path))
    async with RawUpstream(plain(), tls=other) as server, served(serve_connect_proxy) as proxy:
        with pytest.raises(ssl.SSLCertVerificationError):
            await send_request(connections, at(server, f"http://127.0.0.1:{proxy.port}", tls=True))
        assert server.heads == []


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (Reply((b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n",), "hang"), ProxyError),
        (Reply((b"220 mail ready\r\n",), "hang"), ProxyError),
        (Reply((TUNNEL_OPENED + b"and more",), "hang"), ProxyError),
        (Reply((), "close"), ConnectionClosed),
        (Reply((), "hang"), TimeoutError),
        (Reply((TUNNEL_OPENED,), "hang"), TimeoutError),
        (Reply((TUNNEL_OPENED,), "close"), OSError),
    ],
    ids=["refusal", "nonsense", "more than the way", "end", "silence", "silence on the way", "end on the way"],
)
async def test_a_proxy_that_opens_no_tunnel_is_an_error(
    connections: ConnectionPool, reply: Reply, fault: type[Exception]
) -> None:
    async with RawUpstream(reply) as proxy, RawUpstream(plain()) as server:
        for _ in range(3):
            with pytest.raises(fault):
                await connections.acquire(Origin("far.invalid", 443, True, f"http://127.0.0.1:{proxy.port}"), 0.1)
        await until(lambda: proxy.open == 0)
        await all_slots_are_free(connections, at(server))
