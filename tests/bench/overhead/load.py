"""A load generator that costs little: prepared requests over kept-alive connections, times of every answer.

`python -m tests.bench.overhead.load JOB` reads a job as JSON (`Job`) and prints a `Measured` as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    port: int
    bodies: str
    """A file of JSON bodies, one a line, sent in turn."""
    connections: int = 16
    seconds: float = 3.0
    rate: float = 0.0
    """Requests a second, sent whatever is answered; 0: each connection sends its next when the last is answered."""
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"
    most: int = 0
    """Requests after which it ends early; 0: none."""


@dataclass
class Measured:
    requests: int = 0
    failed: int = 0
    events: int = 0
    seconds: float = 0.0
    times_s: list[float] = field(default_factory=list)
    """Per request, from sending (open loop: from when it was due) to its last byte."""
    first_s: list[float] = field(default_factory=list)
    """To the first byte of its body."""


class Connection(asyncio.Protocol):
    """One request at a time; `done` is set with its outcome."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._done: asyncio.Future[bool] | None = None
        self.first_at = 0.0
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> bool:
        """Whether it was answered with 200, whole."""
        self._received, self.first_at, self.events = b"", 0.0, 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or len(self._received) <= end + 4:
            return
        if not self.first_at:
            self.first_at = time.perf_counter()
        head = self._received[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            whole = len(self._received) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        else:
            whole = self._received.endswith(b"\r\n0\r\n\r\n")
        if whole and self._done and not self._done.done():
            self.events = self._received.count(b"data: ")
            self._done.set_result(self._received.startswith(b"HTTP/1.1 200"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_result(False)

    @property
    def closed(self) -> bool:
        return bool(self._transport.is_closing())


async def measure(job: Job) -> Measured:
    requests = cycle(list(prepared(job)))
    measured = Measured()
    started = time.perf_counter()
    if job.rate:
        await _open_loop(job, requests, measured)
    else:
        await asyncio.gather(*(_closed_loop(job, requests, measured, started) for _ in range(job.connections)))
    measured.seconds = time.perf_counter() - started
    return measured


def prepared(job: Job) -> Iterator[bytes]:
    more = "".join(f"{name}: {value}\r\n" for name, value in job.headers.items())
    for body in Path(job.bodies).read_bytes().splitlines():
        head = (
            f"POST {job.path} HTTP/1.1\r\nhost: 127.0.0.1:{job.port}\r\ncontent-type: application/json\r\n"
            f"{more}content-length: {len(body)}\r\n\r\n"
        )
        yield head.encode() + body


async def _opened(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def _closed_loop(job: Job, requests: Iterator[bytes], measured: Measured, started: float) -> None:
    connection = await _opened(job.port)
    while time.perf_counter() - started < job.seconds and not (job.most and measured.requests >= job.most):
        if connection.closed:
            connection = await _opened(job.port)
        await _timed(connection, next(requests), time.perf_counter(), measured)


async def _open_loop(job: Job, requests: Iterator[bytes], measured: Measured) -> None:
    """Connections are taken from those that are free, so that a slow answer delays no other request."""
    free = [await _opened(job.port) for _ in range(job.connections)]
    running: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        connection = free.pop() if free else await _opened(job.port)
        await _timed(connection, next(requests), due, measured)
        if not connection.closed:
            free.append(connection)

    started = time.perf_counter()
    for number in range(int(job.rate * job.seconds)):
        due = started + number / job.rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _timed(connection: Connection, request: bytes, since: float, measured: Measured) -> None:
    answered = await connection.ask(request)
    measured.requests += 1
    if not answered:
        measured.failed += 1
        return
    measured.events += connection.events
    measured.times_s.append(time.perf_counter() - since)
    measured.first_s.append(connection.first_at - since)


if __name__ == "__main__":
    import uvloop

    print(json.dumps(asdict(uvloop.run(measure(Job(**json.loads(sys.argv[1])))))))  # noqa: T201
