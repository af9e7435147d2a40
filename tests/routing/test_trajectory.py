from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.trajectory import (
    MAX_TURNS,
    NO_TRAJECTORY,
    RECENCY,
    USUAL,
    has_failed,
    read_trajectory,
)
from tests.routing.test_conversation_history import JSON

ASK: Any = {"role": "user", "content": "Mend the parser, please."}
DONE: Any = {"role": "assistant", "content": "I have done what I could."}
WELL, BADLY = "===== 31 passed in 0.82s =====", "Exit code 1\nE   assert 1 == 2\n1 failed, 30 passed in 0.8s"


def turn(result: Any = WELL, name: str = "bash", number: int | str = 0, **arguments: Any) -> list[Any]:
    """Return a turn of a model with one call, and its result. Calls with other numbers are other calls."""
    made = json.dumps(arguments or {"command": f"pytest -k {number}"})
    call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": made}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{number}", "content": result},
    ]


def run_of(*results: Any) -> list[Any]:
    return [ASK, *(message for number, result in enumerate(results) for message in turn(result, number=number))]


@pytest.mark.parametrize(
    "result",
    [
        "Exit code 1\nsrc/parser.py:8: error: Incompatible types",
        "Exit code 127\nbash: line 1: pyton: command not found",
        "<tool_use_error>String to replace not found in file.</tool_use_error>",
        "Error: File has not been read yet. Read it first before writing to it.",
        "Chunk ID: e9b0bd\nWall time: 0.0100 seconds\nProcess exited with code 2\nOutput:\nusage: parse FILE\n",
        "Exit code: 1\nWall time: 0.1 seconds\nOutput:\ndiff: a differs\n",
        '{"output":"no such file\\n","metadata":{"exit_code":1,"duration_seconds":0.0}}',
        "apply_patch verification failed: Failed to find expected lines in src/parser.py",
        "Error: oldString not found in content",
        "Command: make\nDirectory: (root)\nOutput: oops\nError: (none)\nExit Code: 2\nSignal: (none)",
        "Failed to edit, could not find the string to replace.",
        "The tool execution failed with the following error:\n<error>\nno such file\n</error>",
        "Compiling...\n[The command completed with exit code 1.]",
        "An error occurred while running the tool. Please try again. Error: timeout",
        "MCP error -32602: Invalid arguments",
        '{"error": "not found"}',
        '{"status": "error", "message": "no"}',
        "Process exited with code 0\nOutput:\n== 2 failed, 7 passed in 0.31s ==",
        "......F\nFAILED (failures=1)",
        "Tests:       1 failed, 12 passed, 13 total\nTime:        1.2 s",
        "test result: FAILED. 3 passed; 1 failed; finished in 0.00s\n\nerror: test failed, to rerun pass `--lib`\n",
        "--- FAIL: TestParse (0.00s)\nFAIL\texample.org/parse\t0.01s\n",
        '  File "a.py", line 1, in <module>\nTraceback:\nValueError: too many values to unpack\n',
        "src/a.ts(3,1): error TS2304\n\nFound 2 errors in the same file.\n",
        "npm error code ELIFECYCLE\nnpm error errno 1",
    ],
)
def test_a_result_that_says_so_has_failed(result: str) -> None:
    assert has_failed(result) is True


@pytest.mark.parametrize(
    "result",
    [
        "",
        "hello",
        "src/errors.py\nsrc/error_handler.py\ntests/test_failed_logins.py\nTraceback.md",
        "Process exited with code 0\nOutput:\n0 errors, 2 warnings\n",
        "Process exited with code 0\nOutput:\nValueError: this is a line of a log\n",
        "Process exited with code 1\nOriginal token count: 0\nOutput:\n",
        "Exit code 1",
        "===== 31 passed, 2 warnings in 0.82s =====",
        "Tests:       13 passed, 13 total",
        "test result: ok. 4 passed; 0 failed; 0 ignored; finished in 0.00s",
        "Found 0 errors. Watching for file changes.",
        "Command: ls\nOutput: a.py\nError: (none)\nExit Code: 0\nSignal: (none)",
        '{"error": null, "rows": [1, 2]}',
        '{"errors": [], "ok": true}',
        "The function raises ValueError: too many values, if the line is long.\nIt is in src/parser.py.",
        "     8\t    raise ValueError(message)  # error: see below",
        "^C\nExit code 130",
    ],
)
def test_a_result_that_only_holds_such_words_has_not(result: str) -> None:
    assert has_failed(result) is False


