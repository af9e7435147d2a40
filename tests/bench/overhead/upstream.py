"""A model server that costs next to nothing: OpenAI's format from prepared bytes.

`python -m tests.bench.overhead.upstream` prints its port and serves until its stdin is closed. Plain answers have 50
words, streams 50 chunks; a model name that ends in `-paced` streams one chunk per 20 ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

CHUNKS = 50
PACE_S = 0.02
WORDS = "word " * CHUNKS
USAGE = {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 20}
_BASE = {"id": "chatcmpl-bench", "created": 1_700_000_000, "model": "bench", "system_fingerprint": "fp_bench"}


def plain() -> bytes:
    message = {"role": "assistant", "content": WORDS}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    body = json.dumps({**_BASE, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def events() -> list[bytes]:
    """As OpenAI sends them: the role, the words, the end, the usage, [DONE]."""
    base = {**_BASE, "object": "chat.completion.chunk"}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        *({"content": "word "} for _ in range(CHUNKS)),
    ]
    shown = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    shown.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    shown.append({**base, "choices": [], "usage": USAGE})
    return [b"data: %s\n\n" % json.dumps(event).encode() for event in shown] + [b"data: [DONE]\n\n"]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PLAIN = plain()
EVENTS = [b"%x\r\n%s\r\n" % (len(event), event) for event in events()]
LAST = b"0\r\n\r\n"
STREAM = STREAM_HEAD + b"".join(EVENTS) + LAST


class Answering(asyncio.Protocol):
    """Requests one after another on a kept-alive connection; of a body only what decides the answer is looked at."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._received) < end + 4 + length:
                return
            body = self._received[end + 4 : end + 4 + length]
            self._received = self._received[end + 4 + length :]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(PLAIN)
        elif b"-paced" in body:
            asyncio.get_running_loop().create_task(self._pace())
        else:
            self._transport.write(STREAM)

    async def _pace(self) -> None:
        self._transport.write(STREAM_HEAD)
        for event in EVENTS:
            if self._transport.is_closing():
                return
            self._transport.write(event)
            await asyncio.sleep(PACE_S)
        self._transport.write(LAST)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve())
