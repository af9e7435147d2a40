from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.fingerprints import SAMPLE_CHARS, TextSample, TurnFingerprints, latest_user_text, looks_random

TEXTS = st.text(max_size=40)
LONG = "A thought that nobody else will think in these very words. " * 4


def fingerprints(*parts: dict[str, Any], question: str = "Why?") -> list[str]:
    turn = TurnFingerprints()
    for part in parts:
        turn.add(part)
    sample = TextSample(question)
    return [*turn.of_reasoning(sample), *turn.of_calls(sample)]


def a_call(call_id: str = "call_0", name: str = "weather", arguments: str = '{"city": "Paris"}') -> dict[str, Any]:
    return {"tool_calls": [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    "call_id",
    [
        "call_9pw1qnYScqvGrCH58HWCvFH6",
        "toolu_01A09q90qw90lq917835lq9",
        "chatcmpl-tool-7d2f0c8e5b1a4c67",
        "call_a1b2c3d4",
        "D681PevKs",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_an_id_of_many_random_characters_stands_for_itself(call_id: str) -> None:
    assert looks_random(call_id, "weather")
    assert fingerprints(a_call(call_id)) == fingerprints(a_call(call_id, arguments="{}"), question="Another?")


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("call_0", "weather"),
        ("", "weather"),
        ("functions.get_weather_forecast:0", "get_weather_forecast"),
        ("get4you2day9-1", "get4you2day9"),
        ("call_0000000001", "weather"),
        ("weather2024", "w"),
        ("a1b2", "weather"),
    ],
)
def test_an_id_that_counts_is_told_apart_by_what_was_called_and_for_which_question(call_id: str, name: str) -> None:
    assert not looks_random(call_id, name)
    one = fingerprints(a_call(call_id, name))
    assert one == fingerprints(a_call(call_id, name, '{"city":"Paris"}'))  # as a client writes it again
    others = (
        fingerprints(a_call(call_id, name, '{"city": "Rome"}')),
        fingerprints(a_call(call_id, name), question="And tomorrow?"),
        fingerprints(a_call(call_id, f"{name}er")),
    )
    assert one not in others


def test_counting_ids_whose_arguments_cannot_be_compared_leave_no_fingerprint() -> None:
    part = {"content": [{"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Paris"}}]}
    assert fingerprints(part) == []
    assert fingerprints({"content": [{**part["content"][0], "id": "toolu_01A09q90qw90"}]}) == fingerprints(
        a_call("toolu_01A09q90qw90")
    )


@pytest.mark.parametrize("broken", ['{"city": ', "[" * SAMPLE_CHARS, "NaN", "\ud800", "9" * SAMPLE_CHARS])
def test_arguments_that_are_no_json_are_compared_as_they_are(broken: str) -> None:
    assert fingerprints(a_call(arguments=broken)) == fingerprints(a_call(arguments=broken))
    assert fingerprints(a_call(arguments=broken)) != fingerprints(a_call(arguments=broken[:-1]))


@pytest.mark.parametrize("index", [None, "0", [], {}, 1.5])
def test_a_call_with_an_odd_index_stands_where_it_stands(index: Any) -> None:
    call = {**a_call()["tool_calls"][0], "index": index}
    assert fingerprints({"tool_calls": [call]}) == fingerprints(a_call())


def test_an_empty_call_is_a_call_without_arguments() -> None:
    assert fingerprints(a_call(arguments="")) == fingerprints(a_call(arguments="{}"))


def test_arguments_too_long_to_keep_are_compared_by_both_ends_and_their_length() -> None:
    body = "x" * (2 * SAMPLE_CHARS)
    assert fingerprints(a_call(arguments=body)) == fingerprints(a_call(arguments=body))
    assert (
        len({fingerprints(a_call(arguments=text))[0] for text in (body, f"{body}x", f"y{body[1:]}", f"{body[1:]}y")})
        == 4
    )


@given(st.integers(0, 3 * SAMPLE_CHARS), st.lists(st.integers(1, SAMPLE_CHARS), max_size=8))
def test_a_sample_does_not_depend_on_how_the_text_was_cut(length: int, cuts: list[int]) -> None:
    text = "".join(chr(97 + place % 23) for place in range(length))
    pieces = TextSample()
    start = 0
    for size in cuts:
        pieces.add(text[start : start + size])
        start += size
    pieces.add(text[start:])
    assert pieces.sample == TextSample(text).sample
    assert pieces.whole == (text if length <= SAMPLE_CHARS else None)


