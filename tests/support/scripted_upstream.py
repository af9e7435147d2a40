"""Serve a scripted model: real HTTP on loopback, OpenAI's chat completions, a queue of responses and a history."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tests.support.scripted_answers import Json, Skill, Step, chunks, completion, newest_user_text, sse


@dataclass
class Received:
    """Hold one request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: Json
    at: float = field(default_factory=time.monotonic)
    raw: bytes = b""
    """What `body` was parsed from."""
    answered: bool = False
    client_left: threading.Event = field(default_factory=threading.Event)
    """The client closed the connection before the answer was complete."""


class ScriptedUpstream:
    """Serve the answers of `script`; when it is empty `skill` answers. One request a connection."""

    def __init__(self, skill: Skill = lambda _: "Hello from the scripted model.", *, slow_s: float = 0.0) -> None:
        self.skill = skill
        self.skill_of_body: Callable[[Json], str] | None = None
        """Answers in place of `skill`, where more than the newest text counts."""
        self.slow_s = slow_s
        self.refuses: Callable[[Json], bool] = lambda _: False
        """Bodies that are answered with a 400."""
        self.script: deque[Step] = deque()
        self.always: Step | None = None
        self.skill_by_path: dict[str, Json] = {}
        """Whole answers of other APIs, where nothing is scripted."""
        self.history: list[Received] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def last(self) -> Received:
        return self.history[-1]

    def then(self, *steps: Step) -> None:
        self.script.extend(steps)

    def reset(self) -> None:
        """Clear the history and the script."""
        self.script.clear()
        self.history.clear()
        self.always = None
        self.skill_by_path = {}

    def start(self) -> ScriptedUpstream:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(60)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def __enter__(self) -> ScriptedUpstream:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)

    async def _shut(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._exchange(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await _read(reader)
        self.history.append(received)
        step = self.script.popleft() if self.script else self._standing(received.path)
        if self.refuses(received.body):
            step = Step(status=400, body={"error": {"message": "unsupported value"}})
        watch = asyncio.create_task(_watch(reader, received))
        try:
            if step.hang:
                await watch
            elif step.drop:
                writer.transport.abort()
            elif step.flood:
                await _flood(writer, received, step)
            else:
                await self._answer(writer, received, step)
        except ConnectionError:  # a failed write may tell of it first, and then the watch is cancelled
            received.client_left.set()
            raise
        finally:
            watch.cancel()

    def _standing(self, path: str) -> Step:
        if path in self.skill_by_path:
            return Step(body=self.skill_by_path[path])
        return self.always or Step(delay_s=self.slow_s)

    def _words(self, body: Json) -> str:
        return self.skill(newest_user_text(body)) if self.skill_of_body is None else self.skill_of_body(body)

    async def _answer(self, writer: asyncio.StreamWriter, received: Received, step: Step) -> None:
        await asyncio.sleep(step.delay_s)
        if received.body.get("stream") and step.status == 200 and step.body is None:
            await _stream(writer, received, step, self._words(received.body))
            return
        body = step.body
        if body is None:
            body = completion(received.body, step, self._words(received.body))
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(_head(step, "application/json", len(raw)) + raw)
        await writer.drain()
        received.answered = True


async def _stream(writer: asyncio.StreamWriter, received: Received, step: Step, words: str) -> None:
    writer.write(_head(step, "text/event-stream", None))
    await writer.drain()
    sent = 0
    async for event in _paced(_events(received.body, step, words), step.drip_s):
        if step.cut_after is not None and sent >= step.cut_after:
            transport = writer.transport
            transport.abort()
            return
        writer.write(event)
        await writer.drain()
        sent += 1
        if received.client_left.is_set():
            return
    received.answered = True


async def _flood(writer: asyncio.StreamWriter, received: Received, step: Step) -> None:
    writer.write(_head(step, "application/json", None))
    while not received.client_left.is_set():
        writer.write(b" " * 2**20)
        await writer.drain()


def _events(body: Json, step: Step, words: str) -> Iterator[bytes]:
    source: Iterable[Json | bytes] = chunks(body, step, words) if step.events is None else step.events
    yield from (sse(event) for event in source)
    if step.done:
        yield b"data: [DONE]\n\n"


async def _paced(events: Iterator[bytes], drip_s: float) -> AsyncIterator[bytes]:
    for event in events:
        yield event
        if drip_s:
            await asyncio.sleep(drip_s)


def _head(step: Step, content_type: str, length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {step.status} Scripted", f"content-type: {content_type}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in step.headers.items()]
    if length is not None:
        lines.append(f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(path=head[0].split(" ")[1], headers=headers, body=json.loads(raw or b"{}"), raw=raw)


async def _watch(reader: asyncio.StreamReader, received: Received) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1024):
            pass
    if not received.answered:
        received.client_left.set()
