from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.routing.chat_request import read_options
from proxy.routing.fingerprints import NO_HISTORY, TextSample, TurnFingerprints, inspect_history

ASK: Any = {"role": "user", "content": "What is the weather?"}
CALL: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_a1b2c3d4", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
}
RESULT: Any = {"role": "tool", "tool_call_id": "call_a1b2c3d4", "content": "Rain."}
ANSWER: Any = {"role": "assistant", "content": "Take an umbrella."}
THINKING: Any = {"role": "assistant", "content": "So.", "reasoning_content": "It rains, and rain is wet. " * 20}

FIELDS = st.sampled_from(
    [
        *("role", "content", "tool_calls", "function_call", "reasoning", "reasoning_content", "reasoning_details"),
        *("thinking_blocks", "signature", "type", "id", "index", "function", "name", "arguments", "text", "thinking"),
        *("data", "summary", "tool_call_id", "input"),
    ]
)
WORDS = st.sampled_from(["assistant", "user", "tool", "function", "tool_result", "tool_use", "thinking", "", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=40,
)


@pytest.mark.parametrize(
    "tail",
    [
        [CALL, RESULT],
        [CALL, RESULT, RESULT],
        [CALL, RESULT, {"role": "user", "content": "Go on."}],
        [CALL, {"role": "function", "name": "weather", "content": "Rain."}],
        [
            CALL,
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_a1b2c3d4", "content": "Rain"}]},
        ],
        [ANSWER, ASK, CALL, RESULT],
    ],
)
def test_a_body_whose_newest_turns_answer_tool_calls_is_in_a_tool_loop(tail: list[Any]) -> None:
    history = inspect_history([ASK, *tail])
    assert (history.in_tool_loop, history.has_reasoning, len(history.fingerprints)) == (True, False, 1)


@pytest.mark.parametrize("messages", [[ASK], [ASK, ANSWER, ASK], [ASK, CALL], [ASK, CALL, RESULT, ANSWER, ASK], []])
def test_other_bodies_are_not(messages: list[Any]) -> None:
    assert inspect_history(messages) == NO_HISTORY


def test_results_without_the_turn_that_they_answer_are_a_loop_of_unknown_origin() -> None:
    assert (inspect_history([ASK, RESULT]).in_tool_loop, inspect_history([ASK, RESULT]).fingerprints) == (True, ())


@pytest.mark.parametrize(
    "carried",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]},
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]},
        {"content": [{"type": "redacted_thinking", "data": "x"}]},
        {"signature": "x"},
    ],
    ids=lambda carried: next(iter(carried)),
)
def test_a_body_whose_assistant_turns_carry_reasoning_says_so(carried: dict[str, Any]) -> None:
    history = inspect_history([ASK, {**ANSWER, **carried}, ASK, ANSWER, ASK])
    assert history.has_reasoning
    assert history.fingerprints


def test_only_the_newest_reasoning_counts_and_a_newer_tool_call_before_it() -> None:
    older = {**THINKING, "reasoning_content": "Something else. " * 20}
    alone, both = inspect_history([ASK, THINKING, ASK]), inspect_history([ASK, older, ASK, THINKING, ASK])
    assert both.fingerprints == alone.fingerprints
    looping = inspect_history([ASK, THINKING, ASK, CALL, RESULT])
    assert looping.fingerprints == (*inspect_history([ASK, CALL, RESULT]).fingerprints, *alone.fingerprints)


def test_reasoning_of_the_turn_that_called_is_surer_than_its_calls() -> None:
    thinking_call = {**CALL, "reasoning_content": THINKING["reasoning_content"]}
    assert inspect_history([ASK, thinking_call, RESULT]).fingerprints == (
        *inspect_history([ASK, THINKING, ASK]).fingerprints,
        *inspect_history([ASK, CALL, RESULT]).fingerprints,
    )


def test_calls_of_a_loop_that_is_over_are_not_looked_for() -> None:
    thinking_call = {**CALL, "reasoning_content": THINKING["reasoning_content"]}
    assert (
        inspect_history([ASK, thinking_call, RESULT, ANSWER, ASK]).fingerprints
        == inspect_history([ASK, THINKING, ASK]).fingerprints
    )