@pytest.mark.parametrize("text", [BADLY, "KeyError: 'x'", "make: *** [all] Error 2"])
def test_what_a_reading_tool_shows_says_nothing_of_the_call(text: str) -> None:
    assert has_failed(text, reads=True) is False
    assert has_failed(f"Error: no such file\n{text}", reads=True) is True


@pytest.mark.parametrize(
    "text",
    [
        "The user doesn't want to proceed with this tool use. The tool use was rejected.",
        "Error: The user doesn't want to take this action right now.",
        "exec command rejected by user",
        "[Operation Cancelled] Reason: User denied",
    ],
)
def test_what_the_user_did_not_want_is_neither(text: str) -> None:
    assert has_failed(text) is None
    assert read_trajectory(run_of(BADLY, BADLY, text)).failed == read_trajectory(run_of(BADLY, BADLY)).failed


@pytest.mark.parametrize("messages", [[], [ASK], [ASK, DONE, ASK], [ASK, turn()[0]], [turn()[1]], [ASK, turn()[1]]])
def test_without_answered_calls_there_is_no_run(messages: list[Any]) -> None:
    assert read_trajectory(messages) == NO_TRAJECTORY
    assert read_trajectory(messages).to_json() is None


def test_newer_turns_count_more() -> None:
    """Two of three failed; by hand: 0.3, then 0.3 + 0.7·0.3 = 0.51, then 0.7·0.51 = 0.357."""
    found = read_trajectory(run_of(BADLY, BADLY, WELL))
    assert found.failed == pytest.approx(0.357)
    assert found.stuck == pytest.approx((0.357 - USUAL) / (1 - USUAL))
    assert read_trajectory(run_of(WELL, BADLY, BADLY)).stuck > found.stuck
    assert (found.repeated, found.reverted, found.turns) == (0, 0, 3)


def test_one_failure_now_and_then_is_usual() -> None:
    assert read_trajectory(run_of(WELL, WELL, WELL, BADLY)).stuck < 0.1
    assert read_trajectory(run_of(BADLY, WELL)).stuck == 0


def test_a_run_that_recovers_is_not_stuck_any_more() -> None:
    assert read_trajectory(run_of(*[BADLY] * 8)).stuck > 0.8
    assert read_trajectory(run_of(*[BADLY] * 8, *[WELL] * 4)).stuck == 0


def test_the_calls_of_one_turn_count_as_one() -> None:
    both = [turn(number=1), turn(BADLY, number=2)]
    calls = [each[0]["tool_calls"][0] for each in both]
    together = [ASK, {"role": "assistant", "tool_calls": calls}, both[0][1], both[1][1]]
    assert read_trajectory(together).failed == pytest.approx(RECENCY / 2)


def test_the_same_call_with_the_same_outcome_is_a_repeat() -> None:
    again = [ASK, *turn(), *turn(), *turn()]
    assert read_trajectory(again).repeated == pytest.approx(0.51)
    other_result = [ASK, *turn(), *turn("===== 32 passed in 0.9s ====="), *turn(number=1)]
    assert read_trajectory(other_result).repeated == 0


def test_a_repeat_is_known_by_what_the_program_wrote_not_by_how_long_it_took() -> None:
    shown = "Chunk ID: {}\nWall time: {} seconds\nProcess exited with code 0\nOutput:\nhello\n"
    assert read_trajectory([ASK, *turn(shown.format("e9b", 0.01)), *turn(shown.format("4ef", 0.02))]).repeated > 0


@pytest.mark.parametrize(
    "edits",
    [
        [
            {"file_path": "a.py", "old_string": "x = 1", "new_string": "x = 2"},
            {"file_path": "a.py", "old_string": "x = 2", "new_string": "x = 1"},
        ],
        [
            {"filePath": "a.py", "oldString": "x = 1", "newString": "x = 2"},
            {"filePath": "a.py", "oldString": "x = 2", "newString": "x = 1"},
        ],
        [{"path": "a.py", "old_str": "x", "new_str": "y"}, {"path": "a.py", "old_str": "y", "new_str": "x"}],
        [{"file_path": "a.py", "content": text} for text in ("x = 1", "x = 2", "x = 1")],
        [{"input": f"*** Begin Patch\n@@\n-{old}\n+{new}\n*** End Patch"} for old, new in ("ab", "ba")],
    ],
    ids=["Claude Code and Qwen Code", "OpenCode", "text editor", "whole files", "patches"],
)
def test_an_edit_that_takes_back_an_earlier_one_is_seen(edits: list[Any]) -> None:
    done = [turn("Done.", "Edit", number, **edit) for number, edit in enumerate(edits)]
    whole = [ASK, *(message for each in done for message in each)]
    assert read_trajectory(whole).reverted == pytest.approx(RECENCY)
    assert read_trajectory(whole[:-2]).reverted == 0


