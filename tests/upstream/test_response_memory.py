from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from proxy.errors import ResponseMemoryFull, ResponseTooLarge, UpstreamError
from proxy.json_text import MAX_VALUES, MAX_VALUES_AT_ONCE, SMALL_BYTES
from proxy.server.responses import render_error
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import CircuitBreakerSettings, Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from proxy.upstream.completion_reader import AnswerBody, CompletionReader
from proxy.upstream.health import HealthRegistry
from proxy.upstream.native_reader import NativeAnswerReader
from proxy.upstream.response_memory import HeldMemory, ResponseBounds, ResponseMemory
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import BODY, a_model, completion_of, error_of, stream_of
from tests.support.raw_upstream import CHUNK, DONE, END, JSON, STREAM_HEAD, RawUpstream, Reply, chunked, plain
from tests.support.waiting import until

MODES = pytest.mark.parametrize("mode", ["relay", "translate", "anthropic"])
KINDS = pytest.mark.parametrize("ask", [completion_of, stream_of])
GZIP = b"content-type: application/json\r\ncontent-encoding: gzip\r\n"
EVENT_STREAM = b"content-type: text/event-stream\r\n"


@pytest.fixture
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[UpstreamClient]:
    """Open a client with little memory, so that little is needed to fill it."""
    opened = UpstreamClient(Settings(max_answer_bytes=4_000_000, max_answers_in_flight_bytes=5_000_000), {})
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("mode", "relay") != "relay":
        await opened.ensure_litellm()
    yield opened
    await opened.aclose()


def by(mode: str, server: RawUpstream) -> ModelRecord:
    if mode == "anthropic":
        base = server.url.removesuffix("/v1")
        record = a_model(server, model="anthropic/theirs", api_base=base, api_key="sk-arm-key")
    elif mode == "azure":
        base = server.url.removesuffix("/v1")
        record = a_model(server, model="azure/theirs", api_base=base, api_key="sk-arm-key", api_version="2024-10-21")
    else:
        record = a_model(server, api_key="sk-arm-key")
    return replace(record, info=ModelInfo(free=True, forward="auto" if mode == "relay" else "translate"))


def holding(text: bytes) -> bytes:
    """Return a completion with one more member."""
    return JSON[:-1] + b',"more":' + text + b"}"


def event(text: bytes) -> bytes:
    return CHUNK.rstrip()[:-1] + b',"more":' + text + b"}\n\n"


def saying(ask: Any, text: bytes) -> Reply:
    """Return a whole answer, or a stream of which one event holds `text`."""
    return plain(holding(text)) if ask is completion_of else Reply(chunked(CHUNK, event(text), END, DONE))


@pytest.mark.parametrize("mode", ["relay", "translate", "anthropic", "azure"])
@KINDS
async def test_json_with_too_many_values_is_not_parsed(upstream: UpstreamClient, mode: str, ask: Any) -> None:
    async with RawUpstream(saying(ask, b"[" + b"[]," * 800_000 + b"1]")) as server:
        failure = await error_of(upstream, by(mode, server), ask)

        assert isinstance(failure, ResponseTooLarge)
        assert "values" in failure.message
    assert upstream.memory.used_bytes == 0


@MODES
@KINDS
async def test_json_that_is_nested_too_deeply_is_rejected(upstream: UpstreamClient, mode: str, ask: Any) -> None:
    async with RawUpstream(saying(ask, b"[" * 600 + b"1" + b"]" * 600)) as server:
        await error_of(upstream, by(mode, server), ask)


@MODES
@KINDS
@pytest.mark.parametrize("filling", [b" ", b"x"])
async def test_a_response_beyond_the_size_limit_is_rejected(
    upstream: UpstreamClient, mode: str, ask: Any, filling: bytes
) -> None:
    text = filling * 4_200_000 if filling == b" " else b'"' + filling * 4_200_000 + b'"'
    async with RawUpstream(saying(ask, text)) as server:
        failure = await error_of(upstream, by(mode, server), ask)

        assert isinstance(failure, ResponseTooLarge)
        assert "max_answer_bytes" in failure.message
    assert upstream.memory.used_bytes == 0


@MODES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_decompresses_beyond_the_limit_is_rejected(
    upstream: UpstreamClient, mode: str, stream: bool
) -> None:
    packed = gzip.compress(event(b'"' + b"x" * 50_000_000 + b'"') if stream else b" " * 50_000_000 + JSON)
    head = GZIP if not stream else EVENT_STREAM + b"content-encoding: gzip\r\n"
    async with RawUpstream(plain(packed, head)) as server:
        await error_of(upstream, by(mode, server), stream_of if stream else completion_of)
    assert upstream.memory.used_bytes == 0


