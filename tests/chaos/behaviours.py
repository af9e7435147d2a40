from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random

from tests.chaos.openai_format import (
    DONE,
    EVENT_STREAM,
    HTML,
    JSON,
    Exchange,
    choice,
    chunk,
    completion,
    content,
    error,
    event,
    frame,
)

EMPTY_ANSWER = "no word"
FLOOD_BYTES = 256 * 2**20
_PAGE = b"<html><head><title>Bad gateway</title></head><body><h1>Something went wrong</h1></body></html>"


class Gone(Exception):
    """Break off an answer on purpose."""


Behave = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Behaviour:
    name: str
    weight: float
    behave: Behave
    reports: bool = True
    """Whether a whole answer says its usage."""


async def _whole(exchange: Exchange) -> None:
    await _answer(exchange)


async def _drips(exchange: Exchange) -> None:
    await _answer(exchange, pause_s=0.05, most_pauses=20)


async def _thinks(exchange: Exchange) -> None:
    """Send headers at once, and the first content after the proxy has begun to send comments."""
    if exchange.stream:
        await exchange.reply.head(EVENT_STREAM)
        await exchange.reply.send(event(chunk(exchange, {"role": "assistant", "content": ""})))
    await asyncio.sleep(exchange.rng.uniform(1.2, 2.2))
    await _answer(exchange, begun=True)


async def _without_done(exchange: Exchange) -> None:
    await _answer(exchange, done=b"")


async def _without_usage(exchange: Exchange) -> None:
    await _answer(exchange, usage=False)


async def _dies_at_once(exchange: Exchange) -> None:
    _die(exchange)


async def _dies_after_its_headers(exchange: Exchange) -> None:
    await exchange.reply.head(EVENT_STREAM if exchange.stream else JSON)
    await asyncio.sleep(0.01)
    _die(exchange)


async def _dies_midway(exchange: Exchange) -> None:
    await _part(exchange)
    _die(exchange)


async def _ends_midway(exchange: Exchange) -> None:
    """End a cut text with a clean end."""
    await _part(exchange)
    await exchange.reply.end()


async def _errs_midway(exchange: Exchange) -> None:
    await _part(exchange)
    await exchange.reply.send(event(error("the engine ran out of memory")))
    await exchange.reply.end()


async def _babbles_midway(exchange: Exchange) -> None:
    await _part(exchange)
    await exchange.reply.send(b"data: {not json at all\n\n")
    await exchange.reply.end()


async def _stalls_midway(exchange: Exchange) -> None:
    await _part(exchange)
    await exchange.reply.until_gone()


async def _says_nothing(exchange: Exchange) -> None:
    await exchange.reply.until_gone()


