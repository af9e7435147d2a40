"""Run every grader, and the judge's parser, over every shape. `test_linear_time` runs this in a child process."""

from __future__ import annotations

import sys
from collections.abc import Callable

from router_core.validation.graders import (
    ChoiceGrader,
    ContainsGrader,
    ExactGrader,
    ExpectedCall,
    Grader,
    JsonSchemaGrader,
    JudgeGrader,
    NoToolCallGrader,
    NumericGrader,
    PythonGrader,
    RegexGrader,
    SequenceGrader,
    SqlGrader,
    Terms,
    ToolCallsGrader,
    WritingGrader,
)
from router_core.validation.graders.answers import ToolCall, write_reply
from tests.support.linear_time import read_all

TREE = {"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}, "items": {"$ref": "#"}, "uniqueItems": True}
ROWS = "CREATE TABLE t(a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y');"
GRADERS: tuple[Grader, ...] = (
    ExactGrader(("forty two", "42")),
    ExactGrader(("42",), whole=True, case_sensitive=True),
    SequenceGrader(("apple", "pear", "plum")),
    ChoiceGrader("B", ("apple", "pear", "green apple")),
    NumericGrader(42.0),
    RegexGrader(r"\banswer\b.*42"),
    ContainsGrader(Terms(all=("apple pie",), any=("a",), none=("b",))),
    WritingGrader(Terms(), sentences=(1, 2), words=(1, 9), lines=(1, 2), starts_with="a", ends_with="."),
    JsonSchemaGrader(TREE),
    SqlGrader(ROWS, "SELECT a FROM t"),
    PythonGrader("f", ("n",), ("recursion",)),
    NoToolCallGrader(NumericGrader(42.0)),
)
CALLS = ToolCallsGrader((ExpectedCall("f", {"a": ["x"]}),) * 16)
JUDGE = JudgeGrader("Is it right?")


def readers() -> dict[str, Callable[[str], object]]:
    found: dict[str, Callable[[str], object]] = {
        f"{place} {grader.type}": grader.grade for place, grader in enumerate(GRADERS)
    }
    found["calls"] = lambda text: CALLS.grade("\n".join([f"[tool call] {text}"] * 16))
    found["arguments"] = lambda text: CALLS.grade(write_reply(text, [ToolCall.received(text, text)] * 16))
    return {**found, "judge": JUDGE.parse, "to the judge": lambda text: JUDGE.messages(text, text)}


if __name__ == "__main__":
    GRADERS[8].grade("{}")  # its library takes a second to be imported, which is no work on a shape
    read_all(readers(), sys.argv[1])
