"""Streams from an upstream's socket to a client's, through all of the server in between."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.app import create_app
from proxy.routing.chat_request import ChatRequest
from proxy.server.dependencies import AppState
from proxy.server.protocol import HTTPExchange
from proxy.server.streaming import ChatEventWriter
from proxy.storage.snapshot import build_state
from proxy.storage.state_reader import StoredState
from proxy.upstream.client import UpstreamClient
from proxy.upstream.pool import MAX_UNREAD_BYTES
from tests.bench.request_parts import open_parts
from tests.support.connection_pool import served as answering
from tests.support.exchanges import Recording, served
from tests.support.makers import a_record, snapshot_inputs
from tests.support.raw_upstream import DONE, END, STREAM_HEAD, RawUpstream, Reply, chunked
from tests.support.waiting import until

MIB = 2**20
# Our own protocol serves the first itself, and leaves the second to ASGI.
WAYS = {"own": "/v1/chat/completions", "asgi": "/chat/completions"}
PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"]


@asynccontextmanager
async def gateway(port: int, folder: Path, **settings: float) -> AsyncIterator[tuple[Any, AppState]]:
    """Serve the model `ours`, for which an upstream answers at this port."""
    params = {
        "model": "openai/theirs",
        "api_base": f"http://127.0.0.1:{port}/v1",
        "api_key": "os.environ/MODEL_API_KEY",
    }
    record = replace(a_record("ours"), litellm_params=params)
    stored = StoredState(version=1, models={"ours": record}, profiles={}, keys_exist=False)
    state = build_state(stored, snapshot_inputs(), keys_latched=False)
    nothing: Any = None
    async with AsyncExitStack() as closing:
        services = open_parts(folder, nothing, state, closing)
        services = replace(services, settings=services.settings.model_copy(update=settings))
        upstream = UpstreamClient(services.settings, {"MODEL_API_KEY": "sk-x"})
        closing.push_async_callback(upstream.aclose)
        upstream.set_models(state.models)
        services = replace(services, upstream=upstream)
        app: Any = create_app(services)
        async with served(app.serve_exchange, app) as address:
            yield address, services


def request_of(path: str) -> bytes:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    if path == "/v1/responses":
        asked = {"input": "hi", "store": False}
    elif path == "/v1/completions":
        asked = {"prompt": "hi"}
    body = json.dumps({"model": "ours", "stream": True, **asked}).encode()
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", "connection: close"]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


async def body_of(reader: asyncio.StreamReader) -> bytes:
    """Read a whole answer, and return its body."""
    async with asyncio.timeout(60):
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        body = bytearray()
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            assert await reader.readline() == b"\r\n"
    return bytes(body)


async def ask(address: Any, path: str = WAYS["own"]) -> bytes:
    reader, writer = await asyncio.open_connection(*address[:2], limit=MIB)
    writer.write(request_of(path))
    try:
        return await body_of(reader)
    finally:
        writer.close()


def event(text: str) -> bytes:
    chunk = {"id": "c", "model": "theirs", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def events_of(body: bytes) -> list[Any]:
    """Return the data of all events but [DONE] and comments."""
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def texts_of(body: bytes) -> list[str]:
    choices = [choice for each in events_of(body) for choice in each.get("choices", ())]
    return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]


def requests() -> set[int]:
    return {id(each) for each in gc.get_objects() if type(each) is ChatRequest}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "pieces",
    [
        [STREAM_HEAD + b"\r\n" + event("Hello"), event(" you") + END + DONE],
        [STREAM_HEAD + b"\r\n" + event("Hello"), event(" you")],
        [b"HTTP/1.1 400 No\r\ncontent-length: 2\r\n\r\n{}"],
        [b"no HTTP"],
    ],
    ids=["complete", "broken", "refused", "garbage"],
)
async def test_a_request_is_freed_at_its_end_without_a_garbage_collection(
    path: str, pieces: list[bytes], tmp_path: Path
) -> None:
    """A body may have megabytes, and a collection of what is old comes rarely."""

    async def in_pieces(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    async with answering(in_pieces) as origin, gateway(origin.port, tmp_path) as (address, _):
        gc.collect()
        gc.disable()
        try:
            before = requests()
            reader, writer = await asyncio.open_connection(*address[:2], limit=MIB)
            writer.write(request_of(path))
            async with asyncio.timeout(60):
                assert await reader.read()
            writer.close()
            await until(lambda: requests() <= before)
        finally:
            gc.enable()


@pytest.mark.parametrize("way", WAYS)
async def test_a_slow_client_gets_every_byte_in_order_and_holds_up_the_model(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "write_timeout_s", 60.0)
    texts = [f"{number} " + "x" * 3000 for number in range(12_000)]
    written = 0

    async def flood(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(STREAM_HEAD + b"\r\n")
        for text in texts:
            writer.write(event(text))
            await writer.drain()
            written += 1
        writer.write(END + DONE)

    async with answering(flood) as origin, gateway(origin.port, tmp_path) as (address, services):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.connect(address)
        reader, writer = await asyncio.open_connection(sock=client, limit=16_384)
        writer.write(request_of(WAYS[way]))
        await until(lambda: bool(Recording.opened) and Recording.opened[0].flow.write_paused)
        seen = -1
        while seen != written:
            seen = written
            await asyncio.sleep(0.2)
        assert written < len(texts)
        assert Recording.opened[0].transport.get_write_buffer_size() <= 2 * MAX_UNREAD_BYTES
        assert services.upstream.memory.used_bytes == 0
        body = await body_of(reader)
        writer.close()

    assert texts_of(body) == texts
    assert body.endswith(DONE)


@pytest.mark.parametrize("path", PATHS)
async def test_a_model_that_sends_one_byte_at_a_time_is_relayed_as_any_other(path: str, tmp_path: Path) -> None:
    stream = b"".join(map(event, ["The", " capital", ' is "Paris"', "\n", "é", "."])) + END + DONE
    whole, bytewise = chunked(stream), chunked(*(bytes((byte,)) for byte in stream))
    async with RawUpstream(Reply(whole), Reply(bytewise)) as server, gateway(server.port, tmp_path) as (address, _):
        bodies = [events_of(await ask(address, path)) for _ in range(2)]

    assert [same_but_ids(each) for each in bodies[:1]] == [same_but_ids(each) for each in bodies[1:]]
    assert "Paris" in json.dumps(bodies[0])


def same_but_ids(value: Any) -> Any:
    """Return an answer without what differs between two answers alike."""
    if isinstance(value, dict):
        return {
            name: same_but_ids(inner)
            for name, inner in value.items()
            if name not in ("id", "item_id", "created", "created_at")
        }
    return [same_but_ids(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("then", ["reset", "close"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_stream_that_breaks_after_content_ends_with_one_error(way: str, then: Any, tmp_path: Path) -> None:
    pieces = chunked(*map(event, ["So", " far", ", so good"]), end=b"")
    async with RawUpstream(Reply(pieces, then)) as server, gateway(server.port, tmp_path) as (address, services):
        body = await ask(address, WAYS[way])
        await until(lambda: server.open == 0)

    assert "".join(texts_of(body)) == "So far, so good"
    assert [list(each) for each in events_of(body)[-2:]] == [["id", "model", "choices"], ["error"]]
    assert endings(services) == {"broken": 1}


def endings(services: AppState) -> dict[str, int]:
    """Return how requests have ended."""
    found: dict[str, int] = {}
    for (_, _, ending), series in services.metrics.requests.own().items():
        found[ending] = found.get(ending, 0) + int(series.numbers[0])
    return found


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_client_that_leaves_as_a_chunk_is_written_closes_the_upstreams_connection(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_now = HTTPExchange.write_now
    written: list[bytes] = []

    def leave(exchange: HTTPExchange, data: bytes) -> bool:
        written.append(data)
        sent = write_now(exchange, data)
        if len(written) == 3:
            exchange._protocol.transport.abort()
            if at_once:
                exchange.disconnect.set()
        return sent

    monkeypatch.setattr(HTTPExchange, "write_now", leave)
    pieces = chunked(*(event(f"{number} ") for number in range(50)), end=b"")
    async with RawUpstream(Reply(pieces, "hang")) as server, gateway(server.port, tmp_path) as (address, services):
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await ask(address)
        await until(lambda: (server.open, endings(services)) == (0, {"client_gone": 1}))


@pytest.mark.parametrize("after_content", [True, False])
async def test_a_failure_of_ours_is_on_record_as_a_failure_and_not_as_a_client_that_left(
    after_content: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("what went wrong inside")

    if after_content:
        monkeypatch.setattr(ChatEventWriter, "encode", fail)
    else:
        monkeypatch.setattr(UpstreamClient, "stream", fail)
    pieces = chunked(event("some "), event("text"), DONE)
    async with RawUpstream(Reply(pieces)) as server, gateway(server.port, tmp_path) as (address, services):
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError, AssertionError)):
            await ask(address)
        await until(lambda: endings(services) == {"broken" if after_content else "failed": 1})


@pytest.mark.parametrize("way", WAYS)
async def test_a_silence_is_measured_from_the_last_chunk(way: str, tmp_path: Path) -> None:
    async def drip(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"\r\n")
        for number in range(6):
            writer.write(event(f"{number} "))
            await asyncio.sleep(0.2)
        while True:  # what says nothing ends no silence
            writer.write(b": still here\n\n")
            await writer.drain()
            await asyncio.sleep(0.1)

    async with answering(drip) as origin, gateway(origin.port, tmp_path, idle_timeout_s=0.6) as (address, _):
        body = await ask(address, WAYS[way])

    assert texts_of(body) == [f"{number} " for number in range(6)]
    assert "silent for 0.6 s" in events_of(body)[-1]["error"]["message"]


async def test_a_silent_stream_is_kept_alive_between_its_chunks(tmp_path: Path) -> None:
    pieces = chunked(event("So"), end=b"")
    async with (
        RawUpstream(Reply(pieces, "hang")) as server,
        gateway(server.port, tmp_path, keep_alive_s=0.1, idle_timeout_s=0.9) as (address, _),
    ):
        body = await ask(address)

    assert body.count(b": keep-alive\n\n") >= 2
    assert texts_of(body) == ["So"]
