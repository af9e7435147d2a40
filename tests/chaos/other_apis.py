"""Clients of Anthropic's Messages and of OpenAI's Responses. What they read is put into chat's shape, to be judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.chaos.questions import Json, Question

# The word of each API for an answer that is whole.
_FINISHED = {"end_turn": "stop", "completed": "stop"}


@dataclass(frozen=True)
class OtherAPI:
    path: str
    body: Callable[[Question], Json]
    completion: Callable[[Json], Json]
    """A whole answer → a chat completion."""
    chunks: Callable[[Json], Iterator[Json | str]]
    """An event → the chat chunks, or [DONE], that say the same."""
    error: Callable[[Any], Any]
    """The body of a failure → OpenAI's."""


def chat_events(api: OtherAPI, events: Iterable[bytes]) -> list[bytes]:
    """Return the events of a stream as those of a chat stream. What is no event of the API stays as it is."""
    found = []
    for event in events:
        if event.startswith(b":"):
            continue
        name, newline, data = event.partition(b"\n")
        if not (name.startswith(b"event: ") and newline and data.startswith(b"data: ")):
            found.append(event)
            continue
        payload = json.loads(data.removeprefix(b"data: "))
        if payload["type"].encode() != name.removeprefix(b"event: "):
            found.append(event)
            continue
        for chunk in api.chunks(payload):
            text = chunk if isinstance(chunk, str) else json.dumps(chunk)
            found.append(b"data: " + text.encode())
    return found


def _content(text: str) -> Json:
    return {"choices": [{"delta": {"content": text}}]}


def _message_body(question: Question) -> Json:
    return {"messages": [{"role": "user", "content": question.prompt}], "max_tokens": 1_000_000}


def _message(body: Json) -> Json:
    text = "".join(block["text"] for block in body["content"])
    finish = _FINISHED.get(body["stop_reason"], body["stop_reason"])
    return {"model": body["model"], "choices": [{"message": {"content": text}, "finish_reason": finish}]}


def _messages_error(body: Any) -> Any:
    if not isinstance(body, dict) or body.get("type") != "error":
        return body
    return {"error": {"param": None, "code": body["error"]["type"], **body["error"]}}


def _message_events(event: Json) -> Iterator[Json | str]:
    kind = event["type"]
    if kind == "message_start":
        yield {"model": event["message"]["model"], "choices": []}
    elif kind == "content_block_delta":
        yield _content(event["delta"]["text"])
    elif kind == "message_stop":
        yield "[DONE]"
    elif kind == "error":
        yield _messages_error(event)


def _response_body(question: Question) -> Json:
    return {"input": question.prompt, "store": False}


def _response(body: Json) -> Json:
    parts = [part for item in body["output"] for part in item.get("content") or ()]
    text = "".join(part["text"] for part in parts)
    finish = _FINISHED.get(body["status"], body["status"])
    return {"model": body["model"], "choices": [{"message": {"content": text}, "finish_reason": finish}]}


def _response_events(event: Json) -> Iterator[Json | str]:
    kind = event["type"]
    if kind == "response.created":
        yield {"model": event["response"]["model"], "choices": []}
    elif kind == "response.output_text.delta":
        yield _content(event["delta"])
    elif kind == "response.completed":
        yield {"model": event["response"]["model"], "choices": []}
        yield "[DONE]"
    elif kind == "response.failed":
        yield {"error": {"type": "server_error", "param": None, **event["response"]["error"]}}


MESSAGES = OtherAPI("/v1/messages", _message_body, _message, _message_events, _messages_error)

RESPONSES = OtherAPI("/v1/responses", _response_body, _response, _response_events, lambda body: body)
