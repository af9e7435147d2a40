from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.routing.requirements import MEDIA_TOKENS, estimate_tokens, requirement_sources, requirements_of, routing_text
from router_core.text import MAX_END_CHARS

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
    messages = [user("first"), user("second"), user(LONG), {"role": "assistant", "content": "Go on?"}, user("yes")]

    assert routing_text(messages) == f"second\n{LONG}\nyes"
    assert routing_text(messages[:1]) == "first"


def test_only_text_parts_are_read() -> None:
    parts = [{"type": "text", "text": LONG}, IMAGE, {"type": "text", "text": "And why?"}]

    assert routing_text([user(parts)]) == f"{LONG}\nAnd why?"


def test_a_long_text_is_cut_in_the_middle() -> None:
    text = "a" * 5000 + "b" * 5000

    assert routing_text([user(text)]) == "a" * MAX_END_CHARS + "\n" + "b" * MAX_END_CHARS


@pytest.mark.parametrize("content", [None, "", "  ", 7, [], [None], [{"type": "text"}], [{"type": ["x"], "text": "y"}]])
def test_a_turn_without_text_is_passed_over(content: Any) -> None:
    assert routing_text([user(LONG), user(content)]) == LONG
    assert routing_text([user(content)]) == ""


class Unread(str):
    """Fail if the text is read through: an attachment of 15 MB costs what one of a byte does."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> Any:
        raise AssertionError("an attachment was read")

    encode = isascii = __iter__ = __len__ = __getitem__ = find = index = count = split = __contains__ = _refuse


BIG = "A" * 15_000_000
DATA_URL = Unread("data:image/png;base64," + BIG)
CALL: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


REMINDER = "<system-reminder>\nAs you answer, you can use this context.\n</system-reminder>"


@pytest.mark.parametrize(
    "content",
    [
        f"{REMINDER}\n\n{LONG}",
        [{"type": "text", "text": REMINDER}, {"type": "text", "text": f"{REMINDER}\n{REMINDER}\n{LONG}"}],
        [{"type": "text", "text": "<system-reminder>never closed"}, {"type": "text", "text": LONG}],
        [{"type": "text", "text": '<image name=[Image #1] path="a.png">'}, {"type": "text", "text": "</image>"},
         {"type": "text", "text": LONG}],
        f"{LONG}\n\n# *SEARCH/REPLACE block* Rules:\n\nEvery block must use this format.",
    ],
)  # fmt: skip
def test_what_an_agent_writes_around_the_users_words_does_not_decide(content: Any) -> None:
    assert routing_text([user(content)]) == LONG


def test_a_turn_of_an_agent_is_no_earlier_turn_of_the_user() -> None:
    context = user("<environment_context>\n<cwd>/home</cwd>\n</environment_context>")
    setup = user("This is the Qwen Code. We are setting up the context for our chat.")

    assert routing_text([context, setup, user("say hi")]) == "say hi"


def test_the_words_of_an_agent_decide_where_there_are_no_others() -> None:
    assert routing_text([user(REMINDER)]) == REMINDER


@pytest.mark.parametrize("text", ["What does <system-reminder> mean, and who writes it there at all?", "<b>x</b>"])
def test_tags_of_the_user_stay(text: str) -> None:
    assert routing_text([user(text)]) == text


@pytest.mark.parametrize(
    "message",
    [
        user([{"type": "image_url", "image_url": {"url": DATA_URL}}]),
        user([{"type": "image_url", "image_url": DATA_URL}]),
        user([{"type": "input_audio", "input_audio": {"data": Unread(BIG), "format": "wav"}}]),
        user([{"type": "file", "file": {"filename": "a.pdf", "file_data": DATA_URL}}]),
        user([{"type": "a kind of tomorrow", "payload": {"url": DATA_URL}}]),
        {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": DATA_URL}}]},
        user([{"type": "tool_result", "content": [{"type": "image", "source": {"data": Unread(BIG)}}]}]),
        {"role": "assistant", "content": None, "audio": {"id": "a", "data": Unread(BIG)}},
        {"role": "assistant", "content": "", "images": [{"type": "image_url", "image_url": {"url": DATA_URL}}]},
    ],
)
def test_attachments_count_flat_and_are_not_looked_into(message: dict[str, Any]) -> None:
    body = {"messages": [message, user(LONG)]}

    assert requirements_of(body).prompt_tokens == pytest.approx(MEDIA_TOKENS, abs=100)
    assert routing_text(body["messages"]) == LONG


def test_text_is_counted_by_its_bytes() -> None:
    assert estimate_tokens({"messages": [user("word " * 4000)]}) == pytest.approx(5000, rel=0.01)
    assert estimate_tokens({"messages": [user("字" * 1000)]}) == pytest.approx(750, rel=0.05)
    assert estimate_tokens({"messages": [user("data:" + "x" * 8000)]}) > 2000


@pytest.mark.parametrize("field", ["messages", "tools", "functions", "response_format"])
def test_everything_that_a_model_reads_is_counted(field: str) -> None:
    part = {"type": "file", "name": "f", "description": "x" * 4000, "enum": list(range(1000))}
    value: Any = [{"role": "user", "content": "hi", "extra": part}] if field == "messages" else [part]

    assert estimate_tokens({field: value}) > 1900


@pytest.mark.parametrize("name", ["anyOf", "content"])
def test_a_word_of_a_schema_is_no_attachment(name: str) -> None:
    parameters = {name: [{"type": "file", "description": "x" * 4000}]}

    assert 1000 < estimate_tokens({"tools": [{"parameters": parameters}]}) < 1100
    assert 1000 < estimate_tokens({"tools": [{"default": {"data": "x" * 4000}}]}) < 1100


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tools": [{}]}, {"tools": "`tools`"}),
        ({"functions": [{}]}, {"tools": "`functions`"}),
        ({"tools": [], "parallel_tool_calls": True}, {}),
        ({"tools": [{}], "parallel_tool_calls": True}, {"tools": "`tools`", "parallel_tools": "`parallel_tool_calls`"}),
        ({"tools": [{}], "parallel_tool_calls": False}, {"tools": "`tools`"}),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, {"tools": "messages[0] has tool_calls"}),
        (
            {"messages": [user("hi"), {"role": "assistant", "tool_calls": [CALL, CALL]}], "tools": [{}]},
            {"tools": "`tools`", "parallel_tools": "messages[1] has 2 tool_calls"},
        ),
        ({"messages": [user("hi"), user([IMAGE])]}, {"vision": "messages[1] has image_url"}),
        ({"messages": [user([{"type": "video_url"}])]}, {"video": "messages[0] has video_url"}),
        ({"messages": [user([{"type": "input_audio"}])]}, {"audio_input": "messages[0] has input_audio"}),
        ({"messages": [user([{"type": "document"}])]}, {"files": "messages[0] has document"}),
        ({"messages": [user([{"type": "tool_result", "content": [IMAGE]}])]}, {"vision": "messages[0] has image_url"}),
        ({"modalities": ["text", "audio"]}, {"audio_output": "`modalities`"}),
        ({"audio": {"voice": "alloy", "format": "wav"}}, {"audio_output": "`audio`"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, {"json_schema": "`response_format`"}),
        ({"response_format": {"type": "json_object"}}, {}),
        ({"messages": [{"role": "assistant", "content": "a", "annotations": [{"type": "file"}]}]}, {}),
        ({"tools": [{"parameters": {"content": [{"type": "file"}]}}]}, {"tools": "`tools`"}),
    ],
)
def test_what_a_request_needs_is_told_in_the_callers_words(body: dict[str, Any], named: dict[str, str]) -> None:
    whole = {"messages": [user("hi")], **body}

    assert requirement_sources(whole) == named
    assert set(requirements_of(whole).capabilities) == set(named)


@pytest.mark.parametrize(
    ("field", "value", "thinks"),
    [
        ("reasoning_effort", "low", True),
        ("reasoning_effort", "none", False),
        ("reasoning_effort", "minimal", False),
        ("reasoning_effort", None, False),
        ("reasoning", {"effort": "high"}, True),
        ("reasoning", {"max_tokens": 2000}, True),
        ("reasoning", {"enabled": True}, True),
        ("reasoning", {"enabled": False, "effort": "high"}, False),
        ("reasoning", {"exclude": True}, False),
        ("thinking", {"type": "enabled", "budget_tokens": 1024}, True),
        ("thinking", {"type": "adaptive"}, True),
        ("thinking", {"type": "disabled"}, False),
    ],
)
def test_reasoning_is_needed_where_the_caller_wants_thinking(field: str, value: Any, thinks: bool) -> None:
    assert requirements_of({"messages": [user("hi")], field: value}).reasoning is thinks


@pytest.mark.parametrize(
    ("body", "limit", "answers"),
    [
        ({}, None, 1),
        ({"max_tokens": 7, "n": 3}, 7, 3),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 9, 1),
        ({"max_tokens": "7", "n": True}, None, 1),
        ({"max_tokens": 10**400, "n": -1}, 10**9, 1),
        ({"max_tokens": -1, "best_of": 4}, None, 4),
        ({"n": 10**6}, None, 128),
        ({"tools": 3, "modalities": 4, "response_format": []}, None, 1),
    ],
)
def test_limits_are_read_where_they_are_numbers(body: dict[str, Any], limit: int | None, answers: int) -> None:
    needs = requirements_of({"messages": [user("hi")], **body})

    assert (needs.max_output_tokens, needs.answers) == (limit, answers)


WORDS = st.sampled_from(
    sorted(
        frozenset(
            """
            role content type text user assistant tool image_url input_audio file tool_result data url images audio
            messages tools functions response_format json_schema modalities parallel_tool_calls reasoning thinking
            reasoning_effort effort enabled tool_calls max_tokens max_completion_tokens n data:x;base64,AAAA
        """.split()
        )
    )
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=5),
    max_leaves=30,
)
MESSAGES = st.lists(st.dictionaries(WORDS, JSON, max_size=5) | JSON, max_size=4)


@settings(deadline=None)
@given(st.dictionaries(WORDS | st.text(max_size=4), JSON, max_size=8), JSON | MESSAGES)
def test_no_body_breaks_the_reading_of_it(body: dict[str, Any], messages: Any) -> None:
    body = {**body, "messages": messages}
    needs = requirements_of(body)
    size = len(json.dumps(body))

    assert 0 <= needs.prompt_tokens == estimate_tokens(body) <= MEDIA_TOKENS * (1 + size)
    assert 1 <= needs.answers <= 128
    assert needs.max_output_tokens is None or 0 < needs.max_output_tokens <= 10**9
    assert set(requirement_sources(body)) == set(needs.capabilities)
    if isinstance(messages, list):
        assert len(routing_text(messages)) <= 3 * (2 * MAX_END_CHARS + 2)


@settings(deadline=None)
@given(st.lists(st.dictionaries(WORDS, JSON, max_size=5), max_size=4), st.dictionaries(WORDS, JSON, max_size=5))
def test_one_more_message_never_makes_a_request_smaller_or_need_less(
    messages: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    before, after = requirements_of({"messages": messages}), requirements_of({"messages": [*messages, more]})

    assert after.prompt_tokens >= before.prompt_tokens
    assert set(after.capabilities) >= set(before.capabilities)
