from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from proxy.upstream.pool import BodySink, ConnectionPool, Origin
from tests.support.raw_upstream import RawUpstream

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"
Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def at(server: RawUpstream, proxy: str | None = None, *, tls: bool = False) -> Origin:
    return Origin("127.0.0.1", server.port, tls, proxy)


async def send_request(connections: ConnectionPool, origin: Origin, body: bytes = b"{}") -> tuple[int | None, bytes]:
    """Send a request and return status and body."""
    async with asyncio.timeout(60):
        connection = await connections.acquire(origin, 5)
        try:
            await connection.send(HEAD, body)
            await connection.wait_for_head()
            found = b""
            while piece := await connection.read():
                found += piece
            return connection.status, found
        finally:
            connections.release(origin, connection)


class FedInPieces:
    """Give a body to a sink piece by piece, as an UpstreamResponse does."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._left = [piece for piece in pieces if piece]
        self._sink: BodySink | None = None

    def feed(self, sink: BodySink) -> None:
        self._sink = sink
        while self._sink is not None and self._left:
            self._sink.on_data(self._left.pop(0))
        if self._sink is not None:
            self._sink.on_end(None)

    def hold(self) -> None:
        self._sink = None

    def close(self) -> None:
        self._left, self._sink = [], None

    finish = close


async def all_slots_are_free(connections: ConnectionPool, origin: Origin) -> None:
    """Check that two slots are free, and no third."""
    both = [await connections.acquire(origin, 1), await connections.acquire(origin, 1)]
    third = asyncio.create_task(connections.acquire(origin, 1))
    await asyncio.sleep(0.01)
    assert not third.done()
    for connection in both:
        connections.discard(connection)
    connections.discard(await third)


@asynccontextmanager
async def served(handle: Handler) -> AsyncIterator[Origin]:
    """Serve each connection with `handle`, which gets its first head, then close it."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(await reader.readuntil(b"\r\n\r\n"), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(lambda *ends: tasks.add(asyncio.create_task(serve(*ends))), "127.0.0.1", 0)
    try:
        yield Origin("127.0.0.1", server.sockets[0].getsockname()[1], False)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve_connect_proxy(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve as a small HTTP proxy that knows CONNECT alone. For `served`."""
    method, authority, _ = head.split(b" ", 2)
    assert method == b"CONNECT"
    host, _, port = authority.decode().rpartition(":")
    far_reader, far_writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
    finally:
        far_writer.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
    writer.close()
