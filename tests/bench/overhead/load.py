"""Generate load cheaply: prepared requests over kept-alive connections, and the times of every answer.

`run` measures with load.c where there is a compiler, else with the Python version below, which takes more CPU.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from tests.bench.overhead.bodies import PLACEHOLDER, read_records

GRACE_S = 20.0
CHUNKED, UNTIL_CLOSED = -1.0, math.inf
# Pieces that surely hold the last seven bytes: each has one or more.
_TAIL = 8
# How the last event of a stream begins: of chat, and of the Messages and Responses APIs.
_ENDS = (b"\ndata: [DONE]", b"\nevent: message_stop", b"\nevent: response.completed")
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Job:
    port: int
    requests: str
    """A file of whole requests, sent in turn."""
    connections: int = 16
    seconds: float = 3.0
    warm_s: float = 0.3
    """Before them; not timed and not counted."""
    rate: float = 0.0
    """Requests a second, sent whatever is answered; 0: each connection sends its next when the last is answered."""
    most: int = 0
    """Requests after which it ends early; 0: none."""
    fewest_events: int = 0
    """Of a stream: with fewer, or without its end, it has failed. 0: answers are no streams."""
    seed: int = 0

    @property
    def arguments(self) -> list[str]:
        values = (self.port, self.requests, self.connections, self.seconds, self.warm_s, self.rate, self.most)
        return [str(value) for value in (*values, self.fewest_events, self.seed)]


@dataclass
class Measured:
    requests: int = 0
    """All that were sent, those of the warm-up and those that failed included."""
    counted: int = 0
    """Answered well within the seconds."""
    failed: int = 0
    events: int = 0
    """Of those counted."""
    seconds: float = 0.0
    times_s: list[float] = field(default_factory=list)
    """Per request, from sending (open loop: from when it was due) to its last byte."""
    first_s: list[float] = field(default_factory=list)
    """To the first event of a stream, or the first byte of a body."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests failed."""
    sample: str = ""
    """How the first failed answer begins."""


