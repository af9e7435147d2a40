"""litellm's translation beside ours: it was written by others, for the same requests.

The differences are intended, and taken out by `plain`:
- the developer speaks as the system, and adjacent messages of the system are one: many servers accept no other;
- content that is text alone is one text, not a list of parts: some servers know no parts;
- the limit is `max_completion_tokens`, which a provider's own name replaces later; litellm sends `max_tokens`;
- what a provider runs is left out and named; litellm asks for a search by `web_search_options`, or drops it;
- `strict` and descriptions are sent where the client states them; litellm sends false and "";
- calls have no `index`, which belongs to streams;
- a free-form tool takes its text as `input`; litellm calls it `content`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support.captured_requests import captured_body
from tests.support.responses_api import CAPTURED, completion, function, translated

# litellm's own types warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

USER = {"role": "user", "content": "hi"}
SPACE = {"type": "namespace", "name": "n", "description": "N.", "tools": [function("g")]}
CALLS: list[Any] = [
    USER,
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x":1}'},
    {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": "A"},
    {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "B"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]},
    USER,
]
REQUESTS: dict[str, dict[str, Any]] = {
    **{name: captured_body(name) for name in CAPTURED},
    "calls in a row": {"input": CALLS, "tools": [function("f", description="F.", strict=True)]},
    "chosen tool": {"input": "hi", "tools": [function("f")], "tool_choice": {"type": "function", "name": "f"}},
    "json": {"input": "hi", "text": {"format": {"type": "json_object"}}, "temperature": 0.1, "max_output_tokens": 9},
}


@pytest.fixture(scope="module")
def litellm_adapter() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    from litellm.responses.litellm_completion_transformation.transformation import LiteLLMCompletionResponsesConfig

    return LiteLLMCompletionResponsesConfig


def by_litellm(adapter: Any, request: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in request.items() if name not in ("model", "input", "stream")}
    body: dict[str, Any] = adapter.transform_responses_api_request_to_chat_completion_request(
        model="any", input=request["input"], responses_api_request=fields, custom_llm_provider="hosted_vllm"
    )
    return body


def plain_content(content: Any) -> Any:
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return "\n\n".join(part["text"] for part in content)
    return content


def plain_messages(messages: list[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        plain = {name: message[name] for name in ("tool_call_id", "reasoning_content") if message.get(name)}
        plain["role"] = "system" if message["role"] == "developer" else message["role"]
        plain["content"] = plain_content(message.get("content"))
        if calls := message.get("tool_calls"):
            plain["calls"] = [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        if found and found[-1]["role"] == plain["role"] == "system":
            found[-1]["content"] += "\n\n" + plain["content"]
        else:
            found.append(plain)
    return found


def plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    named = tool["function"]
    return {
        "name": named["name"],
        "description": named.get("description") or "",
        "parameters": named["parameters"],
        "strict": named.get("strict") or False,
    }


def plain(body: dict[str, Any]) -> dict[str, Any]:
    names = ("tool_choice", "parallel_tool_calls", "response_format", "temperature", "reasoning_effort")
    return {
        "messages": plain_messages(body["messages"]),
        "tools": [plain_tool(tool) for tool in body.get("tools", ())],
        "limit": body.get("max_completion_tokens") or body.get("max_tokens"),
        **{name: body[name] for name in names if body.get(name) is not None},
    }


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_says_what_litellm_would_say(litellm_adapter: Any, name: str) -> None:
    request = REQUESTS[name]
    assert plain(dict(translated(**request).body)) == plain(by_litellm(litellm_adapter, request))


def plain_item(item: Any) -> tuple[Any, ...]:
    if item["type"] == "message":
        return "message", "".join(part["text"] for part in item["content"]), item["status"]
    if item["type"] == "reasoning":
        texts = [part["text"] for part in item.get("summary") or item.get("content") or ()]
        return "reasoning", "".join(texts)
    return item["type"], item["name"], item.get("namespace"), item["call_id"], item.get("arguments", item.get("input"))


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
ANSWERS: dict[str, dict[str, Any]] = {
    "text": completion(content="Hey"),
    "cut off": completion("length", content="He"),
    "calls": completion("tool_calls", content="Look.", tool_calls=[CALL]),
    "reasoning": completion(content="Hey", reasoning_content="hm"),
    "namespace": completion("tool_calls", tool_calls=[{**CALL, "function": {"name": "n__g", "arguments": "{}"}}]),
    "free form": completion(
        "tool_calls", tool_calls=[{**CALL, "function": {"name": "patch", "arguments": '{"content":"x"}'}}]
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_says_what_litellm_would_say(litellm_adapter: Any, name: str) -> None:
    import litellm

    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    tools = [function("f"), SPACE, {"type": "custom", "name": "patch"}]
    answer = {**ANSWERS[name], "usage": usage}
    theirs = litellm_adapter.transform_chat_completion_response_to_responses_api_response(
        request_input="hi",
        responses_api_request={"tools": tools},
        chat_completion_response=litellm.ModelResponse(**answer),
    ).model_dump()
    ours = translated(tools=tools).answer(answer, "any")
    said = [plain_item(item) for item in theirs["output"] if item["type"] != "message" or item["content"]]
    assert [plain_item(item) for item in ours["output"]] == [item for item in said if item[1] != ""]
    assert [ours["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")] == [10, 5, 15]
    assert ours["status"] == theirs["status"]