async def _floods(exchange: Exchange) -> None:
    """Send a nearly endless body without meaning."""
    await exchange.reply.head(JSON)
    for _ in range(FLOOD_BYTES // 2**18):
        await exchange.reply.send(b" " * 2**18)
    await exchange.reply.end()


async def _floods_with_chunks(exchange: Exchange) -> None:
    """Send chunk after chunk, none with content."""
    await exchange.reply.head(EVENT_STREAM)
    for _ in range(20_000):
        await exchange.reply.send(event(chunk(exchange, {})))
    await exchange.reply.end()


async def _is_busy(exchange: Exchange) -> None:
    await _refuse(exchange, 429, json.dumps(error("slow down")).encode(), headers={"retry-after": "1"})


async def _fails(exchange: Exchange) -> None:
    await _refuse(exchange, 500, json.dumps(error("internal")).encode())


async def _fails_in_html(exchange: Exchange) -> None:
    await _refuse(exchange, 503, _PAGE, content_type=HTML)


async def _succeeds_in_html(exchange: Exchange) -> None:
    await _refuse(exchange, 200, _PAGE, content_type=HTML)


async def _errs_in_a_200(exchange: Exchange) -> None:
    await _refuse(exchange, 200, json.dumps(error("quota exceeded")).encode(), headers={"retry-after": "1"})


async def _sends_no_body(exchange: Exchange) -> None:
    await _refuse(exchange, 200, b"", content_type=EVENT_STREAM if exchange.stream else JSON)


async def _answers_nothing(exchange: Exchange) -> None:
    """Send a proper answer without a word in it, and without usage."""
    if not exchange.stream:
        body = {**completion(exchange), "choices": [choice("message", {"role": "assistant", "content": ""}, "stop")]}
        del body["usage"]
        exchange.whole()
        await _refuse(exchange, 200, json.dumps(body).encode())
        return
    await exchange.reply.head(EVENT_STREAM)
    exchange.whole()
    await exchange.reply.send(event(chunk(exchange, {}, "stop")) + DONE)
    await exchange.reply.end()


BEHAVIOURS = (
    Behaviour("answers", 70, _whole),
    Behaviour("drips", 4, _drips),
    Behaviour("thinks first", 2, _thinks),
    Behaviour("answers without [DONE]", 2, _without_done),
    Behaviour("answers without usage", 2, _without_usage, reports=False),
    Behaviour("dies before a byte", 4, _dies_at_once),
    Behaviour("dies after its headers", 2, _dies_after_its_headers),
    Behaviour("dies midway", 4, _dies_midway),
    Behaviour("ends midway", 3, _ends_midway),
    Behaviour("error midway", 2, _errs_midway),
    Behaviour("no JSON midway", 1, _babbles_midway),
    Behaviour("stalls midway", 1, _stalls_midway),
    Behaviour("says nothing", 1, _says_nothing),
    Behaviour("floods", 0.2, _floods),
    Behaviour("floods with chunks", 0.3, _floods_with_chunks),
    Behaviour("429 with retry-after", 4, _is_busy),
    Behaviour("500", 4, _fails),
    Behaviour("503 in HTML", 1, _fails_in_html),
    Behaviour("200 in HTML", 1, _succeeds_in_html),
    Behaviour("error in a 200", 2, _errs_in_a_200),
    Behaviour("no body", 1, _sends_no_body),
    Behaviour(EMPTY_ANSWER, 1, _answers_nothing, reports=False),
)


# Weights by name. The faults of `quick` cost no waiting.
MIXES: Mapping[str, Mapping[str, float]] = {
    "chaos": {behaviour.name: behaviour.weight for behaviour in BEHAVIOURS},
    "quick": {"answers": 94.0, "dies midway": 2.0, "ends midway": 2.0, "500": 2.0},
}


def drawn(rng: Random, mix: Mapping[str, float]) -> Behaviour:
    known = {behaviour.name: behaviour for behaviour in BEHAVIOURS}
    return known[rng.choices(list(mix), list(mix.values()))[0]]


async def _answer(
    exchange: Exchange,
    *,
    pause_s: float = 0.0,
    most_pauses: int = 0,
    begun: bool = False,
    usage: bool = True,
    done: bytes = DONE,
) -> None:
    if not exchange.stream:
        body = completion(exchange)
        if not usage:
            del body["usage"]
        exchange.whole()
        await _refuse(exchange, 200, json.dumps(body).encode())
        return
    if not begun:
        await exchange.reply.head(EVENT_STREAM)
    for place, piece in enumerate(content(exchange)):
        if place < most_pauses:
            await asyncio.sleep(pause_s)
        await exchange.reply.send(piece)
    last = event(chunk(exchange, {}, "stop"))
    if usage:
        last += event({**frame(exchange), "object": "chat.completion.chunk", "choices": [], "usage": exchange.usage})
    exchange.whole()
    await exchange.reply.send(last + done)
    await exchange.reply.end()


async def _part(exchange: Exchange) -> None:
    """Return some of the answer. Of a body that is no stream, too little to be JSON."""
    if not exchange.stream:
        raw = json.dumps(completion(exchange)).encode()
        await exchange.reply.head(JSON)
        await exchange.reply.send(raw[: len(raw) // 2])
        return
    pieces = list(content(exchange))
    await exchange.reply.head(EVENT_STREAM)
    for piece in pieces[: exchange.rng.randint(1, len(pieces) - 1)]:
        await exchange.reply.send(piece)


async def _refuse(
    exchange: Exchange,
    status: int,
    body: bytes,
    *,
    content_type: str = JSON,
    headers: Mapping[str, str] | None = None,
) -> None:
    await exchange.reply.head(content_type, status=status, length=len(body), headers=headers or {})
    await exchange.reply.send(body)
    await exchange.reply.end()


def _die(exchange: Exchange) -> None:
    exchange.reply.abort()
    raise Gone
