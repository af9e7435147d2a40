"""Streams are asked for usage by a field that the caller need not send, and that not every server accepts."""

from __future__ import annotations

import json

import pytest

from proxy.upstream.client import UpstreamClient
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import BODY, error_of, model_in_mode, stream_of
from tests.support.raw_upstream import CHUNK, END, RawUpstream, Reply, chunked, plain

pytestmark = pytest.mark.parametrize("mode", ["relay", "translate"])


def text_of(found: list[bytes]) -> str:
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in found)


REFUSAL = b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "not permitted"}]}'


@pytest.mark.parametrize("status", [b"400 Bad", b"422 No", b"500 Oh"])
async def test_a_model_that_refuses_stream_options_is_asked_without_them_from_then_on(
    upstream: UpstreamClient, mode: str, status: bytes
) -> None:
    async with RawUpstream(plain(REFUSAL, status=status), Reply(chunked(CHUNK, END))) as server:
        record = model_in_mode(server, mode)
        for _ in range(2):
            assert text_of(await stream_of(upstream, record)) == "hi"
        sent = [json.loads(body) for body in server.bodies]
    assert ["stream_options" in body for body in sent] == [True, False, False]
    assert {name: value for name, value in sent[0].items() if name != "stream_options"} == sent[1] == sent[2]


async def test_a_changed_model_is_sent_stream_options_again(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(plain(REFUSAL, status=b"422 No"), Reply(chunked(CHUNK, END))) as server:
        await stream_of(upstream, model_in_mode(server, mode))
        await stream_of(upstream, model_in_mode(server, mode))
        assert ["stream_options" in json.loads(body) for body in server.bodies] == [True, False, True]


async def test_other_errors_and_a_second_refusal_are_reported(upstream: UpstreamClient, mode: str) -> None:
    other = plain(b'{"error": {"message": "no such field: stream_option"}}', status=b"400 Bad")
    async with RawUpstream(other) as server:
        await error_of(upstream, model_in_mode(server, mode), stream_of)
        assert len(server.bodies) == 1
    async with RawUpstream(plain(REFUSAL, status=b"422 No")) as server:
        record = model_in_mode(server, mode)
        assert (await error_of(upstream, record, stream_of)).status == 422
        assert len(server.bodies) == 2
        await error_of(upstream, record, stream_of)  # nothing was learnt of it
        assert b"stream_options" in server.bodies[2]


@pytest.mark.parametrize(("supported", "sent"), [(True, [True]), (False, [False])])
async def test_supports_stream_options_is_obeyed(
    upstream: UpstreamClient, mode: str, supported: bool, sent: list[bool]
) -> None:
    async with RawUpstream(plain(REFUSAL, status=b"422 No")) as server:
        await error_of(upstream, model_in_mode(server, mode, supports_stream_options=supported), stream_of)
        assert ["stream_options" in json.loads(body) for body in server.bodies] == sent


async def test_a_caller_who_asked_for_usage_is_served_without_it(upstream: UpstreamClient, mode: str) -> None:
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    async with RawUpstream(plain(REFUSAL, status=b"422 No"), Reply(chunked(CHUNK, END))) as server:
        blocks = [
            block
            async for block in PulledBlocks(
                await upstream.stream(model_in_mode(server, mode), body, raw=json.dumps(body).encode())
            )
        ]
        assert len(blocks) >= 1
        assert "stream_options" not in json.loads(server.bodies[1])
