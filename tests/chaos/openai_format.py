from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from tests.chaos.questions import Json, Question

EVENT_STREAM, JSON, HTML = "text/event-stream", "application/json", "text/html; charset=utf-8"
DONE = b"data: [DONE]\n\n"


class Reply(Protocol):
    """Write one HTTP answer."""

    async def head(
        self, content_type: str, *, status: int = 200, length: int | None = None, headers: Mapping[str, str] = ...
    ) -> None: ...

    async def send(self, data: bytes) -> None: ...

    async def end(self) -> None:
        """End the body; the connection may be used again."""

    async def until_gone(self) -> None:
        """Wait until the client has closed its connection."""

    def abort(self) -> None:
        """Drop the connection."""


@dataclass
class Exchange:
    """Hold one request and how it is to be answered."""

    question: Question
    model: str
    upstream_name: str
    stream: bool
    reply: Reply
    whole: Callable[[], None]
    """To be called before the last bytes of a whole answer."""
    rng: Random = field(default_factory=Random)

    @property
    def usage(self) -> Json:
        return self.question.usage(self.model)

    @property
    def text(self) -> str:
        return self.question.answer(self.model)


def content(exchange: Exchange) -> Iterator[bytes]:
    """Yield the role, and the text in two pieces or more."""
    yield event(chunk(exchange, {"role": "assistant", "content": ""}))
    text = exchange.text
    size = max(8, min(len(text) // 2, 48 if len(text) < 10_000 else 1000))
    for start in range(0, len(text), size):
        yield event(chunk(exchange, {"content": text[start : start + size]}))


def completion(exchange: Exchange) -> Json:
    message = {"role": "assistant", "content": exchange.text}
    choices = [choice("message", message, "stop")]
    return {**frame(exchange), "object": "chat.completion", "choices": choices, "usage": exchange.usage}


def chunk(exchange: Exchange, delta: Json, finish_reason: str | None = None) -> Json:
    return {**frame(exchange), "object": "chat.completion.chunk", "choices": [choice("delta", delta, finish_reason)]}


def choice(part: str, content: Json, finish_reason: str | None) -> Json:
    return {"index": 0, part: content, "finish_reason": finish_reason}


def frame(exchange: Exchange) -> Json:
    return {"id": f"chatcmpl-{exchange.question.id}", "created": 1_700_000_000, "model": exchange.upstream_name}


def error(message: str) -> Json:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"
