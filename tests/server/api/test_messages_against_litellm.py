"""Our translation beside litellm's own, and what litellm makes of ours for Claude: the request that the client sent."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from proxy.server.api.adaptation import adapt
from proxy.server.api.messages_request import translate
from proxy.settings.litellm_params import CHAT_FIELDS
from proxy.upstream.litellm_transport import import_litellm
from tests.server.api.messages import (
    CAPTURED,
    ID,
    TOOL,
    a_call,
    a_completion,
    a_request,
    a_result,
    accumulated,
    an_image,
    check_order,
    streamed,
    translated,
)
from tests.server.api.test_adaptation import COHERE, GEMINI, GPT, HAIKU, LOCAL, OPUS, a_model
from tests.support.captured_requests import captured_body

pytestmark = pytest.mark.filterwarnings("ignore:Items? .* on TypedDict:UserWarning")

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}

LOOP = a_request(
    {"role": "user", "content": [{"type": "text", "text": "read"}, an_image()]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "U0lH"},
            {"type": "text", "text": "so"},
            a_call("a", path="x"),
            a_call("b", path="y"),
        ],
    },
    {"role": "user", "content": [a_result("1", "a"), a_result([{"type": "text", "text": "2"}], "b", **EPHEMERAL)]},
    system=[{"type": "text", "text": "be kind", **EPHEMERAL}],
    tools=[TOOL, {**TOOL, "name": "Write", **EPHEMERAL}],
    tool_choice={"type": "auto"},
    stop_sequences=["END"],
)

REQUESTS = [pytest.param(captured_body(name), id=name) for name in CAPTURED] + [pytest.param(LOOP, id="loop")]


@pytest.fixture(scope="module")
def litellm() -> Any:
    return import_litellm()


def theirs_of(litellm: Any, request: dict[str, Any], model: str) -> dict[str, Any]:
    from litellm.llms.anthropic.pass_through.adapters.transformation import LiteLLMAnthropicMessagesAdapter

    asked = {**copy.deepcopy(request), "model": model}
    found: dict[str, Any] = LiteLLMAnthropicMessagesAdapter().translate_anthropic_to_openai(asked)[0]
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def turns_of(messages: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return roles, texts, calls and results, without system messages.

    litellm makes turns of the user of those within the conversation, also before the first answer, where ours join the
    first. Texts have no line breaks, for it joins the parts of others in other ways.
    """
    return [
        (
            message["role"],
            text_of(message.get("content")).replace("\n", ""),
            [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls") or []],
            message.get("tool_call_id"),
            message.get("reasoning_content"),
        )
        for message in messages
        if message["role"] != "system" and "(text of 6062 characters)" not in text_of(message.get("content"))
    ]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
def test_turns_tools_and_limits_are_those_that_litellm_makes(litellm: Any, request_: dict[str, Any]) -> None:
    ours = adapt(translate(request_, answer_id=ID, created_at=1).body, GPT)[0]
    theirs = theirs_of(litellm, request_, "openai/gpt-5")
    # Earlier reasoning is not sent to OpenAI, which refuses the member; litellm sends it.
    expected = [(*turn[:4], None) for turn in turns_of(theirs["messages"])]
    assert turns_of(list(ours["messages"])) == expected
    assert [tool["function"] for tool in ours["tools"]] == [tool["function"] for tool in theirs["tools"]]
    assert ours["max_tokens"] == theirs["max_tokens"]
    assert ours.get("tool_choice") == theirs.get("tool_choice")


def test_what_litellm_does_otherwise(litellm: Any) -> None:
    """Budgets count for more here, a session's long user id goes to nobody, and nothing unknown is passed on."""
    request = captured_body(CAPTURED[2])
    ours = adapt(translate(request, answer_id=ID, created_at=1).body, GPT)[0]
    theirs = theirs_of(litellm, request, "openai/gpt-5")
    assert ours["reasoning_effort"] == "high"
    assert theirs["reasoning_effort"] in ("high", {"effort": "high", "summary": "detailed"})
    assert len(theirs["user"]) > 64
    assert theirs.keys() - ours.keys() == {"user", "context_management"}


MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"content": "hello"}, "stop"),
    ({"content": "cut"}, "length"),
    ({"content": "no"}, "content_filter"),
    ({"content": None, "refusal": "I cannot"}, "stop"),
    ({"content": "so", "reasoning_content": "hm"}, "stop"),
    (
        {
            "content": "so", "reasoning_content": "hm",
            "thinking_blocks": [
                {"type": "thinking", "thinking": "hm", "signature": "S"},
                {"type": "redacted_thinking", "data": "D"},
            ],
        },
        "stop",
    ),
    (
        {
            "content": None,
            "tool_calls": [
                {"id": f"call_{n}", "type": "function", "function": {"name": "Read", "arguments": '{"n": 1}'}}
                for n in (1, 2)
            ],
        },
        "tool_calls",
    ),
]  # fmt: skip

USAGE = {
    "prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57,
    "prompt_tokens_details": {"cached_tokens": 20},
}  # fmt: skip


