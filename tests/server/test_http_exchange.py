"""An exchange on a connection of our own, over real sockets: bodies, slow readers, clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from proxy.errors import APIError, BodyTimeout, ClientDisconnected
from proxy.server.disconnects import cancel_on_disconnect
from proxy.server.exchange import Exchange, read_body
from tests.support.exchanges import POST, Recording, framed, read_answer, served
from tests.support.waiting import until

JSON = {"content-type": "application/json"}


async def echo(exchange: Exchange) -> None:
    """Answer with the size of the body, or with the status of what was wrong with it."""
    try:
        body = await read_body(exchange, 10**6, read_timeout_s=0.3)
    except ClientDisconnected:
        return
    except APIError as error:
        await exchange.send(408 if isinstance(error, BodyTimeout) else 413, JSON, b'"refused"')
        return
    await exchange.send(200, JSON, json.dumps(len(body)).encode())


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, HIGH_WATER_LIMIT, HIGH_WATER_LIMIT + 1, 900_000])
async def test_bodies_of_every_size_leave_the_connection_ready_for_the_next(size: int, chunked: bool) -> None:
    async with served(echo) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            writer.write(framed(b"x" * size, chunked=chunked))
            assert await read_answer(reader) == (b"200", b"%d" % size)
        writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_rest_of_a_refused_body_is_not_taken_for_the_next_request(chunked: bool) -> None:
    inner = b"\r\n\r\n" + POST + b"content-length: 0\r\n\r\n"
    body = inner * (1_500_000 // len(inner))
    async with served(echo) as address:
        reader, writer = await asyncio.open_connection(*address)
        raw = framed(body, chunked=chunked)
        writer.write(raw[: len(raw) // 2])
        if not chunked:  # as its length says
            assert await read_answer(reader) == (b"413", b'"refused"')
        writer.write(raw[len(raw) // 2 :])
        if chunked:
            assert await read_answer(reader) == (b"413", b'"refused"')
        writer.write(framed(b"{}"))
        assert await read_answer(reader) == (b"200", b"2")
        writer.close()


async def test_a_body_that_stops_is_answered_and_may_go_on() -> None:
    async with served(echo) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"x" * 1000)[:-10])
        assert await read_answer(reader) == (b"408", b'"refused"')
        writer.write(b"x" * 10 + framed(b"{}"))
        assert await read_answer(reader) == (b"200", b"2")
        writer.close()


async def test_a_body_that_nobody_reads_is_held_up() -> None:
    go_on = asyncio.Event()

    async def wait_first(exchange: Exchange) -> None:
        await go_on.wait()
        await echo(exchange)

    async with served(wait_first) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"x" * 900_000))
        await until(lambda: bool(Recording.opened) and Recording.opened[0].flow.read_paused)
        await asyncio.sleep(0.05)
        held: Any = Recording.opened[0].cycle
        assert len(held.body) <= HIGH_WATER_LIMIT + 256 * 1024
        go_on.set()
        assert await read_answer(reader) == (b"200", b"900000")
        writer.close()


@pytest.mark.parametrize("size", [10, HIGH_WATER_LIMIT - 200, HIGH_WATER_LIMIT + 1, 300_000, 900_000])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_leaves_is_noticed_however_long_its_body_was(size: int, reset: bool) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        await asyncio.Event().wait()

    async def wait_for_ever(exchange: Exchange) -> None:
        await read_body(exchange, 10**6)
        with pytest.raises(ClientDisconnected):
            await cancel_on_disconnect(exchange, work())
        ended.set()

    async with served(wait_for_ever) as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"x" * size))
        await asyncio.wait_for(began.wait(), 60)
        if reset:
            client = writer.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 60)


async def test_a_client_that_does_not_read_a_stream_is_cut_off() -> None:
    async def flood(exchange: Exchange) -> None:
        assert exchange.disconnect is not None
        await exchange.begin(200, JSON)
        while not exchange.disconnect.is_set:
            await exchange.write(b"x" * 65536)

    async with served(flood) as address:
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(framed(b"{}"))
            await until(lambda: bool(Recording.opened) and Recording.opened[0].disconnect.is_set)


async def test_a_client_that_does_not_read_the_rest_of_an_answer_that_broke_off_is_cut_off() -> None:
    async def break_off(exchange: Exchange) -> None:
        Recording.opened[0].transport.set_write_buffer_limits(high=2**25)  # writing does not wait
        await exchange.begin(200, JSON)
        await exchange.write(b"x" * 2**24)

    async with served(break_off) as address:
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(framed(b"{}"))
            await until(lambda: bool(Recording.opened) and Recording.opened[0].disconnect.is_set)


async def test_a_whole_answer_of_many_megabytes_waits_for_its_reader_in_pieces() -> None:
    body = bytes(range(256)) * 2**16  # 16 MiB

    async def large(exchange: Exchange) -> None:
        await exchange.send(200, JSON, body)

    async with served(large) as address:
        reader, writer = await asyncio.open_connection(*address, limit=2**20)
        writer.write(framed(b"{}"))
        await until(lambda: bool(Recording.opened) and Recording.opened[0].flow.write_paused)
        assert Recording.opened[0].transport.get_write_buffer_size() <= 2**20
        assert await read_answer(reader) == (b"200", body)
        writer.close()


async def test_an_answer_that_cannot_be_sent_may_still_be_replaced_by_an_error() -> None:
    async def fail_once(exchange: Exchange) -> None:
        with pytest.raises(ValueError, match="control character"):
            await exchange.begin(200, {"x-odd": "a\r\nx-injected: b"})
        with pytest.raises(ValueError, match="control character"):
            await exchange.send(200, {"x-odd": "\x00"}, b"{}")
        assert not exchange.started
        await exchange.send(500, JSON, b'"failed"')

    async with served(fail_once) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"{}"))
        assert await read_answer(reader) == (b"500", b'"failed"')
        writer.close()


async def test_what_is_written_behind_the_end_of_an_answer_reaches_nobody() -> None:
    async def write_late(exchange: Exchange) -> None:
        await exchange.send(200, JSON, b'"first"')
        await exchange.write(b"late")
        await exchange.end(b"later")

    async with served(write_late) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(2):
            writer.write(framed(b"{}"))
            assert await read_answer(reader) == (b"200", b'"first"')
        writer.close()


async def test_an_answer_that_breaks_off_closes_its_connection() -> None:
    async def break_off(exchange: Exchange) -> None:
        await exchange.begin(200, JSON)

    async with served(break_off) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"{}"))
        received = await asyncio.wait_for(reader.read(), 60)
        writer.close()

    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding: chunked" in head
    assert body == b""


async def test_the_answer_to_a_request_before_a_malformed_one_is_the_last() -> None:
    async def slow(exchange: Exchange) -> None:
        await read_body(exchange, 10**6)
        await asyncio.sleep(0.05)
        await exchange.send(200, JSON, b'"whole"')

    async with served(slow) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(b"{}") + b"\x00nonsense\r\n\r\n" + framed(b"{}"))
        assert await read_answer(reader) == (b"200", b'"whole"')
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_a_client_of_several_requests_that_leaves_is_written_to_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stream(exchange: Exchange) -> None:
        assert exchange.disconnect is not None
        await exchange.begin(200, JSON)
        while not exchange.disconnect.is_set:
            await exchange.write(b"x" * 1000)
            await asyncio.sleep(0)
        for _ in range(20):
            await exchange.write(b"x" * 1000)
        await exchange.end()

    with caplog.at_level(logging.WARNING):
        async with served(stream) as address:
            _, writer = await asyncio.open_connection(*address)
            writer.write(framed(b"{}") * 2)
            await until(lambda: bool(Recording.opened) and bool(Recording.opened[0].pipeline))
            writer.transport.abort()
            await until(lambda: Recording.opened[0].disconnect.is_set)

    assert caplog.messages == []


@pytest.mark.parametrize("between", [b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"\r\n", b""])
async def test_requests_of_both_ways_share_one_connection_in_order(between: bytes) -> None:
    async with served(echo) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write((framed(b"xy") + between + framed(b"x" * 100_000, chunked=True)) * 3)
        for _ in range(3):
            assert await read_answer(reader) == (b"200", b"2")
            if between.startswith(b"GET"):
                assert await read_answer(reader) == (b"204", b"")
            assert await read_answer(reader) == (b"200", b"100000")
        writer.close()


async def test_under_asgi_the_first_of_several_requests_notices_that_its_client_left() -> None:
    began, left = asyncio.Event(), asyncio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        began.set()
        assert (await receive())["type"] == "http.disconnect"
        left.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    async with served(echo, app) as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 2)
        await asyncio.wait_for(began.wait(), 60)
        writer.transport.abort()
        await asyncio.wait_for(left.wait(), 60)
