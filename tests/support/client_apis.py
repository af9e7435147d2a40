"""The same request and the same answer in each API that clients speak."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.support.scripted_answers import Json

APIName = Literal["chat", "messages", "responses", "completions"]
API_NAMES: Sequence[APIName] = ("chat", "messages", "responses", "completions")
# Those in which a model may call tools.
WITH_TOOLS: Sequence[APIName] = ("chat", "messages", "responses")
PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "completions": "/v1/completions",
}
QUESTION = "What is 2 + 2?"
WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def body_of(api: APIName, text: str = QUESTION, **more: Any) -> Json:
    """Return a request for an answer to `text`."""
    asked: Json = {"model": "auto", **more}
    if api == "responses":
        return {"input": text, **asked}
    if api == "completions":
        return {"prompt": text, **asked}
    return {
        "messages": [{"role": "user", "content": text}],
        **({"max_tokens": 1000} if api == "messages" else {}),
        **asked,
    }


def weather_tool(api: APIName) -> Json:
    named = {"name": "weather", "description": "Tell the weather of a city."}
    if api == "messages":
        return {**named, "input_schema": WEATHER}
    if api == "responses":
        return {"type": "function", **named, "parameters": WEATHER}
    return {"type": "function", "function": {**named, "parameters": WEATHER}}


def turn_with_result(api: APIName, reply: Reply, result: str, text: str = QUESTION, **more: Any) -> Json:
    """Return the request that follows a reply with one call, with the result of the call."""
    call = reply.calls[0]
    body = body_of(api, text, **more)
    if api == "responses":
        output = {"type": "function_call_output", "call_id": call.id, "output": result}
        return {**body, "input": [{"role": "user", "content": text}, *reply.raw_turn, output]}
    if api == "messages":
        part = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        turns = [{"role": "assistant", "content": reply.raw_turn}, {"role": "user", "content": [part]}]
    else:
        turns = [*reply.raw_turn, {"role": "tool", "tool_call_id": call.id, "content": result}]
    return {**body, "messages": [*body["messages"], *turns]}


@dataclass(frozen=True)
class Call:
    id: str
    name: str
    arguments: Any


@dataclass
class Reply:
    """What a client of one API has read."""

    status: int
    headers: httpx.Headers
    model: str | None = None
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish: str | None = None
    """In the words of the client's API; None: the answer has no end."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    errors: list[Json] = field(default_factory=list)
    raw_turn: list[Any] = field(default_factory=list)
    """The assistant's turn, as the client would send it back."""

    @property
    def complete(self) -> bool:
        return self.finish is not None and not self.errors


def ask(http: httpx.Client, api: APIName, body: Json, *, url: str | None = None, **more: Any) -> Reply:
    """Send a request and read the whole answer, streamed or not."""
    with http.stream("POST", url or PATHS[api], json=body, **more) as reply:
        raw = reply.read()
    if reply.status_code != 200:
        return Reply(reply.status_code, reply.headers, errors=[reply.json()])
    answer = Reply(reply.status_code, reply.headers)
    if body.get("stream"):
        _read_stream(api, answer, events_of(raw))
    else:
        _READERS[api](answer, json.loads(raw))
    return answer


def events_of(raw: bytes) -> list[Any]:
    """Return the data of each event: objects parsed, [DONE] as text."""
    events = []
    for event in raw.decode().split("\n\n"):
        data = "\n".join(line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:"))
        if data:
            events.append(data if data == "[DONE]" else json.loads(data))
    return events


def _read_stream(api: APIName, answer: Reply, events: list[Any]) -> None:
    if api == "messages":
        _read_message_events(answer, events)
    elif api == "responses":
        _read_response_events(answer, events)
    else:
        _read_chunks(answer, events)


def _read_chat(answer: Reply, body: Json) -> None:
    choice = body["choices"][0]
    message = choice["message"]
    answer.model, answer.finish = body["model"], choice["finish_reason"]
    answer.text, answer.reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    answer.calls = [_chat_call(call) for call in message.get("tool_calls") or ()]
    answer.raw_turn = [message]
    _read_chat_usage(answer, body.get("usage"))


def _chat_call(call: Json) -> Call:
    return Call(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))


def _read_chat_usage(answer: Reply, usage: Json | None) -> None:
    if usage:
        answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _read_text(answer: Reply, body: Json) -> None:
    choice = body["choices"][0]
    answer.model, answer.finish, answer.text = body["model"], choice["finish_reason"], choice["text"]
    _read_chat_usage(answer, body.get("usage"))