@pytest.mark.parametrize("mode", ["relay", "translate"])
async def test_a_compressed_response_is_read(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(plain(gzip.compress(JSON), GZIP)) as server:
        assert json.loads(await completion_of(upstream, by(mode, server)))["choices"][0]["message"]["content"] == "hi"


@pytest.mark.parametrize("mode", ["relay", "translate"])
async def test_values_are_counted_per_event_and_not_over_all_events(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(Reply(chunked(CHUNK * (MAX_VALUES_AT_ONCE // 5), END, DONE))) as server:
        answer = json.loads(await completion_of(upstream, by(mode, server)))

    assert answer["choices"][0]["message"]["content"] == "hi" * (MAX_VALUES_AT_ONCE // 5)
    await until(lambda: upstream.memory.used_bytes == 0)


@pytest.mark.parametrize("mode", ["relay", "translate"])
@pytest.mark.parametrize(
    ("event", "why"),
    [
        (b'{"parts":[' + b"[]," * 20_000 + b"1]}", "values"),
        (b'{"content":"' + b"x" * 500_000 + b'"}', "max_answer_bytes"),
    ],
)
async def test_a_completion_sent_as_events_is_limited_like_any_other(
    upstream: UpstreamClient, mode: str, event: bytes, why: str
) -> None:
    piece = b'data: {"choices":[{"index":0,"delta":' + event + b"}]}\n\n"
    async with RawUpstream(Reply(chunked(*[piece] * 20, END, DONE))) as server:
        failure = await error_of(upstream, by(mode, server), completion_of)

        assert isinstance(failure, ResponseTooLarge)
        assert why in failure.message
    assert upstream.memory.used_bytes == 0


@pytest.mark.parametrize("mode", ["relay", "translate"])
async def test_json_in_place_of_a_stream_is_limited_too(upstream: UpstreamClient, mode: str) -> None:
    flood, long = holding(b"[" + b"[]," * 200_000 + b"1]"), holding(b'"' + b"x" * 4_200_000 + b'"')
    async with RawUpstream(plain(flood), plain(long)) as server:
        for why in ("values", "max_answer_bytes"):
            failure = await error_of(upstream, by(mode, server), stream_of)
            assert isinstance(failure, ResponseTooLarge)
            assert why in failure.message
    assert upstream.memory.used_bytes == 0


@pytest.mark.parametrize("mode", ["relay", "translate"])
@KINDS
async def test_a_large_response_arrives_whole(upstream: UpstreamClient, mode: str, ask: Any) -> None:
    text = '"[]{},:é\\' * 200_000
    async with RawUpstream(saying(ask, json.dumps(text).encode())) as server:
        answer = await ask(upstream, by(mode, server))

    assert [text] == [
        more for each in ([answer] if ask is completion_of else answer) if (more := json.loads(each).get("more"))
    ]
    await until(lambda: upstream.memory.used_bytes == 0)


@pytest.mark.parametrize("values", [MAX_VALUES_AT_ONCE - 1000, MAX_VALUES - 1000])
async def test_a_completion_of_many_values_is_read_like_a_small_one(upstream: UpstreamClient, values: int) -> None:
    numbers = list(range(values // 2))
    completion = holding(json.dumps(numbers).encode())
    async with RawUpstream(plain(completion)) as server:
        answer = await upstream.complete(by("relay", server), BODY)

    assert answer.body["more"] == numbers
    assert answer.with_model("theirs") == completion


async def test_memory_for_a_response_is_reserved_or_refused_and_released(
    upstream: UpstreamClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with RawUpstream(plain(holding(b'"' + b"x" * 3_000_000 + b'"'))) as server:
        record = by("relay", server)
        first = await upstream.complete(record, BODY)
        failure = await error_of(upstream, record, completion_of)
        taken = upstream.memory.used_bytes
        del first

        assert isinstance(failure, ResponseMemoryFull)
        assert taken > 3_000_000
        assert "max_answers_in_flight_bytes" in caplog.text
        assert await completion_of(upstream, record)
    assert upstream.memory.used_bytes == 0


@MODES
@KINDS
async def test_a_cancelled_request_releases_its_memory(upstream: UpstreamClient, mode: str, ask: Any) -> None:
    length = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999999\r\n\r\n"
    head = length if ask is completion_of else STREAM_HEAD + b"\r\n"
    beginning = (b'{"a":"' if ask is completion_of else b'data: {"a":"') + b"x" * 1_000_000
    async with RawUpstream(Reply((head + beginning,), "hang")) as server:
        asking = asyncio.create_task(ask(upstream, by(mode, server)))
        await until(lambda: upstream.memory.used_bytes > 500_000)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await until(lambda: upstream.memory.used_bytes == 0)


@pytest.mark.parametrize("mode", ["translate", "anthropic", "azure"])
async def test_no_connection_to_a_model_outlives_its_process(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(plain()) as server:
        with suppress(UpstreamError):
            await completion_of(upstream, by(mode, server))
        kept = server.open
        await upstream.aclose()
        await until(lambda: server.open == 0)

    assert kept == 1


async def test_memory_of_a_large_event_is_held_until_the_event_is_gone(upstream: UpstreamClient) -> None:
    async with RawUpstream(saying(stream_of, b'"' + b"x" * 1_000_000 + b'"')) as server:
        stream = PulledBlocks(await upstream.stream(by("relay", server), {**BODY, "stream": True}))
        most = 0
        async for block in stream:
            most = max(most, upstream.memory.used_bytes)
            del block

        assert most >= 1_000_000
        assert upstream.memory.used_bytes == 0


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
@pytest.mark.parametrize("ask", [completion_of, stream_of])
async def test_only_the_start_of_an_error_body_is_kept(upstream: UpstreamClient, ask: Any, kind: bytes) -> None:
    """Also of a success that is none: its words are searched, and parsed once more to be told."""
    raw = b'{"error":{"message":"no"},"more":[' + b"1," * 40_000 + b"1]}"
    body = b"data: " + raw + b"\n\n" if kind == b"text/event-stream" else raw
    async with RawUpstream(plain(body, b"content-type: " + kind + b"\r\n")) as server:
        failure = await error_of(upstream, by("relay", server), ask)

    assert failure.status == 502 or isinstance(failure, UpstreamError)
    assert len(json.dumps(render_error(failure)[1])) < 40_000


@pytest.mark.parametrize("failure", [ResponseTooLarge("too large"), ResponseMemoryFull("no room")])
def test_a_response_that_is_too_large_opens_no_circuit(failure: UpstreamError) -> None:
    health = HealthRegistry(CircuitBreakerSettings())
    for _ in range(20):
        health.start_attempt("small").failed(failure)

    assert not health.cooling_down()


def test_without_memory_no_other_model_is_called_and_the_client_may_retry() -> None:
    failure = ResponseMemoryFull("no room")
    status, body, headers = render_error(failure)

    assert (status, body["error"]["message"], headers["retry-after"]) == (503, "no room", "1")
    assert not failure.retryable


def test_memory_is_released_when_nothing_refers_to_the_response() -> None:
    room = ResponseMemory(10, 10)
    reservation = HeldMemory(room, 8)
    with pytest.raises(ResponseMemoryFull):
        HeldMemory(room, 3)
    reservation.grow_to(10)
    taken = room.used_bytes
    del reservation

    assert (taken, room.used_bytes) == (10, 0)


@pytest.mark.parametrize("cut", [1, 1000, SMALL_BYTES - 1, SMALL_BYTES + 1])
def test_each_line_is_limited_by_itself(cut: int) -> None:
    bounds = ResponseBounds(ResponseMemory(2 * SMALL_BYTES, 10 * SMALL_BYTES))
    text = (b"x" * (SMALL_BYTES // 3) + b"\n") * 12 + b"y" * (2 * SMALL_BYTES) + b"\nz"
    step = max(cut, 100)
    for start in range(0, len(text), step):
        bounds.add_lines(text[start : start + step])

    assert bounds.held.size == 0
    bounds.add_lines(b"y" * SMALL_BYTES)
    bounds.add_lines(b"y" * (SMALL_BYTES - 1))
    with pytest.raises(ResponseTooLarge):
        bounds.add_lines(b"yy")


def test_the_warning_about_full_memory_is_not_repeated_at_once(caplog: pytest.LogCaptureFixture) -> None:
    room = ResponseMemory(10, 10)
    ResponseMemory(10, 1).acquire(10)  # room for one, whatever is set
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            with pytest.raises(ResponseMemoryFull):
                HeldMemory(room, 11)

    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "reader",
    [
        lambda bounds: CompletionReader("ours", bounds),
        lambda bounds: NativeAnswerReader("messages", "ours", bounds),
        lambda bounds: NativeAnswerReader("responses", "ours", bounds),
    ],
    ids=["chat", "messages", "responses"],
)
def test_blank_lines_before_an_answer_count_as_its_bytes(reader: Callable[[ResponseBounds], AnswerBody]) -> None:
    body = reader(ResponseBounds(ResponseMemory(10 * SMALL_BYTES)))
    for _ in range(10):
        body.feed(b"\n" * SMALL_BYTES)
    with pytest.raises(ResponseTooLarge):
        body.feed(b"\n")
