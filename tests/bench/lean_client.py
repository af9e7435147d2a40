"""Send HTTP/1.1 over one kept connection, for load: it costs little beside what it measures. No TLS, no redirects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

_LAST_CHUNK = b"0\r\n\r\n"


class LeanClient:
    """Send one request at a time. A connection that was closed is opened again by the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Return status and body, the framing of a chunked one included. Raises OSError, IncompleteReadError."""
        reader = await self._sent(path, body, headers)
        head = await reader.readuntil(b"\r\n\r\n")
        whole = await _body(reader, head.lower())
        return int(head[9:12]), whole

    async def leave(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], *, bytes_read: int) -> None:
        """Send a request, read so much and disconnect."""
        reader = await self._sent(path, body, headers)
        if bytes_read:
            await reader.read(bytes_read)
        self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _sent(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> asyncio.StreamReader:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._streams
        raw = json.dumps(body).encode()
        all_headers = {
            "host": "127.0.0.1",
            "content-type": "application/json",
            "content-length": str(len(raw)),
            **headers,
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in all_headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        await writer.drain()
        return reader


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.partition(b":")[2]))
    pieces = []
    while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
        pieces.append(await reader.readexactly(size + 2))
    await reader.readexactly(2)
    return b"".join(pieces)
