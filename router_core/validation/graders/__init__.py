"""Graders, which score an answer, and the table from a `type` to its class. None calls a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router_core.documents import JsonObject, nearest_hint, short_repr
from router_core.errors import InvalidValidationSet
from router_core.validation.graders.answers import MAX_ANSWER_CHARS, Grader
from router_core.validation.graders.choice import ChoiceGrader, NumericGrader
from router_core.validation.graders.judge import JudgeGrader
from router_core.validation.graders.structured import JsonSchemaGrader, PythonGrader, SqlGrader
from router_core.validation.graders.text import (
    ContainsGrader,
    ExactGrader,
    RegexGrader,
    SequenceGrader,
    Terms,
    WritingGrader,
)
from router_core.validation.graders.tool_calls import ExpectedCall, NoToolCallGrader, ToolCallsGrader

__all__ = [
    "GRADER_TYPES",
    "MAX_ANSWER_CHARS",
    "ChoiceGrader",
    "ContainsGrader",
    "ExactGrader",
    "ExpectedCall",
    "Grader",
    "JsonSchemaGrader",
    "JudgeGrader",
    "NoToolCallGrader",
    "NumericGrader",
    "PythonGrader",
    "RegexGrader",
    "SequenceGrader",
    "SqlGrader",
    "Terms",
    "ToolCallsGrader",
    "WritingGrader",
    "parse_grader",
]

GRADER_TYPES: Mapping[str, Callable[[JsonObject], Grader]] = {
    ChoiceGrader.type: ChoiceGrader.from_json,
    ContainsGrader.type: ContainsGrader.from_json,
    ExactGrader.type: ExactGrader.from_json,
    JsonSchemaGrader.type: JsonSchemaGrader.from_json,
    JudgeGrader.type: JudgeGrader.from_json,
    NoToolCallGrader.type: lambda spec: NoToolCallGrader.from_json(spec, parse_grader),
    NumericGrader.type: NumericGrader.from_json,
    PythonGrader.type: PythonGrader.from_json,
    RegexGrader.type: RegexGrader.from_json,
    SequenceGrader.type: SequenceGrader.from_json,
    SqlGrader.type: SqlGrader.from_json,
    ToolCallsGrader.type: ToolCallsGrader.from_json,
    WritingGrader.type: WritingGrader.from_json,
}


def parse_grader(spec: Mapping[str, object]) -> Grader:
    """Read the grader that the object describes. Raises InvalidValidationSet that names the field and the fix."""
    kind = spec.get("type")
    if not isinstance(kind, str):
        raise InvalidValidationSet(
            f"field 'grader.type' must be one of {', '.join(GRADER_TYPES)}; got {short_repr(kind)}"
        )
    if kind not in GRADER_TYPES:
        raise InvalidValidationSet(f"field 'grader.type' is unknown: {kind!r}{nearest_hint(kind, GRADER_TYPES)}")
    return GRADER_TYPES[kind](dict(spec))
