from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.settings.schema import Settings
from proxy.upstream.client import UpstreamClient
from tests.support.direct_calls import BODY, KEY, SHORT, WHOLE, a_model, completion_of, error_of, stream_of
from tests.support.raw_upstream import CHUNK, DONE, END, JSON, STREAM_HEAD, RawUpstream, Reply, chunked, plain
from tests.support.tls import served_by
from tests.support.waiting import until

SOON_S = 1.0


@pytest.mark.parametrize(
    "after",
    [(), (CHUNK * 3,), (b"data: {broken\n\n",), (b"x" * 2**21,)],
    ids=["silence", "events", "nonsense", "flood"],
)
async def test_nothing_is_waited_for_after_done(upstream: UpstreamClient, after: tuple[bytes, ...]) -> None:
    """The coding of the body never ends: its connection is given up, and not used again."""
    async with RawUpstream(Reply(chunked(CHUNK, END, DONE, *after, end=b""), "hang"), WHOLE) as server:
        async with asyncio.timeout(SOON_S / 2):
            assert len(await stream_of(upstream, a_model(server))) == 2
        await until(lambda: server.open == 0)
        assert len(await stream_of(upstream, a_model(server))) == 2
        assert server.connections == 2


async def test_connections_are_reused(upstream: UpstreamClient) -> None:
    async with RawUpstream(WHOLE) as server:
        for _ in range(5):
            assert len(await stream_of(upstream, a_model(server))) == 2
            await asyncio.sleep(0.02)  # the end of the coding may come behind the last word
        server.script.append(plain())
        server.script.popleft()
        for _ in range(5):
            await completion_of(upstream, a_model(server))
        assert server.connections == 1


async def test_an_idle_connection_that_the_server_closed_is_not_used(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(plain().pieces, "close")) as server:
        for _ in range(5):
            await completion_of(upstream, a_model(server))
            await until(lambda: server.open == 0)
            await asyncio.sleep(0.01)  # until it has reached this side
        assert (len(server.bodies), server.connections) == (5, 5)


async def test_an_idle_connection_that_dies_under_a_request_is_reported_as_lost_and_not_retried_here(
    upstream: UpstreamClient,
) -> None:
    async with RawUpstream(plain(), Reply((), "reset"), plain()) as server:
        await completion_of(upstream, a_model(server))
        failure = await error_of(upstream, a_model(server), completion_of)
        assert (failure.connection_lost, len(server.bodies), server.connections) == (True, 2, 1)
        await completion_of(upstream, a_model(server))


@pytest.mark.parametrize(
    "reply",
    [
        Reply((), "hang"),
        Reply((SHORT,), "hang"),
        Reply((STREAM_HEAD + b"\r\n",), "hang"),
        Reply(chunked(CHUNK, end=b""), "hang"),
        Reply(chunked(CHUNK, END, end=b""), "hang"),
    ],
    ids=["before the headers", "in a body", "after the headers", "after a chunk", "after the last word"],
)
@pytest.mark.parametrize("ask", [completion_of, stream_of])
async def test_cancelling_at_any_stage_closes_the_connection(
    upstream: UpstreamClient, reply: Reply, ask: Callable[..., Any]
) -> None:
    async with RawUpstream(reply) as server:
        asking = asyncio.create_task(ask(upstream, a_model(server)))
        await until(lambda: bool(server.bodies))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: server.open == 0, SOON_S)


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 3 * 2**20])
async def test_a_large_body_arrives_whole(upstream: UpstreamClient, size: int) -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "é" * (size // 2)}]}
    async with RawUpstream(plain()) as server:
        await upstream.complete(a_model(server), body)
        assert len(server.bodies[0]) > size - 100
        assert b"\xc3\xa9" * (size // 2) in server.bodies[0]


async def test_many_streams_at_once_leave_no_connection_behind(upstream: UpstreamClient) -> None:
    async with RawUpstream(WHOLE) as server:
        found = await asyncio.gather(*(stream_of(upstream, a_model(server)) for _ in range(200)))
        assert {len(chunks) for chunks in found} == {2}
        before = server.connections
        await asyncio.sleep(0.1)
        await asyncio.gather(*(stream_of(upstream, a_model(server)) for _ in range(100)))
        assert (before <= 200, server.connections - before) == (True, 0)
        await upstream.aclose()
        await until(lambda: server.open == 0)


async def test_an_untrusted_certificate_is_named_as_the_reason(upstream: UpstreamClient, certificate: Path) -> None:
    async with RawUpstream(plain(), tls=served_by(certificate)) as server:
        for ask in (completion_of, stream_of):
            failure = await error_of(upstream, a_model(server), ask)
            assert ("certificate" in failure.message, failure.connection_lost) == (True, False)
        assert server.bodies == []


async def test_ssl_cert_file_replaces_the_default_certificates(
    certificate: Path,
) -> None:
    upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY, "SSL_CERT_FILE": str(certificate)})
    async with RawUpstream(plain(), tls=served_by(certificate)) as server:
        assert await completion_of(upstream, a_model(server)) == JSON.replace(b"theirs", b"ours")
    await upstream.aclose()


async def test_the_proxy_of_the_environment_is_used_except_for_this_machine() -> None:
    async with RawUpstream(plain()) as proxy, RawUpstream(plain()) as near:
        upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY, "http_proxy": f"127.0.0.1:{proxy.port}"})
        far = a_model(near, api_base="http://far.invalid/v1")
        await completion_of(upstream, far)
        await completion_of(upstream, a_model(near))
        await upstream.aclose()
        assert (len(proxy.bodies), len(near.bodies)) == (1, 1)
        assert proxy.heads[0].startswith(b"POST http://far.invalid/v1/chat/completions HTTP/1.1\r\n")


async def test_the_status_of_a_proxy_that_refuses_is_reported() -> None:
    async with RawUpstream(plain(b"", status=b"407 Who are you")) as proxy:
        upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY, "https_proxy": f"http://127.0.0.1:{proxy.port}"})
        failure = await error_of(upstream, a_model(proxy, api_base="https://far.invalid/v1"), completion_of)
        await upstream.aclose()
        assert ("407" in failure.message, failure.connection_lost, len(proxy.heads)) == (True, False, 1)
        assert KEY.encode() not in proxy.heads[0]
