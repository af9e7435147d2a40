from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from proxy.concurrency import cancel_and_wait
from proxy.settings.outbound import AsyncTransport, Outbound
from proxy.upstream.litellm_transport import capture, client_over, open_pool, read_chunks, reap_connections
from tests.support.raw_upstream import CHUNK, DONE, END, RawUpstream, Reply, chunked, plain
from tests.support.waiting import until

# Of the event loop, in which a call is surely through.
MAX_STEPS = 200


@asynccontextmanager
async def tidied(pool: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    closing = asyncio.create_task(reap_connections(pool, interval_s=0.02, grace_period_s=0.1))
    async with pool:
        yield pool
        await cancel_and_wait(closing)


async def streamed(pool: httpx.AsyncClient, url: str) -> None:
    with capture(5, stream=True) as captured:
        request = pool.build_request("POST", url, content=b"{}")
        response = await pool.send(request, stream=True)
    try:
        async with aclosing(read_chunks(response)) as chunks:
            async for _ in chunks:
                pass
    finally:
        await captured.aclose()


async def whole(pool: httpx.AsyncClient, url: str) -> None:
    with capture(5):
        await pool.post(url + "/chat/completions", content=b"{}")


async def test_an_idle_connection_is_closed_in_time_without_a_further_request() -> None:
    limits = httpx.Limits(keepalive_expiry=1.0)
    async with RawUpstream(plain()) as server, tidied(client_over(AsyncTransport(Outbound({}), limits), 5)) as pool:
        for _ in range(2):
            await pool.get(server.url, headers={"content-length": "0"})
        assert (server.connections, server.open) == (1, 1)

        await until(lambda: server.open == 0)
        await pool.get(server.url, headers={"content-length": "0"})
        assert server.connections == 2


@pytest.mark.parametrize(("call", "reply"), [(whole, plain()), (streamed, Reply(chunked(CHUNK, END, DONE), "close"))])
async def test_a_call_cancelled_at_any_moment_leaves_no_connection_open(call: Any, reply: Reply) -> None:
    async with RawUpstream(reply) as server, tidied(open_pool(5, Outbound({}))) as pool:
        for steps in range(MAX_STEPS):
            calling = asyncio.create_task(call(pool, server.url))
            for _ in range(steps):
                await asyncio.sleep(0)
            calling.cancel()
            await asyncio.wait({calling})
        await until(lambda: in_use(pool) == [])


async def test_a_slow_call_keeps_its_connection() -> None:
    async with RawUpstream(Reply(chunked(CHUNK)[:-1], "hang")) as server, tidied(open_pool(5, Outbound({}))) as pool:
        calling = asyncio.create_task(streamed(pool, server.url))
        await asyncio.wait({calling}, timeout=0.4)

        assert not calling.done()
        assert server.open == 1
        await cancel_and_wait(calling)


def in_use(pool: Any) -> list[Any]:
    (transport,) = pool._transport.open
    layer = transport._pool
    return [*layer._requests, *(each for each in layer.connections if not each.is_idle() and not each.is_closed())]
