from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router_core.errors import InvalidValidationSet
from router_core.validation import loading
from router_core.validation.loading import load_validation_set

GOOD = {"prompt": "1+1?", "grader": {"type": "numeric", "answer": 2}}


def a_line(**changes: Any) -> str:
    merged = {**GOOD, **changes}
    return json.dumps({key: value for key, value in merged.items() if value is not None})


def a_file(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_a_short_line_gets_an_id_a_family_and_a_token_limit(tmp_path: Path) -> None:
    (prompt,) = load_validation_set(a_file(tmp_path, "", a_line(), ""))
    assert (prompt.id, prompt.family, prompt.max_tokens, prompt.text) == ("line-2", "custom", 512, "1+1?")
    assert prompt.level is None


def test_messages_may_hold_a_system_prompt_and_earlier_turns(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (prompt,) = load_validation_set(a_file(tmp_path, a_line(prompt=None, messages=messages)))
    assert [dict(message) for message in prompt.messages] == messages
    assert prompt.text == "a\nc"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = {"role": "user", "content": "a"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "{}"}


def test_a_prompt_may_offer_tools_and_hold_calls_and_their_results(tmp_path: Path) -> None:
    turns = [ASKED, CALLED, RESULT]
    line = a_line(prompt=None, messages=turns, tools=[TOOL], tool_choice="required", family="t")
    (prompt,) = load_validation_set(a_file(tmp_path, line))
    assert prompt.request == {"messages": turns, "tools": [TOOL], "tool_choice": "required"}
    assert prompt.to_json()["messages"] == turns
    assert prompt.text == "a"


def test_a_prompt_without_tools_is_sent_and_written_as_before(tmp_path: Path) -> None:
    (prompt,) = load_validation_set(a_file(tmp_path, a_line()))
    assert list(prompt.request) == ["messages"]
    assert list(prompt.to_json()) == ["id", "family", "prompt", "grader", "max_tokens", "language"]


def with_turns(*turns: Any, **more: Any) -> str:
    return a_line(prompt=None, messages=list(turns), tools=[TOOL], **more)


def a_call(**changes: Any) -> dict[str, Any]:
    return {**CALLED, "tool_calls": [{**CALL, **changes}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (a_line(tools=[]), "'tools' must be a list of 1 to 128"),
        (a_line(tools=["f"]), r"'tools\[0\]' must be an object"),
        (a_line(tools=[{"type": "custom", "function": {}}]), r"'tools\[0\].type' must be 'function'"),
        (a_line(tools=[{"type": "function", "name": "f"}]), r"unknown field 'tools\[0\].name'"),
        (a_line(tools=[{"type": "function", "function": {"name": "a b"}}]), "1 to 64 letters"),
        (a_line(tools=[{"type": "function", "function": {"name": "f", "parameters": 1}}]), "must be a JSON object"),
        (a_line(tools=[TOOL, TOOL]), "'tools' has 'f' twice"),
        (a_line(tool_choice="auto"), "'tool_choice' must be one of auto, none, required"),
        (a_line(tools=[TOOL], tool_choice="f"), "'tool_choice' must be one of"),
        (a_line(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "'tool_choice' must be"),
        (a_line(grader={"type": "tool_calls", "calls": [{"name": "g"}]}, tools=[TOOL]), "'tools' has no tool 'g'"),
        (a_line(prompt=None, messages=[ASKED, CALLED, RESULT]), "'tools' has no tool 'f'"),
        (with_turns(ASKED, CALLED), "end with a user turn or a tool's result"),
        (with_turns(ASKED, CALLED, ASKED), "no result of the tool call 'call00001'"),
        (with_turns(ASKED, CALLED, RESULT, RESULT), r"'messages\[3\].tool_call_id' must be the id of a call"),
        (with_turns(ASKED, RESULT), r"'messages\[1\].tool_call_id' must be the id of a call"),
        (with_turns(ASKED, CALLED, {"role": "tool", "content": "a"}), r"'messages\[2\].tool_call_id' is missing"),
        (with_turns({**ASKED, "tool_calls": []}), r"unknown field 'messages\[0\].tool_calls'"),
        (with_turns({**CALLED, "tool_calls": []}, ASKED), r"'messages\[0\].tool_calls' must be a list of calls"),
        (with_turns({**CALLED, "tool_calls": ["f"]}, ASKED), r"tool_calls\[0\]' must be an object"),
        (with_turns(a_call(id=7), ASKED), r"tool_calls\[0\].id' must be a string"),
        (with_turns(a_call(function={"name": "f", "arguments": "[1]"}), ASKED), "the text of a JSON object"),
        (with_turns(a_call(function={"name": "f", "arguments": "{"}), ASKED), "the text of a JSON object"),
    ],
)
def test_tools_and_calls_that_a_provider_would_refuse_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidValidationSet, match=rf"mine\.jsonl, line 1: .*{message}"):
        load_validation_set(a_file(tmp_path, line))


def test_a_byte_order_mark_windows_line_ends_and_odd_separators_are_read(tmp_path: Path) -> None:
    line = a_line(prompt="a\u2028b").encode()
    raw = json.dumps({**GOOD, "prompt": "x\u2028y"}, ensure_ascii=False).encode()
    loaded = load_validation_set(a_file(tmp_path, b"\xef\xbb\xbf" + line + b"\r", raw))
    assert [prompt.text for prompt in loaded] == ["a\u2028b", "x\u2028y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON at column"),
        ("[1]", "must be a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is stated twice"),
        ("[" * 100_000, "not usable JSON"),
        ('{"level": ' + "1" * 5_000 + "}", "not usable JSON"),
        (a_line(promt="x"), r"unknown field 'promt'; did you mean 'prompt'\?"),
        (a_line(grader=None), "field 'grader' is missing"),
        (a_line(grader="exact"), "field 'grader' must be a JSON object"),
        (a_line(grader={}), "'grader.type' must be one of"),
        (a_line(grader={"type": "exat"}), r"'grader.type' is unknown: 'exat'; did you mean 'exact'\?"),
        (a_line(grader={"type": "exact"}), "'grader.answer' is missing"),
        (a_line(grader={"type": "exact", "answer": " "}), "'grader.answer' must be a string that is not empty"),
        (a_line(grader={"type": "numeric", "answer": "2"}), "'grader.answer' must be a finite number"),
        (a_line(grader={"type": "numeric", "answer": float("nan")}), "must be a finite number"),
        (a_line(grader={"type": "numeric", "answer": True}), "must be a finite number"),
        (
            a_line(grader={"type": "numeric", "answer": 2, "tolerance": -1}),
            "'grader.tolerance' must be a number of 0 or more",
        ),
        (a_line(grader={"type": "numeric", "answer": 2, "tolerence": 1}), "did you mean 'tolerance'"),
        (a_line(grader={"type": "choice", "answer": "E", "options": ["a", "b"]}), "'grader.answer' must be the letter"),
        (
            a_line(grader={"type": "choice", "answer": "A", "options": ["a"]}),
            "'grader.options' must be a list of 2 to 10",
        ),
        (a_line(grader={"type": "regex", "pattern": "("}), "'grader.pattern' is not a regular expression"),
        (a_line(grader={"type": "regex", "pattern": "a" * 3_000}), "'grader.pattern' is longer than"),
        (a_line(grader={"type": "contains", "none": ["a"]}), "'grader.all' is missing"),
        (a_line(grader={"type": "contains", "all": "a"}), "'grader.all' must be a list of strings"),
        (a_line(grader={"type": "writing", "words": [5, 2]}), "'grader.words' must be two whole numbers"),
        (a_line(grader={"type": "writing"}), "states no constraint"),
        (a_line(grader={"type": "sequence", "items": ["a"]}), "'grader.items' must be a list of two"),
        (
            a_line(grader={"type": "sql", "setup": "CREATE TABLE t (a)", "query": "SELECT b FROM t"}),
            "do not run: no such column",
        ),
        (
            a_line(grader={"type": "sql", "setup": "CREATE TABLE t (a)", "query": "SELECT a FROM t"}),
            "'grader.query' must be",
        ),
        (a_line(grader={"type": "python", "function": "f", "uses": ["goto"]}), "'grader.uses' must be a list out of"),
        (a_line(grader={"type": "judge"}), "'grader.rubric' is missing"),
        (a_line(max_tokens=0), "'max_tokens' must be a whole number from 1"),
        (a_line(max_tokens="many"), "'max_tokens' must be a whole number"),
        (a_line(level=4), "'level' must be a whole number from 1 to 3"),
        (a_line(id=7), "'id' must be a string"),
        (a_line(prompt=None), "not neither"),
        (a_line(messages=[{"role": "user", "content": "a"}]), "not both"),
        (a_line(prompt=None, messages=[]), "'messages' must be a list such as"),
        (a_line(prompt=None, messages=["a"]), r"'messages\[0\]' must be an object"),
        (a_line(prompt=None, messages=[{"role": "robot", "content": "a"}]), r"'messages\[0\].role' must be one of"),
        (
            a_line(prompt=None, messages=[{"role": "user", "content": None}]),
            r"'messages\[0\].content' must be a string",
        ),
        (
            a_line(prompt=None, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
            "end with a user",
        ),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
        ("x" * 1_000_001, "longer than 1000000 bytes"),
    ],
)
def test_a_broken_line_is_named_with_its_field_and_the_fix(tmp_path: Path, line: str | bytes, message: str) -> None:
    with pytest.raises(InvalidValidationSet, match=rf"mine\.jsonl, line 2: .*{message}"):
        load_validation_set(a_file(tmp_path, a_line(id="first"), line))


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    with pytest.raises(InvalidValidationSet, match=r"line 3: field 'id' repeats 'a' of line 1"):
        load_validation_set(a_file(tmp_path, a_line(id="a"), a_line(id="b"), a_line(id="a")))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidValidationSet, match="there is no prompt in it"):
        load_validation_set(a_file(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(InvalidValidationSet, match="cannot be read"):
            load_validation_set(path)


def test_too_many_lines_are_refused_at_the_first_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_PROMPTS", 3)
    with pytest.raises(InvalidValidationSet, match="line 4: more than 3 prompts"):
        load_validation_set(a_file(tmp_path, *[a_line(id=str(number)) for number in range(5)]))


def test_the_id_depends_on_the_content(tmp_path: Path) -> None:
    one = load_validation_set(a_file(tmp_path, a_line(id="a")))
    same = load_validation_set(a_file(tmp_path, "", a_line(id="a", family="custom")))
    other = load_validation_set(a_file(tmp_path, a_line(id="a", max_tokens=9)))
    assert one.id == same.id != other.id
