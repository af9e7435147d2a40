"""A client's connection over real sockets: slow, large, too many. The app behind it echoes the request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest
import uvicorn

from proxy.server import protocol
from proxy.server.protocol import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_URL_BYTES,
    LimitedHTTPProtocol,
)
from proxy.server.requests import OVERLOADED
from tests.support.raw_http import Answer, send
from tests.support.waiting import until

GET = b"GET / HTTP/1.1\r\nhost: a\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\n"
UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"


class ShortTimeouts(LimitedHTTPProtocol):
    header_timeout_s = 0.3
    write_timeout_s = 0.3
    min_idle_s = 0.1


class Counting(LimitedHTTPProtocol):
    """Record what is written at once."""

    written: ClassVar[list[bytes]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = CountingTransport(transport, self.written)  # type: ignore[assignment]


class CountingTransport:
    def __init__(self, transport: asyncio.Transport, written: list[bytes]) -> None:
        self._transport, self._written = transport, written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def echo_request(scope: Any, receive: Any, send: Any) -> None:
    """Return the request as JSON, and 32 MiB more if the path is /large."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    names = [name.decode() for name, _ in scope["headers"]]
    text = json.dumps({"path": scope["path"], "body": body.decode(), "names": names, "crowded": scope.get(OVERLOADED)})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    if scope["path"] == "/late":
        await asyncio.sleep(0.01)
    for _ in range(512 if scope["path"] == "/large" else 0):
        await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": text.encode(), "more_body": False})


@asynccontextmanager
async def served(kind: type[LimitedHTTPProtocol] = LimitedHTTPProtocol) -> AsyncIterator[tuple[uvicorn.Server, Any]]:
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(echo_request, http=kind, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([bound]))
    await until(lambda: server.started)
    try:
        yield server, bound.getsockname()
    finally:
        server.should_exit = True
        await serving
        bound.close()


async def sent(address: Any, *pieces: bytes, wait_s: float = 0.3) -> list[Answer]:
    return await asyncio.to_thread(send, address, *pieces, wait_s=wait_s)


def echoed(answer: Answer) -> Any:
    """Return the body of a chunked answer of one chunk."""
    return json.loads(answer.body.split(b"\r\n")[1])


async def test_headers_that_do_not_end_are_answered_with_408() -> None:
    async with served(ShortTimeouts) as (_, address):
        (answer,) = await sent(address, GET + b"x-slow: ")

    assert (answer.status, answer.code, answer.closed) == (408, "request_timeout", True)


async def test_single_bytes_do_not_extend_the_time_for_headers() -> None:
    async with served(ShortTimeouts) as (server, address):
        reader, writer = await asyncio.open_connection(*address)
        for byte in (GET + b"x: " + b"y" * 1000)[:40]:
            writer.write(bytes((byte,)))
            await asyncio.sleep(0.02)
        reply = await asyncio.wait_for(reader.read(), 5)
        writer.close()

    assert reply.startswith(b"HTTP/1.1 408 ")
    assert not server.server_state.connections


@pytest.mark.parametrize("opening", [b"", b"\r\n\r\n"])
async def test_a_connection_without_a_request_is_closed(opening: bytes) -> None:
    async with served(ShortTimeouts) as (_, address):
        assert await sent(address, opening, wait_s=5) == []


async def test_the_head_of_a_response_is_written_with_the_first_of_its_body() -> None:
    Counting.written.clear()
    async with served(Counting) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        for path in (b"/", b"/late", b"/"):
            writer.write(GET.replace(b"/", path, 1) + b"\r\n")
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(GET.replace(b"GET", b"HEAD", 1) + b"connection: close\r\n\r\n")
        head = await reader.read()
        writer.close()

    starts = [data.partition(b"\r\n")[0] for data in Counting.written]
    assert [b"path" in data for data in Counting.written] == [True, False, True, True, False]
    assert [start.startswith(b"HTTP/1.1 200") for start in starts] == [True, True, False, True, True]
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")


