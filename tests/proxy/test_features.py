"""What routing reads of a conversation, on the shapes that clients really send."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.routing.features import CUT, MEDIA_TOKENS, estimate_tokens, needs_of, routing_text

LONG = "Please explain in detail how a steam engine converts heat into motion."
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_newest_user_turn_counts_and_nothing_else_does() -> None:
    messages = [
        {"role": "system", "content": "You are a pirate."},
        user("An older question."),
        {"role": "assistant", "content": "Arr."},
        user(LONG),
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "a result"},
    ]

    assert routing_text(messages) == LONG


def test_a_short_turn_is_read_with_up_to_two_before_it() -> None:
    said = [user("first"), user("second"), user(LONG), {"role": "assistant", "content": "Go on?"}, user("yes")]

    assert routing_text(said) == f"second\n{LONG}\nyes"
    assert routing_text(said[:1]) == "first"


def test_only_text_parts_are_read() -> None:
    parts = [{"type": "text", "text": LONG}, IMAGE, {"type": "text", "text": "And why?"}]

    assert routing_text([user(parts)]) == f"{LONG}\nAnd why?"


def test_a_long_text_is_cut_in_the_middle() -> None:
    text = "a" * 5000 + "b" * 5000

    assert routing_text([user(text)]) == "a" * CUT + "\n" + "b" * CUT


@pytest.mark.parametrize("content", [None, "", "  ", 7, [], [None], [{"type": "text"}], [{"type": ["x"], "text": "y"}]])
def test_a_turn_without_text_is_passed_over(content: Any) -> None:
    assert routing_text([user(LONG), user(content)]) == LONG
    assert routing_text([user(content)]) == ""


def test_attachments_count_flat_and_are_not_looked_into() -> None:
    assert estimate_tokens({"messages": [user([IMAGE])]}) < 2 * MEDIA_TOKENS
    assert estimate_tokens({"messages": [user("word " * 4000)]}) == pytest.approx(5000, rel=0.01)
    assert estimate_tokens({"messages": [user("字" * 1000)]}) == pytest.approx(750, rel=0.05)


def test_tool_schemas_count_as_tokens() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000}}]

    assert estimate_tokens({"messages": [user("hi")], "tools": tools}) > 1000


@pytest.mark.parametrize(
    ("body", "need"),
    [
        ({"tools": [{}]}, "tools"),
        ({"functions": [{}]}, "tools"),
        ({"messages": [user([IMAGE])]}, "vision"),
        ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "audio"),
        ({"modalities": ["text", "audio"]}, "audio"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema"),
    ],
)
def test_what_a_request_needs_is_seen(body: dict[str, Any], need: str) -> None:
    needs = needs_of({"messages": [user("hi")], **body})

    assert {name for name in ("tools", "vision", "audio", "json_schema") if getattr(needs, name)} == {need}


@pytest.mark.parametrize(
    ("body", "limit", "answers"),
    [
        ({}, None, 1),
        ({"max_tokens": 7, "n": 3}, 7, 3),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 9, 1),
        ({"max_tokens": "7", "n": True}, None, 1),
        ({"max_tokens": 10**400, "n": -1}, None, 1),
        ({"n": 10**6}, None, 128),
        ({"tools": 3, "modalities": 4, "response_format": []}, None, 1),
    ],
)
def test_limits_are_read_where_they_are_numbers(body: dict[str, Any], limit: int | None, answers: int) -> None:
    needs = needs_of({"messages": [user("hi")], **body})

    assert (needs.max_output_tokens, needs.answers) == (limit, answers)