@given(TEXTS, TEXTS, st.integers(0, 40), st.sampled_from(["call_0", "call_a1b2c3d4"]))
def test_a_stream_leaves_the_fingerprints_of_its_whole_answer(thought: str, city: str, cut: int, call_id: str) -> None:
    arguments = json.dumps({"city": city})
    whole = {"reasoning_content": thought, **a_call(call_id, "weather", arguments)}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": thought[:cut]},
        {"reasoning_content": thought[cut:]},
        {"tool_calls": [{"index": 0, "id": call_id, "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": arguments[:cut]}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": arguments[cut:]}}]},
        {},
    ]
    assert fingerprints(*deltas) == fingerprints(whole)


def test_parallel_calls_are_kept_apart_by_index_and_by_id_where_there_is_none() -> None:
    first, second = a_call("call_a1b2c3d4")["tool_calls"][0], a_call("call_e5f6g7h8")["tool_calls"][0]
    whole = fingerprints({"tool_calls": [first, second]})
    assert len(set(whole)) == 2
    assert fingerprints({"tool_calls": [{**first, "index": 0}]}, {"tool_calls": [{**second, "index": 1}]}) == whole
    assert fingerprints({"tool_calls": [first]}, {"tool_calls": [second]}) == whole


def test_the_old_function_call_is_a_call_too() -> None:
    call = {"function_call": {"name": "weather", "arguments": "{}"}}
    assert len(fingerprints(call)) == 1
    assert fingerprints(call) != fingerprints(call, question="Another?")


THOUGHT = {"type": "thinking", "thinking": LONG, "signature": "s1" * 40}


@pytest.mark.parametrize(
    "echo",
    [
        {"thinking_blocks": [THOUGHT]},
        {"reasoning_content": LONG},
        {"reasoning": LONG},
        {"content": [THOUGHT, {"type": "text", "text": "So."}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": LONG, "signature": "s1" * 40, "index": 0}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": LONG}]}]},
        {"signature": "s1" * 40},
    ],
    ids=lambda echo: next(iter(echo)),
)
def test_whichever_form_of_its_reasoning_a_client_sends_back_is_recognised(echo: dict[str, Any]) -> None:
    given_ = fingerprints({"reasoning_content": LONG, "thinking_blocks": [THOUGHT]})
    assert set(fingerprints(echo, question="Sent back with another question?")) & set(given_)


def test_thinking_blocks_that_come_in_pieces_are_the_blocks_that_are_sent_back() -> None:
    second = {"type": "thinking", "thinking": f"But {LONG}", "signature": "s2" * 40}
    pieces = [
        {"thinking_blocks": [{"type": "thinking", "thinking": piece, "signature": signature}]}
        for piece, signature in ((LONG, None), ("", "s1" * 40), ("But ", None), (LONG, ""), ("", "s2" * 40))
    ]
    assert (
        fingerprints(*pieces)
        == fingerprints({"thinking_blocks": [THOUGHT, second]})
        == fingerprints({"thinking_blocks": [second]})
    )


def test_reasoning_details_are_told_apart_by_their_index() -> None:
    first, second = ({"type": "reasoning.text", "text": f"{name}: {LONG}", "index": name} for name in (0, 1))
    assert fingerprints({"reasoning_details": [first, second]}) == fingerprints({"reasoning_details": [second]})
    pieces = [{**second, "text": "1: "}, {**second, "text": LONG}]
    assert fingerprints(*({"reasoning_details": [piece]} for piece in (first, *pieces))) == fingerprints(
        {"reasoning_details": [second]}
    )


def test_redacted_thinking_is_recognised_by_its_data() -> None:
    redacted = {"type": "redacted_thinking", "data": "d" * 64}
    assert fingerprints({"thinking_blocks": [redacted]}) == fingerprints({"content": [redacted]}) != []


def test_short_reasoning_is_told_apart_by_its_question() -> None:
    part = {"reasoning_content": "The user says hello."}
    assert fingerprints(part) != fingerprints(part, question="Another?")
    assert fingerprints({"reasoning_content": LONG}) == fingerprints({"reasoning_content": LONG}, question="Another?")


def test_an_answer_without_calls_and_reasoning_leaves_nothing() -> None:
    turn = TurnFingerprints()
    turn.add({"role": "assistant", "content": "Paris.", "reasoning_content": "", "tool_calls": [], "reasoning": None})
    assert turn.is_empty


def test_the_newest_question_is_the_newest_user_turn_before_the_answer() -> None:
    messages = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "Sec"}, {"type": "text", "text": "ond?"}]},
    ]
    assert latest_user_text(messages).whole == "Second?"
    assert latest_user_text(messages, 2).whole == "First?"
    assert latest_user_text(messages[1:2]).whole == ""
