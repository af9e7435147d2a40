"""What the pool of translated calls keeps open is closed in time, also where no further request comes."""

from __future__ import annotations

import asyncio

import httpx

from proxy.tasks import end
from proxy.upstream.wire import close_idle
from tests.support.makers import until
from tests.support.raw_upstream import RawUpstream, plain


async def test_a_connection_that_was_idle_for_too_long_is_closed_though_nobody_asks() -> None:
    async with RawUpstream(plain()) as server, httpx.AsyncClient(limits=httpx.Limits(keepalive_expiry=1.0)) as pool:
        closing = asyncio.create_task(close_idle(pool, every_s=0.02))
        for _ in range(2):
            await pool.get(server.url, headers={"content-length": "0"})
        assert (server.connections, server.open) == (1, 1)

        await until(lambda: server.open == 0)
        await pool.get(server.url, headers={"content-length": "0"})
        assert server.connections == 2
        await end(closing)