class Connection(asyncio.Protocol):
    """Send one request at a time. Pieces are kept as they come, and read when the last one seems to be there."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._pieces: list[bytes] = []
        self._received = 0
        self._needed: float | None = None
        self._response: asyncio.Future[bytes | None] | None = None
        self._first = b""
        self.first_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    async def ask(self, request: bytes, first: bytes) -> bytes | None:
        """Return the raw answer, None if it was broken off. `first`: what its first byte or event begins with."""
        self._pieces, self._received, self._needed = [], 0, None
        self.first_at, self._first = 0.0, first
        self._response = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._response

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._received += len(data)
        if not self.first_at and self._first in (data if len(self._pieces) == 1 else b"".join(self._pieces)):
            self.first_at = time.perf_counter()
        if self._needed is None:
            self._needed = length_of(b"".join(self._pieces))
        if self._needed == CHUNKED:
            whole = b"".join(self._pieces[-_TAIL:]).endswith(b"\r\n0\r\n\r\n")
        else:
            whole = self._needed is not None and self._received >= self._needed
        if whole:
            self._end(b"".join(self._pieces))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(b"".join(self._pieces) if self._needed == UNTIL_CLOSED and exc is None else None)

    def _end(self, received: bytes | None) -> None:
        if self._response and not self._response.done():
            self._response.set_result(received)

    @property
    def closed(self) -> bool:
        return bool(self._transport.is_closing())


def length_of(received: bytes) -> float | None:
    """Return the length of the answer with its head, or how its end is known. None while the head is incomplete."""
    head, parted, _ = received.partition(b"\r\n\r\n")
    if not parted:
        return None
    head = head.lower()
    if b"\r\ntransfer-encoding:" in head:
        return CHUNKED
    at = head.find(b"\r\ncontent-length:")
    return len(head) + 4 + int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else UNTIL_CLOSED


def body_of(received: bytes) -> bytes:
    """Return the body without framing."""
    head, _, body = received.partition(b"\r\n\r\n")
    if b"\r\ntransfer-encoding:" not in head.lower():
        return body
    chunks, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))].split(b";")[0], 16):
        chunks.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(chunks)


class Load:
    def __init__(self, job: Job, clock: Callable[[], float] = time.perf_counter) -> None:
        self.job, self.clock = job, clock
        self.measured = Measured()
        self._reasons: Counter[str] = Counter()
        self._requests = _marked(read_records(Path(job.requests)), job.seed)
        self._started = self._warm_until = self._stop_at = 0.0

    async def measure(self) -> Measured:
        job = self.job
        free = [await _opened(job.port) for _ in range(job.connections)]
        self._started = self.clock()
        self._warm_until = self._started + job.warm_s
        self._stop_at = self._warm_until + job.seconds
        work = self._open_loop(free) if job.rate else asyncio.gather(*map(self._closed_loop, free))
        try:
            await asyncio.wait_for(work, job.warm_s + job.seconds + GRACE_S)
        except TimeoutError:
            self._fail("not answered", b"")
        self.measured.reasons = dict(self._reasons)
        ended = self.clock()
        self.measured.seconds = (ended if job.most or ended < self._stop_at else self._stop_at) - self._warm_until
        return self.measured

    async def _closed_loop(self, connection: Connection) -> None:
        while self.clock() < self._stop_at and not self._enough():
            connection = await self._one(connection, self.clock())

    async def _open_loop(self, free: list[Connection]) -> None:
        """Use the connections that are free, so that a slow answer delays no other request."""
        running: set[asyncio.Task[None]] = set()

        async def one(due: float) -> None:
            free.append(await self._one(free.pop() if free else await _opened(self.job.port), due))

        for number in count():
            due = self._started + number / self.job.rate
            if due >= self._stop_at or self._enough():
                break
            if (wait := due - self.clock()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    def _enough(self) -> bool:
        return 0 < self.job.most <= self.measured.requests

    async def _one(self, connection: Connection, since: float) -> Connection:
        """Send one request and return the connection to use next."""
        self.measured.requests += 1
        answer = await connection.ask(next(self._requests), b"\ndata:" if self.job.fewest_events else b"\r\n\r\n")
        self._note(answer, since, connection.first_at, self.clock())
        closing = answer is None or connection.closed or b"\r\nconnection: close" in answer[:2_000].lower()
        return await _opened(self.job.port) if closing else connection

    def _note(self, answer: bytes | None, since: float, first_at: float, at: float) -> None:
        if answer is None or not answer.startswith(b"HTTP/1.1 200"):
            return self._fail("broken off" if answer is None else "status", answer or b"")
        events = self._events(answer) if self.job.fewest_events else 0
        if events < self.job.fewest_events:
            return self._fail("too few events", answer)
        if since >= self._warm_until:
            self.measured.times_s.append(at - since)
            self.measured.first_s.append(first_at - since)
        if self._warm_until <= at <= self._stop_at:
            self.measured.counted += 1
            self.measured.events += events
        return None

    def _events(self, answer: bytes) -> int:
        """Count events, 0 without the last. Chunks seldom cut an event: they are joined if something is missing."""
        return self._counted(answer) or self._counted(b"\n" + body_of(answer))

    def _counted(self, text: bytes) -> int:
        events = text.count(b"\ndata:")
        ended = any(end in text for end in _ENDS)
        return events if ended and events >= self.job.fewest_events else 0

    def _fail(self, reason: str, answer: bytes) -> None:
        self.measured.failed += 1
        self._reasons[reason] += 1
        self.measured.sample = self.measured.sample or answer[:300].decode("utf-8", "replace")


def _marked(requests: list[bytes], seed: int) -> Iterator[bytes]:
    parted = [request.split(PLACEHOLDER.encode()) for request in requests]
    words = map(_letters, count(seed))
    for pieces in islice(cycle(parted), seed % len(parted), None):
        between = [b"", *islice(words, len(pieces) - 1)]
        yield b"".join(part for pair in zip(between, pieces, strict=True) for part in pair)


def _letters(number: int) -> bytes:
    scattered, found = number * 92821000003 % 26 ** len(PLACEHOLDER), bytearray()
    for _ in PLACEHOLDER:
        scattered, digit = divmod(scattered, 26)
        found.append(_LETTERS[digit])
    return bytes(found)


async def _opened(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def job_of(arguments: list[str]) -> Job:
    kinds: tuple[Callable[[str], Any], ...] = (int, str, int, float, float, float, int, int, int)
    return Job(*(kind(value) for kind, value in zip(kinds, arguments, strict=True)))


if __name__ == "__main__":
    import uvloop

    print(json.dumps(asdict(uvloop.run(Load(job_of(sys.argv[1:])).measure()))))  # noqa: T201
