from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router_core.validation.graders.answers import read_reply

Json = dict[str, Any]
# The newest user text → the answer.
# A message of Anthropic's API.
CLAUDE: Json = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1, "output_tokens": 1},
}

Skill = Callable[[str], str]


@dataclass(frozen=True)
class Step:
    """Describe one scripted answer. Whatever is None comes from the server's skill."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Json | bytes | None = None
    message: Json | None = None
    """The assistant message, in place of the skill's words."""
    finish_reason: str | None = "stop"
    usage: Json | None = None
    extra: Json = field(default_factory=dict)
    """More top-level fields of a completion and of every chunk."""
    events: Sequence[Json | bytes] | None = None
    """A whole stream, as it is: objects become data lines, bytes go out untouched."""
    delay_s: float = 0.0
    drip_s: float = 0.0
    cut_after: int | None = None
    """Events of a stream, after which the connection is dropped."""
    done: bool = True
    hang: bool = False
    """Say nothing until the client leaves."""
    drop: bool = False
    """Read the request and drop the connection without a byte."""
    flood: bool = False
    """Send a body without end, until the client leaves."""


def usage_of(prompt: str, answer: str) -> Json:
    prompt_tokens, completion_tokens = len(prompt.split()) + 3, max(1, len(answer.split()))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def newest_user_text(body: Mapping[str, Any]) -> str:
    for message in reversed(body.get("messages") or []):
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else []
        return " ".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return ""


def message_of(words: str, body: Mapping[str, Any]) -> Json:
    """Return the message of a model that says these words, and calls tools where they are written calls of it."""
    text, calls = read_reply(words)
    if not calls or not body.get("tools"):
        return {"role": "assistant", "content": words}
    made = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for number, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": text or None, "tool_calls": made}


def completion(body: Mapping[str, Any], step: Step, words: str) -> Json:
    message = step.message or message_of(words, body)
    ended = "tool_calls" if step.message is None and "tool_calls" in message else step.finish_reason
    choices = [
        {"index": index, "message": message, "finish_reason": ended, "logprobs": _logprobs(body)}
        for index in range(int(body.get("n") or 1))
    ]
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body.get("model"),
        "system_fingerprint": "fp_scripted",
        "choices": choices,
        "usage": step.usage or usage_of(newest_user_text(body), words),
        **step.extra,
    }


def chunks(body: Mapping[str, Any], step: Step, words: str) -> Iterator[Json]:
    """Return the chunks of one answer, in the order in which OpenAI sends them."""
    base = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": body.get("model"),
        "system_fingerprint": "fp_scripted",
        **step.extra,
    }
    answers = range(int(body.get("n") or 1))
    for delta in _deltas(step, words):
        for index in answers:
            choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": _logprobs(body)}
            yield {**base, "choices": [choice]}
    if step.finish_reason is not None:
        for index in answers:
            yield {**base, "choices": [{"index": index, "delta": {}, "finish_reason": step.finish_reason}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**base, "choices": [], "usage": step.usage or usage_of(newest_user_text(body), words)}


def _deltas(step: Step, words: str) -> Iterator[Json]:
    message = step.message or {"content": words}
    yield {"role": "assistant", "content": ""}
    for name in ("reasoning_content", "content", "refusal"):
        for place, piece in enumerate((message.get(name) or "").split(" ")):
            if piece:
                yield {name: f" {piece}" if place else piece}
    calls = message.get("tool_calls") or []
    for index, call in enumerate(calls):
        function = {"name": call["function"]["name"], "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]}
    for index, call in enumerate(calls):  # pieces of parallel calls, each under its own index
        arguments = call["function"]["arguments"]
        for start in range(0, len(arguments), 5):
            piece = {"arguments": arguments[start : start + 5]}
            yield {"tool_calls": [{"index": index, "function": piece}]}


def _logprobs(body: Mapping[str, Any]) -> Json | None:
    if not body.get("logprobs"):
        return None
    return {"content": [{"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": []}], "refusal": None}


def sse(event: Json | bytes) -> bytes:
    return event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"


def error_body(message: str, kind: str, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