@given(st.lists(JSON, max_size=6) | JSON)
def test_no_body_makes_it_fail(messages: Any) -> None:
    inspect_history(messages)


@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=6), max_size=4))
def test_no_answer_makes_it_fail(deltas: list[dict[str, Any]]) -> None:
    turn = TurnFingerprints()
    for delta in deltas:
        turn.add(delta)
    found = [*turn.of_reasoning(TextSample("Why?")), *turn.of_calls(TextSample("Why?"))]
    assert {len(each) for each in found} <= {64}
    assert not (found and turn.is_empty)


def test_a_very_long_conversation_is_known_by_its_newest_turns() -> None:
    huge = {**THINKING, "reasoning_content": "x" * 1_000_000}
    newest = [ASK, {**huge, "signature": "s"}, ASK, CALL, RESULT]
    assert inspect_history([ASK, huge] * 5_000 + [ASK, ANSWER] * 5_000 + newest) == inspect_history(newest)


HEADERS = [("x-session-id", "one"), ("x-litellm-session-id", "two"), ("x-claude-code-session-id", "three")]
BODY = {"prompt_cache_key": "four", "metadata": {"session_id": "five"}}


@pytest.mark.parametrize(
    ("passed", "session"), [(0, "one"), (1, "two"), (2, "three"), (3, "four")], ids=["x", "litellm", "claude", "cache"]
)
def test_the_first_session_id_of_the_chain_is_taken(passed: int, session: str) -> None:
    assert read_options(BODY, HEADERS[passed:]).session == session
    assert read_options({**BODY, "uniroute": {"session": "ours"}}, HEADERS).session == "ours"
    assert read_options({"metadata": BODY["metadata"]}, []).session == "five"
    assert read_options({"metadata": None, "prompt_cache_key": None}, []).session is None


@pytest.mark.parametrize("odd", ["", "x" * 256, 7, None, ["a"], {}])
def test_an_odd_id_that_was_not_meant_for_us_is_passed_over(odd: Any) -> None:
    assert read_options({**BODY, "prompt_cache_key": odd}, []).session == "five"
    if isinstance(odd, str):
        assert read_options(BODY, [("x-session-id", odd)]).session == "four"
    if odd is not None:
        with pytest.raises(BadRequest, match=r"uniroute\.session"):
            read_options({"uniroute": {"session": odd}}, HEADERS)


def test_a_session_header_given_twice_names_no_session() -> None:
    assert read_options({}, [("x-session-id", "a"), ("x-session-id", "b")]).session is None


def test_a_session_id_is_not_shown_with_the_options() -> None:
    assert "canary" not in repr(read_options({"uniroute": {"session": "canary"}}, []))


@pytest.mark.parametrize(
    "name", ["signature", "reasoning_content", "reasoning", "reasoning_details", "thinking_blocks"]
)
@pytest.mark.parametrize("nothing", ["", None, []])
def test_a_field_of_reasoning_with_nothing_in_it_is_no_reasoning(name: str, nothing: Any) -> None:
    assert inspect_history([{"role": "assistant", "content": "Rain.", name: nothing}]) == NO_HISTORY


CODEX_MAIN = [("thread-id", "main")]
CODEX_HELPER = [("thread-id", "one"), ("x-codex-parent-thread-id", "main"), ("x-openai-subagent", "collab_spawn")]


def test_the_agents_of_a_session_are_told_apart_by_their_headers() -> None:
    headers = [[], [("x-claude-code-agent-id", "one")], [("x-claude-code-agent-id", "two")], CODEX_MAIN, CODEX_HELPER]
    options = [read_options(BODY, [HEADERS[0], *each]) for each in headers]

    assert {each.session for each in options} == {"one"}
    assert options[0].agent is None
    assert len({each.agent for each in options}) == len(headers)


@pytest.mark.parametrize("value", ["", " ", "x" * 256])
def test_an_agent_without_a_proper_id_is_the_main_one(value: str) -> None:
    assert read_options(BODY, [HEADERS[0], ("x-claude-code-agent-id", value)]).agent is None
