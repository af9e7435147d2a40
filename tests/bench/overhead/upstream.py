"""Serve OpenAI's format from prepared bytes, at next to no cost.

`python -m tests.bench.overhead.upstream RECORDS [CERTIFICATE]` prints its port and serves until its stdin is closed,
with TLS if it has a certificate. upstream.c does the same without TLS, and is used where there is a compiler.
`write_answers` makes the records for both.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.overhead.bodies import read_records, write_record
from tests.support.tls import served_by

CHUNKS = 50
USAGE = {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 20}
_BASE = {"id": "chatcmpl-bench", "created": 1_700_000_000, "model": "bench", "system_fingerprint": "fp_bench"}
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def plain() -> bytes:
    """Return an answer of fifty words."""
    message = {"role": "assistant", "content": "word " * CHUNKS}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return _whole({**_BASE, "object": "chat.completion", "choices": [choice], "usage": USAGE})


def embeddings(dimensions: int = 1_536) -> bytes:
    """Return an answer of one vector."""
    item = {"object": "embedding", "index": 0, "embedding": [round(0.9 / (n + 1), 9) for n in range(dimensions)]}
    usage = {"prompt_tokens": 20, "total_tokens": 20}
    return _whole({"object": "list", "data": [item], "model": "bench", "usage": usage})


def _whole(document: Mapping[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def events(chunks: int = CHUNKS) -> list[bytes]:
    """Return events as OpenAI sends them: the role, the words, the end, the usage, [DONE]."""
    base = {**_BASE, "object": "chat.completion.chunk"}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        *({"content": "word "} for _ in range(chunks)),
    ]
    parts = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    parts.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    parts.append({**base, "choices": [], "usage": USAGE})
    return [b"data: %s\n\n" % json.dumps(event).encode() for event in parts] + [b"data: [DONE]\n\n"]


def write_answers(path: Path, whole: bytes | None = None) -> Path:
    """Write the whole answer, then the writes of a stream: the first with its head, the last with its end."""
    first, *others = [b"%x\r\n%s\r\n" % (len(event), event) for event in events()]
    with path.open("wb") as file:
        for record in (whole or plain(), _STREAM_HEAD + first, *others[:-1], others[-1] + b"0\r\n\r\n"):
            write_record(file, record)
    return path


class Answering(asyncio.Protocol):
    """Answer requests one after another on a kept-alive connection. Only what decides the answer is read of a body."""

    def __init__(self, records: list[bytes]) -> None:
        self._plain, *self._events = records
        self._received = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            body_at, head = end + 4, self._received[:end].lower()
            if b"transfer-encoding:" in head:
                last = self._received.find(b"\r\n0\r\n\r\n", end)
                whole = last + 7 if last >= 0 else sys.maxsize
            else:
                at = head.find(b"content-length:")
                whole = body_at + (int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0)
            if len(self._received) < whole:
                return
            body, self._received = self._received[body_at:whole], self._received[whole:]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' in body or b'"stream": true' in body:
            asyncio.get_running_loop().create_task(self._stream(_pace_s(body)))
        else:
            self._transport.write(self._plain)

    async def _stream(self, pace_s: float) -> None:
        for event in self._events:
            if self._transport.is_closing():
                return
            self._transport.write(event)
            await asyncio.sleep(pace_s)


def _pace_s(body: bytes) -> float:
    pace = re.search(rb'"pace-(\d+)', body)
    return int(pace[1]) / 1000 if pace else 0.0


async def serve(records: list[bytes], certificate: Path | None) -> None:
    loop = asyncio.get_running_loop()
    tls = served_by(certificate) if certificate else None
    server = await loop.create_server(lambda: Answering(records), "127.0.0.1", 0, backlog=4096, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(read_records(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
