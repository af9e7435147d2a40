"""Use an upstream of another format, Anthropic's, which litellm translates to OpenAI's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.routing.fingerprints import TurnFingerprints, inspect_history, latest_user_text
from proxy.settings.model_config import ModelInfo
from proxy.storage.records import ModelRecord
from proxy.upstream.litellm_client import LiteLLMClient
from tests.support.litellm_calls import open_litellm_client, translated, translated_chunks
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream

ASK: Any = [{"role": "user", "content": "hi"}]
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "Hello"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 3},
}


# Of litellm's own models, when pydantic first sees them.
pytestmark = pytest.mark.filterwarnings("ignore:Item .* on TypedDict:UserWarning")


def event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


BEGIN = [
    event("message_start", message={**MESSAGE, "content": [], "stop_reason": None}),
    event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"}),
]
END = [
    event("content_block_stop", index=0),
    event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 2}),
    event("message_stop"),
]


@pytest.fixture
def server() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as opened:
        yield opened


@pytest.fixture
async def upstream() -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client({"CLAUDE_API_KEY": "sk-claude"}) as opened:
        yield opened


def claude(server: ScriptedUpstream, **params: Any) -> ModelRecord:
    entry = {
        "model": "anthropic/claude-sonnet-4-5",
        "api_base": server.url.removesuffix("/v1"),
        "api_key": "os.environ/CLAUDE_API_KEY",
        **params,
    }
    return ModelRecord("claude", entry, ModelInfo(), "admin", 0.0)


async def test_an_answer_is_translated(upstream: LiteLLMClient, server: ScriptedUpstream) -> None:
    server.then(Step(body=MESSAGE))
    answer = await translated(
        upstream, claude(server, system="Be brief."), {"messages": ASK, "metadata": {"team": "blue"}}
    )

    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]) == (8, 3)
    assert (server.last.path, server.last.headers["x-api-key"]) == ("/v1/messages", "sk-claude")
    assert server.last.body["system"][0]["text"] == "Be brief."
    assert "metadata" not in server.last.body


async def test_a_stream_is_translated_and_usage_comes_without_choices(
    upstream: LiteLLMClient, server: ScriptedUpstream
) -> None:
    server.then(Step(events=[*BEGIN, *END], done=False))
    chunks = await translated_chunks(upstream, claude(server), {"messages": ASK})

    assert chunks[0]["choices"][0]["delta"]["content"] == "Hello"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 2)


@pytest.mark.parametrize(
    "step", [Step(events=BEGIN, done=False), Step(events=[*BEGIN, *END], cut_after=3)], ids=["ended", "cut"]
)
async def test_a_truncated_stream_is_not_taken_for_a_whole_one(
    upstream: LiteLLMClient, server: ScriptedUpstream, step: Step
) -> None:
    server.then(step)
    with pytest.raises(UpstreamError, match="ended before"):
        await translated_chunks(upstream, claude(server), {"messages": ASK})


THOUGHT = "It is polite to greet whoever greets. " * 10
SIGNATURE = "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pkiMOYds"
CALL_ID = "toolu_01A09q90qw90lq917835lq9"
THINKING = [
    BEGIN[0],
    event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
    event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": THOUGHT[:50]}),
    event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": THOUGHT[50:]}),
    event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": SIGNATURE}),
    event("content_block_stop", index=0),
    event(
        "content_block_start", index=1, content_block={"type": "tool_use", "id": CALL_ID, "name": "greet", "input": {}}
    ),
    event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": '{"whom": "you"}'}),
    event("content_block_stop", index=1),
    *END[1:],
]


async def test_thinking_and_tool_calls_get_the_fingerprints_of_what_a_client_sends_back(
    upstream: LiteLLMClient, server: ScriptedUpstream
) -> None:
    thinking = {"type": "thinking", "thinking": THOUGHT, "signature": SIGNATURE}
    call = {"type": "tool_use", "id": CALL_ID, "name": "greet", "input": {"whom": "you"}}
    server.then(Step(events=THINKING, done=False), Step(body={**MESSAGE, "content": [thinking, call]}))
    body = {"messages": ASK, "max_tokens": 2000}
    streamed, whole = TurnFingerprints(), TurnFingerprints()
    for chunk in await translated_chunks(upstream, claude(server), body):
        for choice in chunk["choices"]:
            streamed.add(choice["delta"])
    whole.add((await translated(upstream, claude(server), body))["choices"][0]["message"])

    question = latest_user_text(ASK)
    function = {"name": "greet", "arguments": "{}"}
    returned = {"role": "assistant", "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}]}
    blocks = inspect_history(
        [*ASK, {**returned, "thinking_blocks": [thinking]}, {"role": "tool", "content": "Hello"}]
    ).fingerprints
    for turn in (streamed, whole):
        assert {*turn.of_reasoning(question), *turn.of_calls(question)} == set(blocks)


async def test_upstream_statuses_are_passed_on(upstream: LiteLLMClient, server: ScriptedUpstream) -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    server.then(Step(status=529, body=overloaded, headers={"retry-after": "3"}))
    with pytest.raises(UpstreamError) as caught:
        await upstream.complete(claude(server), {"messages": ASK})

    assert (caught.value.status, caught.value.retryable, caught.value.headers["retry-after"]) == (529, True, "3")


async def test_a_parameter_without_a_counterpart_is_named_and_the_next_model_is_tried(
    upstream: LiteLLMClient, server: ScriptedUpstream
) -> None:
    with pytest.raises(UpstreamError, match="does not support parameters") as caught:
        await upstream.complete(claude(server), {"messages": ASK, "logprobs": True})

    assert (caught.value.status, caught.value.retryable) == (400, True)
    assert server.history == []


async def test_a_missing_key_is_no_fault_of_the_caller(upstream: LiteLLMClient, server: ScriptedUpstream) -> None:
    with pytest.raises(UpstreamError, match="no key") as caught:
        await upstream.complete(claude(server, api_key="os.environ/MISSING_API_KEY"), {"messages": ASK})

    assert caught.value.status is None


async def test_redirects_are_not_followed(upstream: LiteLLMClient, server: ScriptedUpstream) -> None:
    server.then(Step(status=307, headers={"location": server.url}, body=b""))
    with pytest.raises(UpstreamError, match="redirect"):
        await upstream.complete(claude(server), {"messages": ASK})

    assert len(server.history) == 1


async def test_an_unreachable_upstream_is_a_clear_error(upstream: LiteLLMClient) -> None:
    gone = ModelRecord("m", {"model": "openai/m", "api_base": "http://127.0.0.1:1/v1"}, ModelInfo(), "admin", 0.0)
    with pytest.raises(UpstreamError, match="cannot be reached") as caught:
        await upstream.complete(gone, {"messages": ASK})

    assert caught.value.retryable


@pytest.mark.parametrize("provider", ["hosted_vllm", "lm_studio", "custom_openai"])
async def test_local_servers_get_the_body_verbatim(
    upstream: LiteLLMClient, server: ScriptedUpstream, provider: str
) -> None:
    record = ModelRecord(
        "m", {"model": f"{provider}/m", "api_base": server.url, "api_key": "k"}, ModelInfo(), "admin", 0.0
    )
    body: Any = {"messages": [{"role": "user", "content": [{"type": "new_part"}]}], "weird": 1, "metadata": {"a": "b"}}
    answer = await translated(upstream, record, body)
    chunks = await translated_chunks(upstream, record, body)

    assert {**server.history[0].body, "stream": False} == {**body, "model": "m", "stream": False}
    assert answer["system_fingerprint"] == chunks[0]["system_fingerprint"] == "fp_scripted"
    assert chunks[-1]["choices"] == []
