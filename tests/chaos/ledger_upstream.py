"""Serve a model that keeps a ledger: `python -m tests.chaos.ledger_upstream --port 9001 --ledger FILE --seed 7`.

OpenAI's chat completions over HTTP/1.1 with kept connections. How each request is answered is drawn from the seed, the
question, the model and how often this process was asked the same; `--mix` names the table that it is drawn from.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType

from tests.chaos.behaviours import MIXES, Behaviour, Gone, drawn
from tests.chaos.ledger import Ledger
from tests.chaos.openai_format import Exchange
from tests.chaos.questions import Json, Question, question_in
from tests.support.scripted_answers import newest_user_text

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
MAX_HEAD = 2**16


class HttpReply:
    """Write over one connection, chunked if no length is given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._chunked = False
        self.ended = False

    async def head(
        self,
        content_type: str,
        *,
        status: int = 200,
        length: int | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        self._chunked = length is None
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        lines = [f"HTTP/1.1 {status} Said", f"content-type: {content_type}", framing]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def send(self, data: bytes) -> None:
        if data:
            self._writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
            await self._writer.drain()

    async def end(self) -> None:
        if self._chunked:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        self.ended = True

    async def until_gone(self) -> None:
        while await self._reader.read(1024):
            pass
        raise Gone

    def abort(self) -> None:
        self._writer.transport.abort()


class LedgerUpstream:
    def __init__(self, ledger: Ledger, seed: int, mix: str) -> None:
        self._ledger = ledger
        self._seed = seed
        self._mix = MIXES[mix]
        self._requests: Counter[tuple[str, str]] = Counter()

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=MAX_HEAD, backlog=512)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(Gone, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            reply = HttpReply(reader, writer)
            while (body := await _read(reader)) is not None:
                await self._answer(body, reply)
                if not reply.ended:
                    break
                reply.ended = False
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _answer(self, body: Json, reply: HttpReply) -> None:
        question = question_in(newest_user_text(body))
        if question is None:
            raise Gone
        upstream_name = str(body["model"])
        model = upstream_name.removesuffix("-upstream")
        behaviour, rng = self._behaviour(question, model)
        usage = question.usage(model) if behaviour.reports else None
        attempt = self._ledger.began(question.id, model, behaviour.name, usage)
        exchange = Exchange(
            question, model, upstream_name, bool(body.get("stream")), reply, lambda: self._ledger.whole(attempt), rng
        )
        await behaviour.behave(exchange)

    def _behaviour(self, question: Question, model: str) -> tuple[Behaviour, Random]:
        self._requests[question.id, model] += 1
        rng = Random(f"{self._seed}/{question.id}/{model}/{self._requests[question.id, model]}")
        return drawn(rng, self._mix), rng


async def _read(reader: asyncio.StreamReader) -> Json | None:
    """Return the body of the next request; None if no other comes."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    except asyncio.IncompleteReadError:
        return None
    lengths = [line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:")]
    body: Json = json.loads(await reader.readexactly(int(lengths[0])))
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mix", choices=list(MIXES), default="chaos")
    arguments = parser.parse_args()
    upstream = LedgerUpstream(Ledger(arguments.ledger), arguments.seed, arguments.mix)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(upstream.serve(arguments.port))


if __name__ == "__main__":
    main()