def test_an_edit_of_another_file_or_one_that_failed_takes_nothing_back() -> None:
    first = turn("Done.", "Edit", 1, file_path="a.py", old_string="x", new_string="y")
    elsewhere = turn("Done.", "Edit", 2, file_path="b.py", old_string="y", new_string="x")
    failed = turn("Error: no", "Edit", 3, file_path="a.py", old_string="y", new_string="x")
    assert read_trajectory([ASK, *first, *elsewhere, *failed]).reverted == 0


def test_each_run_between_two_texts_of_the_user_has_its_share() -> None:
    messages = [*run_of(BADLY, BADLY), DONE, ASK, *turn(BADLY, number=7), *turn(WELL, number=8), DONE, ASK]
    newest, before = read_trajectory(messages).runs
    assert (newest.place, before.place) == (9, 3)
    assert newest.share + before.share == pytest.approx(1)
    assert newest.share == pytest.approx(0.7 * 0.3 / (0.7 * 0.3 + 0.49 * 0.51))


def test_functions_of_the_old_form_are_read_too() -> None:
    call = {"role": "assistant", "function_call": {"name": "run", "arguments": "{}"}}
    assert read_trajectory([ASK, call, {"role": "function", "name": "run", "content": BADLY}]).failed == RECENCY


def test_results_of_several_parts_are_read() -> None:
    parts = [{"type": "text", "text": "Exit code 2"}, {"type": "text", "text": "no"}]
    assert read_trajectory(run_of(parts)).failed == RECENCY
    assert read_trajectory(run_of([{"type": "image_url"}, None, 3])).turns == 1


def test_only_the_newest_turns_are_looked_at() -> None:
    long = run_of(*[BADLY] * 3000, *[WELL] * MAX_TURNS)
    assert len(long) > 6000
    assert read_trajectory(long).failed == 0


RESULTS = st.lists(st.sampled_from([WELL, BADLY, "", "Error: no"]), max_size=14)


@given(RESULTS)
def test_all_figures_are_shares(results: list[str]) -> None:
    found = read_trajectory(run_of(*results))
    assert all(0 <= value <= 1 for value in (found.stuck, found.failed, found.repeated, found.reverted))
    assert sum(run.share for run in found.runs) in (0, pytest.approx(1))


@given(RESULTS)
def test_a_success_never_adds_to_it_and_takes_off_what_there_is(results: list[str]) -> None:
    before, after = read_trajectory(run_of(*results)), read_trajectory(run_of(*results, WELL))
    assert after.stuck < before.stuck or before.stuck == 0 == after.stuck
    assert read_trajectory(run_of(*results, BADLY)).stuck >= before.stuck


@given(st.lists(JSON, max_size=12))
def test_any_messages_are_read(messages: list[Any]) -> None:
    found = read_trajectory(messages)
    assert 0 <= found.stuck <= 1


@given(JSON, JSON, JSON, st.sampled_from(["Edit", "apply_patch", "bash", "\ud800"]))
def test_any_call_and_any_result_are_read(arguments: Any, result: Any, call_id: Any, name: str) -> None:
    for written in (arguments, json.dumps(arguments), json.dumps({"file_path": arguments, "content": arguments})):
        call = {"id": call_id, "function": {"name": name, "arguments": written}}
        messages = [
            {"role": "assistant", "tool_calls": [call, call, arguments]},
            {"role": "tool", "tool_call_id": call_id, "content": result},
        ]
        assert read_trajectory(messages * 3).turns <= 3


@given(st.text(max_size=600))
def test_any_text_is_judged(text: str) -> None:
    assert has_failed(text) in (True, False, None)
    assert has_failed(text, reads=True) in (True, False, None)


def test_large_results_are_read_by_their_ends() -> None:
    large = "line of a log\n" * 200_000
    assert has_failed(f"Exit code 1\n{large}") is True
    assert has_failed(f"{large}1 failed, 2 passed in 0.1s") is True
    assert has_failed(f"{large}Exit code 1\n{large}") is False
