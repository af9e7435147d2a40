"""Calls of litellm over our connections, from the client's side and from the upstream's."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.settings.litellm_params import PASSTHROUGH
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from proxy.upstream.litellm_client import LiteLLMClient
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import BODY, KEY, WHOLE, completion_of, model_in_mode, stream_of
from tests.support.litellm_calls import open_litellm_client
from tests.support.makers import a_record
from tests.support.raw_upstream import CHUNK, DONE, END, RawUpstream, Reply, chunked, plain
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.tls import served_by
from tests.support.waiting import until

# Of the event loop, in which a call is surely through.
MAX_STEPS = 60
GEMINI, CLAUDE, GPT = "gemini/gemini-2.5-pro", "anthropic/claude-sonnet-4-5", "openai/gpt-5"
# One or more of each way in which litellm comes by a client.
PROVIDERS = (
    *("openai/x", "hosted_vllm/x", "azure/x", "groq/x", "mistral/x", "deepseek/x", "openrouter/x", "scaleway/x"),
    *(GEMINI, CLAUDE, "anthropic_text/x", "bedrock/anthropic.claude-v2", "bedrock/converse/anthropic.claude-v2"),
    *("cohere_chat/x", "ollama/x", "cloudflare/x", "text-completion-codestral/x", "text-completion-openai/x"),
    *("gpt-3.5-turbo-instruct", "azure_text/x"),
)
MORE: dict[str, dict[str, Any]] = {
    **{name: {"api_version": "2024-10-21"} for name in ("azure", "azure_text")},
    "bedrock": {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region_name": "us-east-1"},
}
# Of litellm's own models, and of its coroutines whose task is cancelled before they begin.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict:UserWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture
async def litellm() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client() as opened:
        yield opened


def a_translated_model(model: str, url: str) -> ModelRecord:
    base = url.removesuffix("/v1") if model in (CLAUDE,) else url
    return a_record(model=model, api_base=base, api_key="sk-x", **MORE.get(model.partition("/")[0], {}))


async def ask(client: LiteLLMClient, record: ModelRecord, *, stream: bool) -> list[Any]:
    if not stream:
        return [await client.complete(record, BODY)]
    async with aclosing(PulledBlocks(await client.stream(record, BODY))) as blocks:
        return [chunk async for block in blocks for chunk in block]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", PROVIDERS)
async def test_every_provider_is_called_over_our_connections(model: str, *, stream: bool) -> None:
    """Nothing else knows this proxy."""
    with ScriptedUpstream() as proxy:
        proxy.always = Step(status=429, body={"error": {"message": "slow down"}}, headers={"retry-after": "7"})
        async with open_litellm_client({"HTTP_PROXY": f"127.0.0.1:{proxy.port}"}) as client:
            with pytest.raises(UpstreamError) as caught:
                await ask(client, a_translated_model(model, "http://far.invalid/v1"), stream=stream)

        assert len(proxy.history) == 1
        assert proxy.last.path.startswith("http://far.invalid/")
        assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI, "text-completion-codestral/x"])
async def test_a_request_whose_connection_dies_is_sent_once(
    litellm: LiteLLMClient, model: str, *, stream: bool
) -> None:
    with ScriptedUpstream() as server:
        server.always = Step(drop=True)
        with pytest.raises(UpstreamError) as caught:
            await ask(litellm, a_translated_model(model, server.url), stream=stream)

        assert (len(server.history), caught.value.connection_lost) == (1, True)


TEXT = b"""{"id": "1", "object": "text_completion", "created": 1, "model": "x",
  "choices": [{"index": 0, "text": "hello", "finish_reason": "stop", "logprobs": null}]}"""


@pytest.mark.parametrize("model", ["text-completion-openai/x", "gpt-3.5-turbo-instruct", "azure_text/x"])
async def test_a_model_of_text_completions_answers_chats(litellm: LiteLLMClient, model: str) -> None:
    events = (b"data: " + TEXT.replace(b"\n", b"") + b"\n\n", DONE)
    async with RawUpstream(plain(TEXT), Reply(chunked(*events))) as server:
        (whole,) = await ask(litellm, a_translated_model(model, server.url), stream=False)
        chunks = await ask(litellm, a_translated_model(model, server.url), stream=True)

    assert whole.body["choices"][0]["message"]["content"] == "hello"
    assert "".join(each["delta"].get("content") or "" for chunk in chunks for each in chunk.body["choices"]) == "hello"
    assert all(b"/completions" in head and b"chat/completions" not in head for head in server.heads)


@pytest.mark.parametrize("coding", [b"", b"content-encoding: gzip\r\n"], ids=["plain", "gzip"])
async def test_an_answer_that_litellm_reads_in_a_thread_is_bounded_too(coding: bytes) -> None:
    body = gzip.compress(b" " * 5_000_000, mtime=0) if coding else b" " * 5_000_000
    async with (
        open_litellm_client(settings=Settings(max_answer_bytes=2_000_000)) as client,
        RawUpstream(plain(body, coding)) as server,
    ):
        with pytest.raises(UpstreamError, match="compressed" if coding else "larger than 2000000 bytes"):
            await ask(client, a_translated_model("oobabooga/x", server.url), stream=False)


@pytest.mark.parametrize("provider", sorted(PASSTHROUGH - {"openai_like"}))
async def test_what_speaks_openais_format_is_read_byte_for_byte(litellm: LiteLLMClient, provider: str) -> None:
    record = a_record(model=f"{provider}/x", api_key="sk-x")
    odd = b'{"choices":[{"index":0,"message":{"content":"hi"}}],"big":12345678901234567890123,"model":"theirs"}'
    async with RawUpstream(plain(odd), Reply(chunked(CHUNK.replace(b"theirs", b"theirs "), END, DONE))) as server:
        record = replace(record, litellm_params={**record.litellm_params, "api_base": server.url})
        (answer,) = await ask(litellm, record, stream=False)
        chunks = await ask(litellm, record, stream=True)

        assert answer.with_model("ours") == odd.replace(b"theirs", b"ours")
        assert chunks[0].with_model("ours") == CHUNK[6:].strip().replace(b"theirs", b"ours")
        assert server.connections == 1


async def test_direct_and_translated_calls_share_their_connections() -> None:
    upstream = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY})
    async with RawUpstream(plain()) as server:
        for mode in ("relay", "translate", "relay"):
            await completion_of(upstream, model_in_mode(server, mode))

        assert (server.connections, len(server.bodies)) == (1, 3)
        await upstream.aclose()
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("mode", ["relay", "translate"])
async def test_the_connection_of_a_stream_is_used_again_though_its_end_comes_late(
    upstream: UpstreamClient, mode: str
) -> None:
    late = chunked(CHUNK, END, DONE, b": the last", end=b"0\r\n\r\n")
    async with RawUpstream(Reply(late)) as server:
        for _ in range(3):
            assert len(await stream_of(upstream, model_in_mode(server, mode))) == 2
            await until(lambda: not upstream._pool._draining)

        assert server.connections == 1


async def test_cookies_of_an_upstream_are_not_sent_back(upstream: UpstreamClient) -> None:
    async with RawUpstream(plain(head=b"set-cookie: a=b; path=/\r\n")) as server:
        for _ in range(2):
            await completion_of(upstream, model_in_mode(server, "translate"))

        assert not any(b"\r\ncookie:" in head.lower() for head in server.heads)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [GPT, CLAUDE])
async def test_a_call_cancelled_at_any_moment_leaves_no_connection_open(
    litellm: LiteLLMClient, model: str, *, stream: bool
) -> None:
    reply = Reply(chunked(CHUNK, end=b""), "hang")
    async with RawUpstream(reply) as server:
        record = a_translated_model(model, server.url)
        for steps in range(MAX_STEPS):
            asking = asyncio.create_task(ask(litellm, record, stream=stream))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait({asking})
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI])
async def test_a_stream_that_nobody_began_to_read_is_closed(litellm: LiteLLMClient, model: str) -> None:
    async with RawUpstream(Reply(chunked(CHUNK, end=b""), "hang")) as server:
        stream: Any = await litellm.stream(a_translated_model(model, server.url), BODY)
        await stream.aclose()
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancellation_that_litellm_takes_for_a_failure_is_one(litellm: LiteLLMClient, *, stream: bool) -> None:
    """Its client of Azure turns it into an error."""
    async with RawUpstream(Reply((), "hang")) as server:
        asking = asyncio.create_task(ask(litellm, a_translated_model("azure/x", server.url), stream=stream))
        await until(lambda: len(server.bodies) == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI])
async def test_ssl_verify_of_a_model_counts_for_its_streams_too(
    litellm: LiteLLMClient, certificate: Path, model: str
) -> None:
    async with RawUpstream(WHOLE, tls=served_by(certificate)) as server:
        record = a_translated_model(model, server.url)
        with pytest.raises(UpstreamError, match="certificate is not trusted"):
            await ask(litellm, record, stream=True)
        assert server.bodies == []

        trusting = replace(record, litellm_params={**record.litellm_params, "ssl_verify": str(certificate)})
        with suppress(UpstreamError):  # the answer is not in every format
            await ask(litellm, trusting, stream=True)
        assert len(server.bodies) == 1