async def test_the_next_request_of_a_connection_has_its_own_timeout() -> None:
    async with served(ShortTimeouts) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            writer.write(GET + b"\r\n")
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.2)
        writer.write(GET)
        late = await asyncio.wait_for(reader.read(), 5)
        writer.close()

    assert late.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    async with served(ShortTimeouts) as (server, address):
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(GET.replace(b"/", b"/large", 1) + b"\r\n")
            await until(lambda: len(server.server_state.connections) == 1)
            await until(lambda: not server.server_state.connections)
            await until(lambda: not server.server_state.tasks)


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414, "uri_too_long"),
        (b"GET /" + b"a" * 10**6, 414, "uri_too_long"),
        (GET + b"x: y\r\n" * MAX_HEADERS + b"\r\n", 431, "request_headers_too_large"),
        (GET + b"x: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n", 431, "request_headers_too_large"),
        (GET + (b"x: " + b"y" * 4000 + b"\r\n") * 20 + b"\r\n", 431, "request_headers_too_large"),
        (GET + b"x: " + b"y" * 10**6, 431, "request_headers_too_large"),
        (GET + b"x" * 10**6, 431, "request_headers_too_large"),
        (POST + b"transfer-encoding: chunked\r\n\r\n1;x=" + b"y" * 10**6, 431, "request_headers_too_large"),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 10**6, 431, "request_headers_too_large"),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 99999, 431, "request_headers_too_large"),
        (b"\r\n" * 10**5, 431, "request_headers_too_large"),
    ],
)  # fmt: skip
async def test_what_is_too_large_is_answered_and_not_buffered(raw: bytes, status: int, code: str) -> None:
    pieces = [raw[start : start + 20_000] for start in range(0, len(raw), 20_000)]
    async with served() as (_, address):
        (answer,) = await sent(address, *pieces)

    assert (answer.status, answer.code, answer.closed) == (status, code, True)
    assert answer.headers["x-request-id"]


async def test_the_largest_allowed_headers_are_served() -> None:
    headers = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 450) for n in range(MAX_HEADERS - 1))
    async with served() as (_, address):
        (answer,) = await sent(address, GET + headers + b"\r\n")

    assert answer.status == 200


async def test_trailers_are_not_headers() -> None:
    async with served() as (_, address):
        body = b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nauthorization: Bearer x\r\n\r\n"
        (answer,) = await sent(address, POST + body)

    assert echoed(answer) == {"path": "/", "body": "{}", "names": ["host", "transfer-encoding"], "crowded": None}


@pytest.mark.parametrize(
    "framing", [b"content-length: 2\r\n\r\n{}", b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("split", [0, 1, 2])
async def test_an_offer_of_another_protocol_is_ignored_and_its_body_is_read(framing: bytes, split: int) -> None:
    head, _, body = (POST + UPGRADE + framing).partition(b"\r\n\r\n")
    raw = head + b"\r\n\r\n" + body + GET.replace(b"/", b"/next", 1) + b"\r\n"
    cut = len(head) + 4 + split
    async with served() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(raw[:cut])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(raw[cut:])
        answers = [await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60) for _ in range(2)]
        writer.close()

    assert [b'"body": "{}"' in answers[0], b'"path": "/next"' in answers[1]] == [True, True]


async def test_a_malformed_request_never_writes_into_a_response() -> None:
    async with served() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET.replace(b"/", b"/large", 1) + b"\r\n")
        begun = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x00nonsense\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            begun += await asyncio.wait_for(reader.read(), 5)
        writer.close()

    assert begun.count(b"HTTP/1.1 ") == 1
    assert b"invalid_http_request" not in begun


async def test_too_many_connections_are_answered_and_idle_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "max_connections", lambda: 4)
    monkeypatch.setattr(protocol, "MAX_REJECTED", 2)
    async with served(ShortTimeouts) as (server, address):
        busy = [socket.create_connection(address) for _ in range(4)]
        for client in busy:
            client.sendall(POST + b"content-length: 9\r\n\r\n")
        await until(lambda: len(server.server_state.tasks) == 4)
        (crowded,) = await sent(address, GET + b"\r\n")
        lingering = [socket.create_connection(address) for _ in range(2)]
        dropped = await sent(address, GET + b"\r\n")
        for client in (*busy, *lingering):
            client.close()
        await until(lambda: not server.server_state.connections)
        idle = [socket.create_connection(address) for _ in range(4)]
        await until(lambda: len(server.server_state.connections) == 4)
        await asyncio.sleep(2 * ShortTimeouts.min_idle_s)
        (served_again,) = await sent(address, GET + b"\r\n")
        first_of_all = await asyncio.to_thread(idle[0].recv, 1)
        for client in idle:
            client.close()

    assert (echoed(crowded)["crowded"], dropped) == (True, [])
    assert echoed(served_again)["crowded"] is None
    assert first_of_all == b""
