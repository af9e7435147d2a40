from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from router_core.documents import (
    MAX_SET_BYTES,
    DocumentTooLarge,
    Fields,
    JsonObject,
    parse_json,
    read_bounded,
    short_repr,
)
from router_core.errors import InvalidValidationSet
from router_core.validation.graders import Grader, ToolCallsGrader, parse_grader
from router_core.validation.validation_set import Message, ValidationPrompt, ValidationSet

MAX_PROMPTS = 5_000
MAX_LINE_BYTES = 1_000_000
MAX_ANSWER_TOKENS = 32_768
DEFAULT_MAX_TOKENS = 512
MAX_TOOLS = 128

_FIELDS = ("id", "family", "prompt", "messages", "tools", "tool_choice", "grader", "max_tokens")
_NOTES = ("level", "language", "reference")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOL_CHOICES = ("auto", "none", "required")


def load_validation_set(path: Path) -> ValidationSet:
    """Read a user's validation set from JSONL.

    Raises:
        InvalidValidationSet: at the first line that cannot be used; it names the file, the line, the field and the fix.
    """
    prompts: dict[str, tuple[int, ValidationPrompt]] = {}
    for number, line in _lines(path):
        try:
            prompt = parse_prompt(_parse_object(line), default_id=f"line-{number}")
            if prompt.id in prompts:
                earlier = prompts[prompt.id][0]
                raise InvalidValidationSet(f"field 'id' repeats {prompt.id!r} of line {earlier}: give it another id")
        except InvalidValidationSet as error:
            raise InvalidValidationSet(f"{path}, line {number}: {error}") from None
        prompts[prompt.id] = number, prompt
    if not prompts:
        raise InvalidValidationSet(f"{path}: there is no prompt in it; write one JSON object on each line")
    return ValidationSet.from_prompts(prompt for _, prompt in prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers, from 1, and lines; blank lines and a leading byte order mark are dropped."""
    try:
        content = read_bounded(path, MAX_SET_BYTES)
    except OSError as error:
        raise InvalidValidationSet(f"{path}: cannot be read: {error.strerror}") from None
    except DocumentTooLarge as error:
        raise InvalidValidationSet(f"{path}: {error}") from None
    found = 0
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not raw.strip():
            continue
        found += 1
        if found > MAX_PROMPTS:
            raise InvalidValidationSet(f"{path}, line {number}: more than {MAX_PROMPTS} prompts; keep the best of them")
        yield number, _decode(path, number, raw)


def _decode(path: Path, number: int, raw: bytes) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise InvalidValidationSet(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; shorten the prompt")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidValidationSet(
            f"{path}, line {number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from None


def _parse_object(line: str) -> JsonObject:
    try:
        value = parse_json(line, _without_repeats)
    except json.JSONDecodeError as error:
        raise InvalidValidationSet(
            f"not JSON at column {error.colno}: {error.msg}; write one object per line"
        ) from None
    except InvalidValidationSet:
        raise
    except ValueError as error:
        raise InvalidValidationSet(f"not usable JSON: {error}; write one flat object per line") from None
    if not isinstance(value, dict):
        raise InvalidValidationSet(
            f'must be a JSON object such as {{"prompt": …, "grader": …}}; got {short_repr(value)}'
        )
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise InvalidValidationSet(f"field {key!r} is stated twice: keep one")
        found[key] = value
    return found


def parse_prompt(record: Mapping[str, object], *, default_id: str) -> ValidationPrompt:
    """Read one prompt from its JSON object. Raises InvalidValidationSet that names the field."""
    fields = Fields(record, (*_FIELDS, *_NOTES))
    tools = _tools(fields)
    messages = _messages(fields)
    grader = parse_grader(fields.mapping("grader"))
    names = [str(tool["function"]["name"]) for tool in tools]
    _check_tools_are_offered(messages, grader, names)
    return ValidationPrompt(
        id=fields.text("id", default_id),
        family=fields.text("family", "custom"),
        messages=messages,
        grader=grader,
        max_tokens=fields.whole_number("max_tokens", 1, MAX_ANSWER_TOKENS, DEFAULT_MAX_TOKENS),
        level=fields.whole_number("level", 1, 3) if fields.has("level") else None,
        language=fields.text("language", "en"),
        reference=fields.optional_text("reference"),
        tools=tools,
        tool_choice=_tool_choice(fields, names),
    )


def _check_tools_are_offered(messages: Sequence[Message], grader: Grader, names: Sequence[str]) -> None:
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    expected = grader.calls if isinstance(grader, ToolCallsGrader) else ()
    for name in (*(call["function"]["name"] for call in calls), *(call.name for call in expected)):
        if name not in names:
            raise InvalidValidationSet(f"field 'tools' has no tool {name!r}, which is called: add it")


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    tools = fields.values.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise fields.error("tools", f"a list of 1 to {MAX_TOOLS} tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{index}]")
        if name in seen:
            raise InvalidValidationSet(f"field 'tools' has {name!r} twice: keep one")
        seen.add(name)
    return tuple(tools)


def _check_tool(tool: object, where: str) -> str:
    """Return the name of a tool in OpenAI's form."""
    if not isinstance(tool, dict):
        raise InvalidValidationSet(f"field {where!r} must be an object with type and function; got {short_repr(tool)}")
    fields = Fields(tool, ("type", "function"), f"{where}.")
    if fields.text("type") != "function":
        raise fields.error("type", "'function'")
    function = Fields(fields.mapping("function"), ("name", "description", "parameters", "strict"), f"{where}.function.")
    name = function.text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise function.error("name", "1 to 64 letters, digits, underscores and hyphens")
    function.optional_text("description")
    function.flag("strict")
    if function.has("parameters"):
        function.mapping("parameters")
    return name


def _tool_choice(fields: Fields, names: Sequence[str]) -> str | Mapping[str, object] | None:
    choice = fields.values.get("tool_choice")
    if choice is None:
        return None
    expected = f"one of {', '.join(_TOOL_CHOICES)}, or a function that 'tools' has"
    match choice:
        case str() if choice in _TOOL_CHOICES and names:
            return choice
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return {"type": "function", "function": {"name": name}}
    raise fields.error("tool_choice", expected)


def _messages(fields: Fields) -> tuple[Message, ...]:
    if fields.has("prompt") == fields.has("messages"):
        stated = "both" if fields.has("prompt") else "neither"
        raise InvalidValidationSet(f"state either 'prompt' (a string) or 'messages' (a list), not {stated}")
    if fields.has("prompt"):
        return ({"role": "user", "content": fields.text("prompt")},)
    turns = fields.values["messages"]
    if not isinstance(turns, list) or not turns:
        raise fields.error("messages", 'a list such as [{"role": "user", "content": "…"}]')
    messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    if messages[-1]["role"] not in ("user", "tool"):
        raise InvalidValidationSet(
            "field 'messages' must end with a user turn or a tool's result: the model is to answer it"
        )
    _check_results(messages)
    return messages


def _check_results(messages: Sequence[Message]) -> None:
    """Check that the results of all calls of a turn come right after it, as providers demand."""
    open_calls: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                raise InvalidValidationSet(
                    f"field 'messages[{index}].tool_call_id' must be the id of a call of the turn before, which has no"
                    " result yet"
                )
            open_calls.remove(message["tool_call_id"])
        elif open_calls:
            break
        else:
            open_calls = [call["id"] for call in message.get("tool_calls", ())]
    if open_calls:
        raise InvalidValidationSet(f"field 'messages' has no result of the tool call {open_calls[0]!r}: add it")


def _message(turn: object, index: int) -> Message:
    if not isinstance(turn, dict):
        raise InvalidValidationSet(
            f"field 'messages[{index}]' must be an object with role and content; got {short_repr(turn)}"
        )
    role = turn.get("role")
    more = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ()) if isinstance(role, str) else ()
    fields = Fields(turn, ("role", "content", *more), f"messages[{index}].")
    if (role := fields.text("role")) not in _ROLES:
        raise fields.error("role", f"one of {', '.join(_ROLES)}")
    if role == "tool":
        return {"role": role, "tool_call_id": fields.text("tool_call_id"), "content": fields.text("content")}
    if fields.has("tool_calls"):
        calls = fields.values["tool_calls"]
        if not isinstance(calls, list) or not calls:
            raise fields.error("tool_calls", "a list of calls")
        made = [_call(call, f"messages[{index}].tool_calls[{place}]") for place, call in enumerate(calls)]
        return {"role": role, "content": fields.optional_text("content"), "tool_calls": made}
    return {"role": role, "content": fields.text("content")}


def _call(call: object, where: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise InvalidValidationSet(f"field {where!r} must be an object with id and function; got {short_repr(call)}")
    fields = Fields(call, ("id", "type", "function"), f"{where}.")
    if fields.text("type") != "function":
        raise fields.error("type", "'function'")
    function = Fields(fields.mapping("function"), ("name", "arguments"), f"{where}.function.")
    arguments = function.text("arguments")
    try:
        is_object = isinstance(parse_json(arguments), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise function.error("arguments", "the text of a JSON object")
    return {
        "id": fields.text("id"),
        "type": "function",
        "function": {"name": function.text("name"), "arguments": arguments},
    }
