"""Requests, chunks and readers for the tests of the Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from proxy.server.api.messages_request import MessagesTranslation, translate
from tests.support.captured_requests import names_of

ID = "0123456789abcdef0123456789abcdef"

CAPTURED = names_of("messages")

EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)

TOOL = {"name": "Read", "description": "Reads a file", "input_schema": {"type": "object", "properties": {}}}


def a_request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    asked = list(messages) or [{"role": "user", "content": "hi"}]
    return {"model": "auto", "max_tokens": 100, "messages": asked, **fields}


def translated(*messages: dict[str, Any], **fields: Any) -> MessagesTranslation:
    return translate(a_request(*messages, **fields), answer_id=ID, created_at=1_700_000_000)


def chat_messages(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = translated(*messages, **fields).body["messages"]
    return found


def a_call(call_id: str = "toolu_1", name: str = "Read", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def a_result(content: Any, call_id: str = "toolu_1", **members: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **members}


def an_image(data: str = "aGk=") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def a_completion(
    message: Mapping[str, Any], finish_reason: str | None = "stop", usage: Any = None, **choice: Any
) -> dict[str, Any]:
    made = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason, **choice}
    return {"id": "c", "object": "chat.completion", "model": "m", "choices": [made], "usage": usage}


def a_chunk(delta: Mapping[str, Any] | None = None, finish_reason: str | None = None, **choice: Any) -> dict[str, Any]:
    made = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason, **choice}
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [made]}


def a_call_delta(arguments: str, index: int = 0, **call: Any) -> dict[str, Any]:
    """Return a piece of a call. `id` and `name` stand in its first piece alone."""
    name = {"name": call.pop("name")} if "name" in call else {}
    return {"tool_calls": [{"index": index, **call, "function": {**name, "arguments": arguments}}]}


def events_of(data: bytes) -> list[dict[str, Any]]:
    """Parse events, and check that each says its type twice and is one of Anthropic's own."""
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        kind, payload = block.split("\n")
        event = json.loads(payload.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        EVENTS.validate_python(event)
        events.append(event)
    return events


def streamed(translation: MessagesTranslation, chunks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Translate a whole stream."""
    stream = translation.stream("m")
    data = b"".join(stream.write(chunk) for chunk in chunks)
    return events_of(data + stream.finish())


def accumulated(events: Iterable[Mapping[str, Any]]) -> Message:
    """Read a stream as Anthropic's SDK does."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        snapshot = accumulate_event(event=EVENTS.validate_python(event), current_snapshot=snapshot, json_bufs=buffers)
    return Message.model_validate(snapshot.to_dict())


def check_order(events: list[dict[str, Any]]) -> None:
    """Check that blocks follow one another, each begun, filled and ended, between the message's start and end."""
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    open_block: int | None = None
    begun = 0
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None
            assert event["index"] == begun
            open_block, begun = begun, begun + 1
        else:
            assert event["index"] == open_block
        if event["type"] == "content_block_stop":
            open_block = None
    assert open_block is None