@pytest.mark.parametrize(("message", "finish_reason"), MESSAGES)
def test_answers_are_those_that_litellm_makes(litellm: Any, message: dict[str, Any], finish_reason: str) -> None:
    from litellm.llms.anthropic.pass_through.adapters.transformation import LiteLLMAnthropicMessagesAdapter

    completion = a_completion(message, finish_reason, USAGE)
    response = litellm.ModelResponse(**copy.deepcopy(completion))
    theirs = dict(LiteLLMAnthropicMessagesAdapter().translate_openai_response_to_anthropic(response))
    ours = translated(tools=[TOOL]).answer(completion, "m")

    def plain(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # An unsigned block has no signature there, and an empty one here, where Anthropic's type demands a text.
        return [{name: value for name, value in block.items() if value} for block in content]

    assert plain(ours["content"]) == plain(theirs["content"])
    assert ours["stop_reason"] == theirs["stop_reason"]
    counted = {name: value for name, value in ours["usage"].items() if value}
    assert counted == {name: value for name, value in theirs["usage"].items() if value}


def to_anthropic(litellm: Any, body: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the request that litellm makes of a chat body for Anthropic."""
    from litellm.llms.anthropic.chat.transformation import AnthropicConfig

    sent = copy.deepcopy({name: value for name, value in body.items() if name in CHAT_FIELDS})
    params = litellm.get_optional_params(model=model, custom_llm_provider="anthropic", **sent)
    made: dict[str, Any] = AnthropicConfig().transform_request(
        model=model, messages=copy.deepcopy(body["messages"]), optional_params=params, litellm_params={}, headers={}
    )
    return made


@pytest.mark.parametrize("request_", REQUESTS)
def test_claude_gets_what_the_client_sent(litellm: Any, request_: dict[str, Any]) -> None:
    told = [message for message in request_["messages"] if message["role"] == "system"]
    body = dict(adapt(translate(request_, answer_id=ID, created_at=1).body, OPUS)[0])
    made = to_anthropic(litellm, body, "claude-opus-4-8")
    asked = [message for message in request_["messages"] if message["role"] != "system"]
    system = [*request_["system"], *({"type": "text", "text": message["content"]} for message in told)]
    assert [block["text"] for block in made["system"]] == [block["text"] for block in system]
    for ours, theirs in zip(made["messages"], asked, strict=True):
        assert ours["role"] == theirs["role"]
        assert [marked(block) for block in ours["content"]] == [marked(block) for block in theirs["content"]]
    assert [tool["name"] for tool in made["tools"]] == [tool["name"] for tool in request_["tools"]]
    assert made.get("thinking", {}).get("type") == ("adaptive" if "thinking" in request_ else None)
    if "output_config" in request_:
        assert made["output_config"] == request_["output_config"]


def marked(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block in one of the ways that mean the same."""
    plain = {name: value for name, value in block.items() if name != "is_error"}
    if block["type"] == "tool_result" and isinstance(block["content"], list):
        plain["content"] = text_of(block["content"])
    return plain


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("record", [OPUS, HAIKU, GEMINI, COHERE, GPT, a_model("bedrock/us.anthropic.claude-opus-4-8")])
def test_litellm_accepts_every_field_of_an_adapted_body(litellm: Any, record: Any, request_: dict[str, Any]) -> None:
    fields = {"stop_sequences": ["END"], "temperature": 0.5, "top_p": 0.9, "service_tier": "standard_only"}
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    request = {**request_, **fields, "tool_choice": choice}
    body = adapt(translate(request, answer_id=ID, created_at=1).body, record)[0]
    sent = copy.deepcopy({name: value for name, value in body.items() if name in CHAT_FIELDS})
    assert record.resolved is not None
    litellm.get_optional_params(model=record.resolved.model, custom_llm_provider=record.resolved.provider, **sent)


def test_a_local_server_gets_fields_that_openai_defined(litellm: Any) -> None:
    body = adapt(translate(captured_body(CAPTURED[0]), answer_id=ID, created_at=1).body, LOCAL)[0]
    assert body.keys() <= CHAT_FIELDS | {"model", "messages", "stream"}


CLAUDE_STREAM: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": [],
            "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 7,
                      "cache_creation_input_tokens": 2},
        },
    },
    {"type": "content_block_start", "index": 0,
     "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "let "}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "me see"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "U0lH"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "redacted_thinking", "data": "D"}},
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_start", "index": 2, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "text_delta", "text": "so"}},
    {"type": "content_block_stop", "index": 2},
    {"type": "content_block_start", "index": 3,
     "content_block": {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}}},
    {"type": "content_block_delta", "index": 3, "delta": {"type": "input_json_delta", "partial_json": '{"path":'}},
    {"type": "content_block_delta", "index": 3, "delta": {"type": "input_json_delta", "partial_json": '"x"}'}},
    {"type": "content_block_stop", "index": 3},
    {"type": "content_block_start", "index": 4,
     "content_block": {"type": "tool_use", "id": "toolu_2", "name": "List", "input": {}}},
    {"type": "content_block_stop", "index": 4},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
     "usage": {"output_tokens": 40}},
    {"type": "message_stop"},
]  # fmt: skip


def test_a_stream_of_claudes_is_the_same_behind_litellm(litellm: Any) -> None:
    from litellm.llms.anthropic.chat.handler import ModelResponseIterator

    iterator = ModelResponseIterator(streaming_response=iter(()), sync_stream=True)
    chunks = [iterator.chunk_parser(copy.deepcopy(event)).model_dump(exclude_none=True) for event in CLAUDE_STREAM]
    events = streamed(translated(tools=[TOOL]), chunks)
    check_order(events)
    ours, theirs = accumulated(events), accumulated(CLAUDE_STREAM)
    assert ours.to_dict()["content"] == theirs.to_dict()["content"]
    assert ours.stop_reason == theirs.stop_reason
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
    assert [getattr(ours.usage, name) for name in names] == [getattr(theirs.usage, name) for name in names]
