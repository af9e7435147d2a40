from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.raw_upstream import CHUNK, DONE, END, RawUpstream, Reply, chunked, plain
from tests.support.waiting import until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
WHOLE = Reply(chunked(CHUNK, END, DONE))
LOST = Reply((), "reset")
MODES = pytest.mark.parametrize("mode", ["relay", "translate"])


@asynccontextmanager
async def added(fleet: Fleet, mode: str, *script: Reply) -> AsyncIterator[tuple[RawUpstream, httpx.AsyncClient]]:
    """Add a model "raw" of its own upstream, until the block ends."""
    async with RawUpstream(*script) as server, httpx.AsyncClient(base_url=fleet.url, timeout=60) as http:
        body = {**model_entry("raw", server.url, forward=mode), "profile": uniform_profile(0.9)}
        assert (await asyncio.to_thread(fleet.proxy.admin, "POST", "/admin/models", body)).status_code == 201
        try:
            yield server, http
        finally:
            await asyncio.to_thread(fleet.proxy.admin, "DELETE", "/admin/models/raw")


async def ask(http: httpx.AsyncClient, *, stream: bool = False) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": "raw", "messages": ASK, "stream": stream})


def open_files(fleet: Fleet) -> int:
    return sum(1 for _ in Path(f"/proc/{fleet.proxy.pid}/fd").iterdir())


@MODES
async def test_a_request_on_a_kept_connection_that_died_is_sent_again_once(fleet: Fleet, mode: str) -> None:
    async with added(fleet, mode, plain(), LOST, plain()) as (server, http):
        assert [(await ask(http)).status_code for _ in range(2)] == [200, 200]
        assert (len(server.bodies), server.connections) == (3, 2)


@MODES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_whose_connections_die_is_tried_twice_only(fleet: Fleet, mode: str, stream: bool) -> None:
    async with added(fleet, mode, plain(), LOST) as (server, http):
        assert (await ask(http)).status_code == 200
        assert (await ask(http, stream=stream)).status_code == 502
        assert len(server.bodies) == 3


@MODES
@pytest.mark.parametrize("garbage", [b"SMTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n"])
async def test_a_response_that_is_not_http_is_a_502(fleet: Fleet, mode: str, garbage: bytes) -> None:
    async with added(fleet, mode, Reply((garbage,), "close")) as (server, http):
        assert (await ask(http)).status_code == 502
        assert len(server.bodies) == 1


@MODES
async def test_a_complete_stream_does_not_wait_for_the_end_of_its_transfer_coding(fleet: Fleet, mode: str) -> None:
    async with added(fleet, mode, Reply(chunked(CHUNK, END, DONE, end=b""), "hang")) as (server, http):
        before_its_end = []
        for _ in range(5):  # on a busy machine the end of one may have been waited for meanwhile
            reply = await ask(http, stream=True)
            before_its_end.append(server.open > 0)
            assert reply.text.endswith("data: [DONE]\n\n")
        assert any(before_its_end) or mode == "translate"  # litellm closes the connection itself
        await until(lambda: server.open == 0)


@MODES
async def test_retry_after_reaches_the_caller_in_any_spelling(fleet: Fleet, mode: str) -> None:
    async with added(fleet, mode, plain(b"{}", head=b"Retry-After: 7\r\n", status=b"429 No")) as (_, http):
        reply = await ask(http)

    assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")


async def test_hundreds_of_streams_at_once_leave_no_descriptor_behind(fleet: Fleet) -> None:
    async with added(fleet, "relay", WHOLE) as (server, http):
        assert (await ask(http, stream=True)).text.endswith("data: [DONE]\n\n")
        before = open_files(fleet)
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=fleet.url, timeout=60, limits=limits) as many:
            replies = await asyncio.gather(*(ask(many, stream=True) for _ in range(200)))
        assert {reply.text.count("data: ") for reply in replies} == {3}
        kept = server.open
        await until(lambda: open_files(fleet) <= before + kept)
        await asyncio.gather(*(ask(http, stream=True) for _ in range(50)))
        assert server.open <= kept
    await until(lambda: open_files(fleet) <= before)
