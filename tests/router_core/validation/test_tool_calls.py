"""Graders of tool calls, and the text that an answer with calls is kept and graded as."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router_core.errors import InvalidValidationSet
from router_core.validation.graders import Grader, parse_grader
from router_core.validation.graders.answers import (
    MAX_ANSWER_CHARS,
    MAX_CALLS,
    ToolCall,
    read_reply,
    strip_thinking,
    write_reply,
)

WEATHER = {"city": "Paris", "days": 3, "unit": "celsius"}


def grader(*calls: dict[str, Any], **more: Any) -> Grader:
    return parse_grader({"type": "tool_calls", "calls": list(calls), **more})


def expects(**arguments: Any) -> Grader:
    return grader({"name": "weather", "arguments": arguments}, case_sensitive=True)


def reply(*calls: tuple[str, Any], text: str = "") -> str:
    """Write a reply with these calls, each a name and the arguments as a provider sends them."""
    sent = (each if isinstance(each, str) or each is None else json.dumps(each) for _, each in calls)
    return write_reply(text, [ToolCall.received(name, each) for (name, _), each in zip(calls, sent, strict=True)])


@pytest.mark.parametrize(
    ("arguments", "score"),
    [
        (WEATHER, 1),
        ({"unit": "celsius", "days": 3.0, "city": " Paris "}, 1),
        ({**WEATHER, "lang": None}, 1),
        ({**WEATHER, "lang": "en"}, 0),
        ({**WEATHER, "days": 4}, 0),
        ({**WEATHER, "days": "3"}, 0),
        ({**WEATHER, "days": True}, 0),
        ({**WEATHER, "days": 10**400}, 0),
        ({**WEATHER, "unit": "Celsius"}, 0),
        ({**WEATHER, "city": ["Paris"]}, 0),
        ({"city": "Paris", "days": 3}, 0),
        ('{"city": "Paris", "days": 3, "unit": "celsius"', 0),
        (json.dumps(json.dumps(WEATHER)), 0),
        ("[1]", 0),
        ("[" * 50_000, 0),
        ("", 0),
        (None, 0),
    ],
)
def test_arguments_must_have_the_expected_names_types_and_values(arguments: Any, score: float) -> None:
    assert expects(**WEATHER).grade(reply(("weather", arguments))) == score


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ({"a": [{"b": 1, "c": ["x", "y"]}]}, 1),
        ({"a": [{"c": ["x", "y"], "b": 1, "d": None}]}, 1),
        ({"a": [{"b": 1, "c": ["y", "x"]}]}, 0),
        ({"a": [{"b": 1, "c": ["x"]}]}, 0),
        ({"a": [{"b": 1, "c": ["x", "y"], "d": 2}]}, 0),
        ({"a": {"b": 1, "c": ["x", "y"]}}, 0),
        ({}, 0),
        (7, 0),
    ],
)
def test_nested_objects_and_lists_are_compared_as_a_whole(value: Any, score: float) -> None:
    assert expects(filter={"a": [{"b": 1, "c": ["x", "y"]}]}).grade(reply(("weather", {"filter": value}))) == score


A, B = ("weather", {"city": "Paris"}), ("weather", {"city": "Rome"})


@pytest.mark.parametrize(
    ("calls", "score"),
    [
        ([A, B], 1),
        ([B, A], 1),
        ([A], 0),
        ([A, A], 0),
        ([A, B, A], 0),
        ([A, ("time", {"city": "Rome"})], 0),
        ([A, (None, None)], 0),
        ([A, B, ("unknown_tool", "{}")], 0),
        ([], 0),
    ],
)
def test_parallel_calls_come_in_any_order_and_none_is_left_over(calls: list[tuple[str, Any]], score: float) -> None:
    both = grader(*({"name": name, "arguments": arguments} for name, arguments in (A, B)))
    assert both.grade(reply(*calls)) == score


def test_calls_that_fit_several_expected_ones_are_paired_so_that_all_fit() -> None:
    first = {"name": "f", "arguments": {"x": 1}, "alternatives": {"x": [2]}}
    both = grader(first, {"name": "f", "arguments": {"x": 1}})
    assert both.grade(reply(("f", {"x": 1}), ("f", {"x": 2}))) == 1
    assert both.grade(reply(("f", {"x": 2}), ("f", {"x": 2}))) == 0


def test_an_optional_argument_may_be_left_out_but_not_be_wrong() -> None:
    optional = grader({"name": "f", "arguments": {}, "optional": {"unit": ["C", "celsius"]}})
    assert [optional.grade(reply(("f", each))) for each in (None, {"unit": "celsius"}, {"unit": None})] == [1, 1, 1]
    assert optional.grade(reply(("f", {"unit": "F"}))) == 0


def test_numbers_may_be_off_by_the_tolerance_and_letters_by_their_case() -> None:
    lenient = grader({"name": "f", "arguments": {"x": 0.5, "who": "José"}}, tolerance=0.01)
    assert lenient.grade(reply(("f", {"x": 0.505, "who": "JOSE"}))) == 1
    assert lenient.grade(reply(("f", {"x": 0.52, "who": "José"}))) == 0


def test_words_beside_calls_do_not_count_and_words_in_place_of_calls_are_no_calls() -> None:
    written = reply(("weather", WEATHER))
    assert expects(**WEATHER).grade(reply(("weather", WEATHER), text="Let me look.\n<think>")) == 1
    for text in (written, f"\n{written}", f"I call\n{written}", f"weather({json.dumps(WEATHER)})"):
        assert expects(**WEATHER).grade(write_reply(text)) == 0


def test_a_call_of_a_tool_gets_no_marks_where_words_are_due() -> None:
    words = parse_grader({"type": "no_tool_call", "answer": {"type": "numeric", "answer": 42}})
    assert words.grade("The answer is 42.") == 1
    assert words.grade(reply(("weather", {"days": 42}))) == 0
    assert words.grade(reply(("weather", {}), text="The answer is 42.")) == 0
    assert words.grade("The answer is 41.") == 0
    any_words = parse_grader({"type": "no_tool_call"})
    assert [any_words.grade(each) for each in ("Sorry.", " ", "<think>so", reply(A))] == [1, 0, 0, 0]


def test_graders_of_texts_leave_calls_out() -> None:
    number = parse_grader({"type": "numeric", "answer": 3})
    assert number.grade(reply(("weather", WEATHER))) == 0
    assert number.grade(reply(("weather", WEATHER), text="It takes 3 days.")) == 1
    assert strip_thinking(reply(("weather", WEATHER), text="<think>so</think>Yes")) == "Yes"


@pytest.mark.parametrize("text", ["", "hi", "a\nb", '[tool call] {"name": "f", "arguments": {}}', "[tool call] "])
def test_what_is_written_is_read_back(text: str) -> None:
    calls = [ToolCall("f", {"a": "\n\u2028[tool call] "}), ToolCall("g", "{broken\n")]
    for made in ([], calls):
        read, found = read_reply(write_reply(text, made))
        assert (read if made else read.lstrip("\n"), found) == (text, made)


def test_a_reply_is_readable() -> None:
    assert reply(("weather", WEATHER), ("time", None), text="Let me look.") == (
        '[tool call] {"name": "weather", "arguments": {"city": "Paris", "days": 3, "unit": "celsius"}}\n'
        '[tool call] {"name": "time", "arguments": {}}\n'
        "\nLet me look."
    )


def test_a_long_text_does_not_cut_off_its_calls_and_many_calls_are_bounded() -> None:
    assert expects(**WEATHER).grade(reply(("weather", WEATHER), text="x" * MAX_ANSWER_CHARS)) == 1
    many = reply(*[A] * 1000)
    assert len(read_reply(many)[1]) == MAX_CALLS
    cut = reply(("weather", {"city": "x" * 50_000}))
    assert expects(**WEATHER).grade(cut[:100]) == expects(**WEATHER).grade(cut) == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "tool_calls"}, "'grader.calls' is missing: add a list of 1 to 16"),
        ({"type": "tool_calls", "calls": []}, "'grader.calls' must be a list of 1 to 16"),
        ({"type": "tool_calls", "calls": ["f"]}, r"'grader.calls\[0\]' must be an object"),
        ({"type": "tool_calls", "calls": [{}]}, r"'grader.calls\[0\].name' is missing"),
        ({"type": "tool_calls", "calls": [{"name": "f", "args": {}}]}, "did you mean 'arguments'"),
        ({"type": "tool_calls", "calls": [{"name": "f", "arguments": []}]}, "must be a JSON object"),
        ({"type": "tool_calls", "calls": [{"name": "f", "optional": {"a": 1}}]}, "an object of lists"),
        ({"type": "tool_calls", "calls": [{"name": "f", "alternatives": {"a": [1]}}]}, "whose keys are keys of"),
        (
            {"type": "tool_calls", "calls": [{"name": "f", "arguments": {"a": 1}, "optional": {"a": [1]}}]},
            "without the keys of 'arguments'",
        ),
        ({"type": "tool_calls", "calls": [{"name": "f"}], "tolerance": -1}, "'grader.tolerance' must be a number of 0"),
        ({"type": "no_tool_call", "answer": {"type": "judge", "rubric": "x"}}, "a grader of a text, which 'judge'"),
        ({"type": "no_tool_call", "answer": {"type": "no_tool_call"}}, "a grader of a text"),
        ({"type": "no_tool_call", "answer": {"type": "exat"}}, "did you mean 'exact'"),
    ],
)
def test_a_broken_grader_is_refused_with_its_field(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValidationSet, match=message):
        parse_grader(spec)
