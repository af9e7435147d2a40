"""Requests of the Responses API, chunks of chat models, and the events that are made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from proxy.server.api.responses_answer import ResponseStream
from proxy.server.api.responses_request import ResponsesTranslation, translate
from tests.support.captured_requests import names_of

ID = "0123456789abcdef0123456789abcdef"
CREATED_AT = 1_800_000_000
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

CAPTURED = names_of("responses")


def translated(**fields: Any) -> ResponsesTranslation:
    return translate({"model": "auto", "input": "hi", **fields}, answer_id=ID, created_at=CREATED_AT)


def messages_of(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = translated(input=list(items), **fields).body["messages"]
    return messages


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def call_delta(index: int, arguments: str = "", **named: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": named["name"]} if "name" in named else {})}
    return {"index": index, "function": function, **({"id": named["id"]} if "id" in named else {})}


def completion(finish_reason: str = "stop", usage: Any = None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, **more}


def read_events(data: bytes) -> list[dict[str, Any]]:
    """Parse events, each as the official client would, and check what all have in common."""
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        name, payload = block.split("\n")
        event = json.loads(payload.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def played(stream: ResponseStream, chunks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return read_events(b"".join([*(stream.write(each) for each in chunks), stream.finish()]))


def check_events(events: list[dict[str, Any]]) -> None:
    """Check that the official types can read events, that none is missing, and that items never overlap."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    opened: list[int] = []
    done = parts = 0
    for event in events:
        if event["type"] != "response.failed":  # its codes are more than the types list
            EVENT.validate_python(event)
        if event["type"] == "response.output_item.added":
            assert not opened
            assert event["output_index"] == done
            opened.append(done)
            parts = 0
        elif event["type"] == "response.output_item.done":
            assert opened == [event["output_index"]]
            opened.clear()
            done += 1
        elif "output_index" in event:
            assert opened == [event["output_index"]]
            parts += event["type"] == "response.content_part.added"
            assert event.get("content_index", parts - 1) == parts - 1


def check_response(response: Mapping[str, Any]) -> Response:
    return Response.model_validate(dict(response))
