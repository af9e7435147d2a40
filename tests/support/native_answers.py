"""Answers of Anthropic's Messages and OpenAI's Responses, whole and streamed, as their own servers write them."""

from __future__ import annotations

import json
from typing import Any

SIGNATURE = "EqQBCkgIBhABGAIiQHRoaXMgaXMgYSBzaWduYXR1cmUgb2YgdGhpbmtpbmcgdGhhdCBpcyBsb25n"
ENCRYPTED = "gAAAAABpZW5jcnlwdGVkIHJlYXNvbmluZyBvZiBhIG1vZGVsIHRoYXQgaXMgbG9uZyBlbm91Z2g="
CALL_ID = "toolu_01A09q90qw90lq917835lq9"
OPENAI_CALL_ID = "call_zFyLq81hQ5yLw4NqkVn3Xo2T"


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    return f"event: {name or payload['type']}\ndata: {json.dumps(payload)}\n\n".encode()


def _block(index: int, block: dict[str, Any], *deltas: dict[str, Any]) -> list[bytes]:
    return [
        event({"type": "content_block_start", "index": index, "content_block": block}),
        *(event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas),
        event({"type": "content_block_stop", "index": index}),
    ]


MESSAGE_USAGE: dict[str, Any] = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 300,
    "cache_read_input_tokens": 2000,
    "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
    "output_tokens": 1,
}

MESSAGE_START: dict[str, Any] = {
    "type": "message_start",
    "message": {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "theirs",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": MESSAGE_USAGE,
    },
}

THINKING_EVENTS = _block(
    0,
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "Let me "},
    {"type": "thinking_delta", "thinking": "see."},
    {"type": "signature_delta", "signature": SIGNATURE},
)

TEXT_EVENTS = _block(
    1,
    {"type": "text", "text": ""},
    {"type": "text_delta", "text": 'The "model": "theirs" is ü.'},
)

CALL_EVENTS = _block(
    2,
    {"type": "tool_use", "id": CALL_ID, "name": "run", "input": {}},
    {"type": "input_json_delta", "partial_json": '{"command": '},
    {"type": "input_json_delta", "partial_json": '"ls"}'},
)

MESSAGE_DELTA = {
    "type": "message_delta",
    "delta": {"stop_reason": "tool_use", "stop_sequence": None},
    "usage": {"output_tokens": 40, "output_tokens_details": {"thinking_tokens": 15}},
}

MESSAGE_EVENTS = (
    event(MESSAGE_START),
    event({"type": "ping"}),
    *THINKING_EVENTS,
    *TEXT_EVENTS,
    event({"type": "something_new", "of": "next year"}),
    *CALL_EVENTS,
    event(MESSAGE_DELTA),
    event({"type": "message_stop"}),
)

MESSAGE: dict[str, Any] = {
    "model": "theirs",
    "id": "msg_01",
    "type": "message",
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "Let me see.", "signature": SIGNATURE},
        {"type": "text", "text": 'The "model": "theirs" is ü.'},
        {"type": "tool_use", "id": CALL_ID, "name": "run", "input": {"command": "ls"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {**MESSAGE_USAGE, "output_tokens": 40, "output_tokens_details": {"thinking_tokens": 15}},
}

RESPONSE_OUTPUT: list[dict[str, Any]] = [
    {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "Look first."}],
        "encrypted_content": ENCRYPTED,
    },
    {
        "id": "msg_1",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Looking ü", "annotations": [], "logprobs": []}],
    },
    {
        "id": "fc_1",
        "type": "function_call",
        "status": "completed",
        "call_id": OPENAI_CALL_ID,
        "name": "run",
        "arguments": '{"command":"ls"}',
    },
]

RESPONSE_USAGE: dict[str, Any] = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 0},
    "output_tokens": 30,
    "output_tokens_details": {"reasoning_tokens": 12},
    "total_tokens": 130,
}


def a_response(status: str = "completed", **members: Any) -> dict[str, Any]:
    """Return a whole response. One of its tools has a model of its own, which stands before the response's."""
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": 'Say "model": "x".',
        "tools": [{"type": "image_generation", "model": "theirs"}],
        "model": "theirs",
        "output": RESPONSE_OUTPUT,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "usage": RESPONSE_USAGE,
        **members,
    }


RESPONSE = a_response()

_BEGUN = a_response("in_progress", output=[], usage=None)


def _numbered(*payloads: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(event({**payload, "sequence_number": number}) for number, payload in enumerate(payloads))


def _of_item(index: int, kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind, "output_index": index, "item_id": RESPONSE_OUTPUT[index]["id"], **members}


def _whole_item(index: int, kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind, "output_index": index, "item": {**RESPONSE_OUTPUT[index], **members}}


_TEXT = {"content_index": 0, "logprobs": []}

RESPONSE_EVENTS = _numbered(
    {"type": "response.created", "response": _BEGUN},
    {"type": "response.in_progress", "response": _BEGUN},
    _whole_item(0, "response.output_item.added", summary=[], encrypted_content=""),
    _of_item(0, "response.reasoning_summary_text.delta", summary_index=0, delta="Look "),
    _of_item(0, "response.reasoning_summary_text.delta", summary_index=0, delta="first."),
    _whole_item(0, "response.output_item.done"),
    _whole_item(1, "response.output_item.added", content=[], status="in_progress"),
    _of_item(
        1,
        "response.content_part.added",
        content_index=0,
        part={"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    ),
    _of_item(1, "response.output_text.delta", delta="Looking ", **_TEXT),
    _of_item(1, "response.output_text.delta", delta="ü", **_TEXT),
    _of_item(1, "response.output_text.done", text="Looking ü", **_TEXT),
    _of_item(1, "response.something_new", of="next year"),
    _whole_item(1, "response.output_item.done"),
    _whole_item(2, "response.output_item.added", arguments="", status="in_progress"),
    _of_item(2, "response.function_call_arguments.delta", delta='{"command":'),
    _of_item(2, "response.function_call_arguments.delta", delta='"ls"}'),
    _of_item(2, "response.function_call_arguments.done", arguments='{"command":"ls"}', name="run"),
    _whole_item(2, "response.output_item.done"),
    {"type": "response.completed", "response": RESPONSE},
)
