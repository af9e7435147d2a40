"""What a body says of its past: a tool loop that it continues, reasoning that it carries. Never fails, asks nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.routing.trail import Trail, newest_question

_RESULTS = ("tool", "function")


@dataclass(frozen=True, slots=True)
class Past:
    """`marks` are digests by which the model that produced it may be known, the surest first."""

    in_tool_loop: bool = False
    """The newest turns that are not the user's answer tool calls."""
    has_reasoning: bool = False
    """Some assistant turn carries reasoning, thinking or a signature of them."""
    marks: tuple[str, ...] = ()


NO_PAST = Past()


def past_of(messages: Any) -> Past:
    """`messages` as the caller sent them; only the newest turn of the loop and of reasoning are hashed."""
    if not isinstance(messages, list):
        return NO_PAST
    in_tool_loop = False
    newest = True
    marks: list[str] = []
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if not isinstance(message, (dict, Mapping)):  # most are a dict, which is told faster
            continue
        if message.get("role") != "assistant":
            in_tool_loop = in_tool_loop or (newest and _is_result(message))
            continue
        in_newest_loop, newest = newest and in_tool_loop, False
        trail = _trail(message, calls=in_newest_loop)
        if trail is None:
            continue
        question = newest_question(messages, place)
        marks += trail.reasoning_marks(question)
        if in_newest_loop:
            marks += trail.call_marks(question)
        if trail.has_reasoning:
            return Past(in_tool_loop, has_reasoning=True, marks=_distinct(marks))
    return Past(in_tool_loop, marks=_distinct(marks))


def _is_result(message: Mapping[str, Any]) -> bool:
    """Of a tool call: a turn of its own, or a part of the user's."""
    if message.get("role") in _RESULTS:
        return True
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content
    )


def _trail(message: Mapping[str, Any], *, calls: bool) -> Trail | None:
    """None where there is nothing to see, which is quick to tell of most turns of a long conversation."""
    content = message.get("content")
    if not (calls or isinstance(content, list) or _carries(message)):
        return None
    trail = Trail()
    trail.add(message)
    return trail if calls or trail.has_reasoning else None


def _carries(message: Mapping[str, Any]) -> bool:
    return not _CARRYING.isdisjoint(message) and any(message.get(name) for name in _CARRYING)


_CARRYING = frozenset({"reasoning_content", "reasoning", "reasoning_details", "thinking_blocks", "signature"})


def _distinct(marks: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(marks))
