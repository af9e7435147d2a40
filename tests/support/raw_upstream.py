"""Serve exactly the given bytes from the test's own event loop, on connections that stay open."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections import deque
from dataclasses import dataclass
from typing import Literal, Self

JSON = b'{"id":"x","model":"theirs","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}]}'
CHUNK = b'data: {"model":"theirs","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
END = b'data: {"model":"theirs","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@dataclass(frozen=True)
class Reply:
    """Describe one answer, piece by piece, and what becomes of the connection."""

    pieces: tuple[bytes, ...]
    then: Literal["keep", "close", "reset", "hang"] = "keep"
    """hang: it waits for the client to leave."""


def plain(body: bytes = JSON, head: bytes = b"content-type: application/json\r\n", status: bytes = b"200 OK") -> Reply:
    return Reply((b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s" % (status, head, len(body), body),))


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> tuple[bytes, ...]:
    """Return a stream in chunked coding, each piece a chunk."""
    parts = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return (STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n", *parts, end)


class RawUpstream:
    """Serve the answers of `script`; the last is repeated."""

    def __init__(self, *script: Reply, tls: ssl.SSLContext | None = None) -> None:
        self.script = deque(script)
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.left = asyncio.Event()
        """The client closed a connection before its answer had ended."""
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls, limit=2**22)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; tell whether the connection stays."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        self.bodies.append(await reader.readexactly(length))
        self.heads.append(head)
        reply = self.script.popleft() if len(self.script) > 1 else self.script[0]
        for piece in reply.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if reply.then == "hang":
            await reader.read()
            self.left.set()
        elif reply.then == "reset":
            await asyncio.sleep(0.01)  # what was written is read first
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        return reply.then == "keep"
