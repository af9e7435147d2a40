"""Tools that a model is offered, and drafts of prompts that offer them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from router_core.documents import JsonObject
from router_core.validation.families.helpers import LONG, Draft
from router_core.validation.graders import ExpectedCall, Grader, NoToolCallGrader, ToolCallsGrader
from router_core.validation.graders.answers import ToolCall, write_reply
from router_core.validation.validation_set import Message

TEXT: JsonObject = {"type": "string"}
WHOLE: JsonObject = {"type": "integer"}
NUMBER: JsonObject = {"type": "number"}
SWITCH: JsonObject = {"type": "boolean"}
DATE: JsonObject = {"type": "string", "description": "YYYY-MM-DD"}
TIME: JsonObject = {"type": "string", "description": "HH:MM, 24-hour clock"}


def described(kind: JsonObject, description: str) -> JsonObject:
    return {**kind, "description": description}


def one_of(*values: str) -> JsonObject:
    return {"type": "string", "enum": list(values)}


def list_of(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


def record(optional: Sequence[str] = (), /, **properties: JsonObject) -> JsonObject:
    """Return the schema of an object with these properties, which are required unless they are named as optional."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def tool(name: str, description: str, optional: Sequence[str] = (), /, **parameters: JsonObject) -> JsonObject:
    function = {"name": name, "description": description, "parameters": record(optional, **parameters)}
    return {"type": "function", "function": function}


def name_of(offered: JsonObject) -> str:
    function = offered["function"]
    assert isinstance(function, dict)
    return str(function["name"])


def calling(
    text: str,
    tools: Iterable[JsonObject],
    calls: Sequence[ExpectedCall],
    level: int,
    *,
    system: str | None = None,
    turns: Sequence[Message] = (),
) -> Draft:
    """Draft a prompt that is to be answered with exactly these calls."""
    reference = write_reply("", [ToolCall(call.name, dict(call.arguments)) for call in calls])
    grader = ToolCallsGrader(tuple(calls), case_sensitive=True)
    return Draft(text, grader, reference, level, LONG, system=system, tools=tuple(tools), turns=tuple(turns))


def answering(
    text: str,
    tools: Iterable[JsonObject],
    answer: Grader,
    reference: str,
    level: int,
    *,
    system: str | None = None,
    turns: Sequence[Message] = (),
) -> Draft:
    """Draft a prompt that is to be answered in words, without another call."""
    grader = NoToolCallGrader(answer)
    return Draft(text, grader, reference, level, LONG, system=system, tools=tuple(tools), turns=tuple(turns))


def call(name: str, /, **arguments: object) -> ExpectedCall:
    return ExpectedCall(name, arguments)


def called(*steps: tuple[ExpectedCall, object], first: int = 1) -> tuple[Message, ...]:
    """Return a turn with these calls, and the result of each.

    Args:
        first: the number of the first call of the turn. Some providers take no ids but of nine letters and digits.
    """
    ids = [f"call{number:05}" for number in range(first, first + len(steps))]
    made = [
        {"id": each, "type": "function", "function": {"name": step.name, "arguments": json.dumps(dict(step.arguments))}}
        for each, (step, _) in zip(ids, steps, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": each, "content": json.dumps(result)}
        for each, (_, result) in zip(ids, steps, strict=True)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made}, *results
