"""Serve a model that bills: real HTTP on loopback, in four APIs, with a ledger of its own of every token it has served.

Prices are decimal numbers, and sums are whole picodollars: nothing of the product's own arithmetic is used. Words of a
prompt say how it is answered: `cached` reads a part of the prompt from a cache; of the models that `falters` is true
of, `broken` answers 500 and bills what it has done, `refused` answers 500 and bills nothing, `empty` bills an answer
without content.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Self

Json = dict[str, Any]

# Tokens of an answer.
OUTPUT = 137


@dataclass(frozen=True)
class Tariff:
    """USD for a million tokens."""

    prompt: Decimal
    cached: Decimal
    output: Decimal

    def model_info(self) -> Json:
        names = ("input_cost_per_token", "cache_read_input_token_cost", "output_cost_per_token")
        return {
            name: float(each / 10**6) for name, each in zip(names, (self.prompt, self.cached, self.output), strict=True)
        }


@dataclass(frozen=True)
class Served:
    """What one request was billed."""

    path: str
    fresh: int
    cached: int
    output: int
    picousd: int
    failed: bool
    streamed: bool


@dataclass
class BillingUpstream:
    tariff: Tariff
    falters: bool = False
    ledger: list[Served] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def picousd(self) -> int:
        return sum(served.picousd for served in self.ledger)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(60)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _shut(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = next(line for line in head.split("\r\n") if line.startswith("content-length:"))
            body: Json = json.loads(await reader.readexactly(int(length.partition(":")[2])))
            for part in self._answer(head.split(" ")[1], body):
                writer.write(part)
                await writer.drain()
        writer.close()

    def _answer(self, path: str, body: Json) -> Iterator[bytes]:
        """Answer, and write the ledger before the first byte."""
        text = json.dumps(body.get("messages") or body.get("input") or body.get("prompt") or "")
        trouble = next((word for word in ("broken", "refused", "empty") if self.falters and word in text), None)
        if trouble == "refused":
            return iter((_whole(500, {"error": {"message": "no"}}),))
        prompt = 40 + len(text)
        cached = prompt // 3 if "cached" in text else 0
        output = 0 if "embeddings" in path else OUTPUT
        rates = (self.tariff.prompt, self.tariff.cached, self.tariff.output)
        counts = (prompt - cached, cached, output)
        usd = sum((count * rate for count, rate in zip(counts, rates, strict=True)), Decimal(0)) / 10**6
        self.ledger.append(Served(path, *counts, int(usd * 10**12), trouble is not None, bool(body.get("stream"))))
        return _FORMATS[path.rpartition("/v1/")[2]](body, counts, trouble)


def _whole(status: int, body: Json) -> bytes:
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(raw), raw)


def _stream(events: list[Json], *, named: bool, last: bytes = b"") -> Iterator[bytes]:
    yield b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    for event in events:
        name = b"event: %b\n" % event["type"].encode() if named else b""
        yield b"%bdata: %b\n\n" % (name, json.dumps(event).encode())
    if last:
        yield last


def _chat(body: Json, counts: tuple[int, int, int], trouble: str | None) -> Iterator[bytes]:
    fresh, cached, output = counts
    usage = {
        "prompt_tokens": fresh + cached,
        "completion_tokens": output,
        "total_tokens": fresh + cached + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    frame = {"id": "c-1", "created": 1_700_000_000, "model": body["model"]}
    words = "" if trouble == "empty" else "It is so."
    if trouble == "broken":
        yield _whole(500, {"error": {"message": "broken"}, "usage": usage})
    elif body.get("stream"):
        chunk = {**frame, "object": "chat.completion.chunk"}
        yield from _stream(
            [
                {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": words}}]},
                {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
                {**chunk, "choices": [], "usage": usage},
            ],
            named=False,
            last=b"data: [DONE]\n\n",
        )
    else:
        message = {"role": "assistant", "content": words}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        yield _whole(200, {**frame, "object": "chat.completion", "choices": choices, "usage": usage})


def _messages(body: Json, counts: tuple[int, int, int], _: str | None) -> Iterator[bytes]:
    fresh, cached, output = counts
    usage = {"input_tokens": fresh, "cache_read_input_tokens": cached, "output_tokens": output}
    message = {"id": "m-1", "type": "message", "role": "assistant", "model": body["model"], "stop_sequence": None}
    block = {"type": "text", "text": "It is so."}
    if not body.get("stream"):
        yield _whole(200, {**message, "content": [block], "stop_reason": "end_turn", "usage": usage})
        return
    begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield from _stream(
        [
            {"type": "message_start", "message": begun},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": block["text"]}},
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": output},
            },
            {"type": "message_stop"},
        ],
        named=True,
    )


def _responses(body: Json, counts: tuple[int, int, int], _: str | None) -> Iterator[bytes]:
    fresh, cached, output = counts
    usage = {
        "input_tokens": fresh + cached,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": fresh + cached + output,
    }
    part = {"type": "output_text", "text": "It is so.", "annotations": [], "logprobs": []}
    item = {"id": "i-1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    base = {"id": "r-1", "object": "response", "created_at": 1, "model": body["model"], "error": None}
    whole = {**base, "status": "completed", "output": [item], "usage": usage}
    if not body.get("stream"):
        yield _whole(200, whole)
        return
    at = {"item_id": "i-1", "output_index": 0, "content_index": 0}
    events: list[Json] = [
        {"type": "response.created", "response": {**base, "status": "in_progress", "output": [], "usage": None}},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.output_text.delta", **at, "delta": part["text"], "logprobs": []},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]
    yield from _stream([{**event, "sequence_number": n} for n, event in enumerate(events)], named=True)


def _embeddings(body: Json, counts: tuple[int, int, int], _: str | None) -> Iterator[bytes]:
    tokens = counts[0] + counts[1]
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    yield _whole(200, {"object": "list", "data": data, "model": body["model"], "usage": usage})


_FORMATS = {
    "chat/completions": _chat,
    "messages": _messages,
    "responses": _responses,
    "embeddings": _embeddings,
}