def _read_chunks(answer: Reply, events: list[Any]) -> None:
    """Read chunks of chat and of text completions."""
    calls: dict[int, Json] = {}
    finish = None
    for event in events:
        if event == "[DONE]":
            answer.finish = finish
            continue
        if "error" in event:
            answer.errors.append(event["error"])
            continue
        answer.model = event["model"]
        _read_chat_usage(answer, event.get("usage"))
        for choice in event["choices"]:
            finish = choice.get("finish_reason") or finish
            delta = choice.get("delta") or {"content": choice.get("text")}
            answer.text += delta.get("content") or ""
            answer.reasoning += delta.get("reasoning_content") or ""
            for piece in delta.get("tool_calls") or ():
                call = calls.setdefault(piece["index"], {"id": "", "function": {"name": "", "arguments": ""}})
                call["id"] = piece.get("id") or call["id"]
                for name, value in (piece.get("function") or {}).items():
                    call["function"][name] += value or ""
    answer.calls = [_chat_call(call) for call in calls.values()]
    answer.raw_turn = [{"role": "assistant", "content": answer.text or None, "tool_calls": list(calls.values())}]


def _read_message(answer: Reply, body: Json) -> None:
    answer.model, answer.finish = body["model"], body["stop_reason"]
    answer.raw_turn = body["content"]
    for block in body["content"]:
        if block["type"] == "text":
            answer.text += block["text"]
        elif block["type"] == "thinking":
            answer.reasoning += block["thinking"]
        elif block["type"] == "tool_use":
            answer.calls.append(Call(block["id"], block["name"], block["input"]))
    usage = body["usage"]
    cached = [usage.get(name) or 0 for name in ("cache_read_input_tokens", "cache_creation_input_tokens")]
    answer.prompt_tokens = usage["input_tokens"] + sum(cached)
    answer.output_tokens = usage["output_tokens"]


class MessageEvents:
    """Put a message together, and check that its events follow one another as Anthropic's do."""

    def __init__(self) -> None:
        self.message: Json = {}
        self.blocks: list[Json] = []
        self.error: Json | None = None
        self.ended = False
        self._open: int | None = None

    def read(self, event: Json) -> None:
        assert not self.ended, f"{event['type']} after the end"
        getattr(self, event["type"], self.ignore)(event)

    def ignore(self, event: Json) -> None:
        """Read on after a ping, or an event that is newer than this client."""

    def message_start(self, event: Json) -> None:
        assert not self.message, "a second message_start"
        self.message = event["message"]

    def content_block_start(self, event: Json) -> None:
        assert self._open is None, "two blocks are open"
        assert event["index"] == len(self.blocks)
        self._open = event["index"]
        self.blocks.append({**event["content_block"], "json": ""})

    def content_block_delta(self, event: Json) -> None:
        assert event["index"] == self._open
        _add_delta(self.blocks[-1], event["delta"])

    def content_block_stop(self, event: Json) -> None:
        assert event["index"] == self._open
        self._open = None
        text = self.blocks[-1].pop("json")
        if self.blocks[-1]["type"] == "tool_use":
            self.blocks[-1]["input"] = json.loads(text) if text else {}

    def message_delta(self, event: Json) -> None:
        assert self._open is None, "a block is open"
        self.message |= event["delta"]
        self.message["usage"] = {**self.message["usage"], **event["usage"]}

    def message_stop(self, event: Json) -> None:
        self.ended = True

    def error_event(self, event: Json) -> None:
        self.error, self.ended = event["error"], True


def _read_message_events(answer: Reply, events: list[Any]) -> None:
    reader = MessageEvents()
    for event in events:
        reader.error_event(event) if event["type"] == "error" else reader.read(event)
    if reader.message:
        _read_message(answer, {**reader.message, "content": reader.blocks})
    if reader.error is not None:
        answer.errors.append(reader.error)
    if not reader.ended:
        answer.finish = None


def _add_delta(block: Json, delta: Json) -> None:
    if delta["type"] == "text_delta":
        block["text"] += delta["text"]
    elif delta["type"] == "thinking_delta":
        block["thinking"] += delta["thinking"]
    elif delta["type"] == "signature_delta":
        block["signature"] = delta["signature"]
    else:
        block["json"] += delta["partial_json"]


def _read_response(answer: Reply, body: Json) -> None:
    answer.model, answer.finish = body["model"], body["status"]
    answer.raw_turn = body["output"]
    for item in body["output"]:
        if item["type"] == "message":
            answer.text += "".join(part.get("text") or "" for part in item["content"])
        elif item["type"] == "reasoning":
            parts = [*item["summary"], *(item.get("content") or ())]
            answer.reasoning += "".join(part["text"] for part in parts)
        elif item["type"] == "function_call":
            answer.calls.append(Call(item["call_id"], item["name"], json.loads(item["arguments"])))
    if body.get("error"):
        answer.errors.append(body["error"])
    usage = body.get("usage")
    if usage:
        assert "cached_tokens" in usage["input_tokens_details"]
        assert "reasoning_tokens" in usage["output_tokens_details"]
        answer.prompt_tokens, answer.output_tokens = usage["input_tokens"], usage["output_tokens"]


def _read_response_events(answer: Reply, events: list[Any]) -> None:
    """Read the last event's response, and check the numbers of all events."""
    last = events[-1]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    if last["type"] in ("response.completed", "response.incomplete", "response.failed"):
        _read_response(answer, last["response"])
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert last["type"] == "response.failed" or said == answer.text
    answer.text = said


_READERS = {"chat": _read_chat, "messages": _read_message, "responses": _read_response, "completions": _read_text}
