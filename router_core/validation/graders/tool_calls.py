from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from router_core.documents import Fields, JsonObject, short_repr
from router_core.errors import InvalidValidationSet
from router_core.validation.graders.answers import Grader, ToolCall, casefold, read_reply, strip_thinking

MAX_EXPECTED_CALLS = 16

Values = Mapping[str, Sequence[object]]


@dataclass(frozen=True)
class ExpectedCall:
    """A call that a model should make."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    """What must be given. Nested objects and lists are compared as a whole."""
    alternatives: Values = field(default_factory=dict)
    """Other values that are as good, by argument."""
    optional: Values = field(default_factory=dict)
    """The accepted values of arguments that may be left out. An argument that is named nowhere makes a call wrong."""

    def fits(self, call: ToolCall, *, tolerance: float, case_sensitive: bool) -> bool:
        if call.name != self.name or not isinstance(call.arguments, dict):
            return False
        given = _without_nulls(call.arguments, self.arguments)
        if not self.arguments.keys() <= given.keys() <= self.arguments.keys() | self.optional.keys():
            return False
        return all(
            any(_equal(value, got, tolerance, case_sensitive) for value in self._accepted(name))
            for name, got in given.items()
        )

    def _accepted(self, argument: str) -> list[object]:
        required = [self.arguments[argument]] if argument in self.arguments else []
        return [*required, *self.alternatives.get(argument, ()), *self.optional.get(argument, ())]

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"name": self.name, "arguments": dict(self.arguments)}
        for key, values in (("alternatives", self.alternatives), ("optional", self.optional)):
            if values:
                spec[key] = {argument: list(accepted) for argument, accepted in values.items()}
        return spec

    @classmethod
    def from_json(cls, spec: JsonObject, prefix: str) -> ExpectedCall:
        fields = Fields(spec, ("name", "arguments", "alternatives", "optional"), prefix)
        arguments = fields.mapping("arguments") if fields.has("arguments") else {}
        alternatives, optional = _values(fields, "alternatives"), _values(fields, "optional")
        if not alternatives.keys() <= arguments.keys():
            raise fields.error("alternatives", "an object whose keys are keys of 'arguments'")
        if optional.keys() & arguments.keys():
            raise fields.error("optional", "an object without the keys of 'arguments'")
        return cls(fields.text("name"), arguments, alternatives, optional)


def _values(fields: Fields, key: str) -> Values:
    values = fields.mapping(key) if fields.has(key) else {}
    lists = {argument: accepted for argument, accepted in values.items() if isinstance(accepted, list) and accepted}
    if len(lists) < len(values):
        raise fields.error(key, 'an object of lists that are not empty, such as {"unit": ["celsius"]}')
    return lists


def _without_nulls(given: Mapping[str, object], expected: Mapping[str, object]) -> dict[str, object]:
    """Leave out arguments that are null, unless they are expected: models state what they leave out so."""
    return {name: value for name, value in given.items() if value is not None or name in expected}


def _equal(expected: object, got: object, tolerance: float, case_sensitive: bool) -> bool:  # noqa: FBT001
    """Compare values of JSON. 2 and 2.0 are the same number; "2", true and 2 are three values."""
    if isinstance(expected, bool) or isinstance(got, bool) or expected is None:
        return expected is got
    if isinstance(expected, int | float):
        return isinstance(got, int | float) and _near(expected, got, tolerance)
    if isinstance(expected, str):
        key = str.strip if case_sensitive else casefold
        return isinstance(got, str) and key(expected) == key(got)
    if isinstance(expected, list):
        return (
            isinstance(got, list)
            and len(got) == len(expected)
            and all(_equal(*pair, tolerance, case_sensitive) for pair in zip(expected, got, strict=True))
        )
    if not isinstance(expected, dict) or not isinstance(got, dict):
        return False
    given = _without_nulls(got, expected)
    return given.keys() == expected.keys() and all(
        _equal(value, given[name], tolerance, case_sensitive) for name, value in expected.items()
    )


def _near(expected: float, got: float, tolerance: float) -> bool:
    try:
        return math.isclose(expected, got, rel_tol=1e-9, abs_tol=tolerance)
    except OverflowError:  # an integer of hundreds of digits
        return False


@dataclass(frozen=True)
class ToolCallsGrader:
    """Gives full marks if the reply makes exactly these calls, in any order. Text beside them does not count."""

    calls: tuple[ExpectedCall, ...]
    tolerance: float = 0.0
    """How far a number may be off."""
    case_sensitive: bool = False
    type: ClassVar[str] = "tool_calls"

    def grade(self, answer: str) -> float:
        _, made = read_reply(answer)
        if len(made) != len(self.calls):
            return 0.0
        fitting = [
            [
                row
                for row, call in enumerate(made)
                if expected.fits(call, tolerance=self.tolerance, case_sensitive=self.case_sensitive)
            ]
            for expected in self.calls
        ]
        return float(_can_be_paired(fitting))

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "calls": [call.to_json() for call in self.calls]}
        if self.tolerance:
            spec["tolerance"] = self.tolerance
        return spec | {"case_sensitive": True} if self.case_sensitive else spec

    @classmethod
    def from_json(cls, spec: JsonObject) -> ToolCallsGrader:
        fields = Fields(spec, ("type", "calls", "tolerance", "case_sensitive"), "grader.")
        calls = spec.get("calls")
        if not isinstance(calls, list) or not 1 <= len(calls) <= MAX_EXPECTED_CALLS:
            raise fields.error("calls", f'a list of 1 to {MAX_EXPECTED_CALLS} calls, such as [{{"name": "search"}}]')
        for index, call in enumerate(calls):
            if not isinstance(call, dict):
                raise InvalidValidationSet(
                    f"field 'grader.calls[{index}]' must be an object with name and arguments; got {short_repr(call)}"
                )
        tolerance = fields.number("tolerance", 0.0)
        if tolerance < 0:
            raise fields.error("tolerance", "a number of 0 or more")
        expected = (ExpectedCall.from_json(call, f"grader.calls[{index}].") for index, call in enumerate(calls))
        return cls(tuple(expected), tolerance, fields.flag("case_sensitive"))


def _can_be_paired(fitting: Sequence[Sequence[int]]) -> bool:
    """Return whether each row can be given a number from its list that no other row has (Kuhn's algorithm)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for number in fitting[row]:
            if number not in tried:
                tried.add(number)
                if number not in owner or place(owner[number], tried):
                    owner[number] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fitting)))


# Graders that look at calls, or that need a model.
_NOT_OF_TEXTS = ("tool_calls", "no_tool_call", "judge")


@dataclass(frozen=True)
class NoToolCallGrader:
    """Gives no marks to a reply that calls a tool, and those of `answer` to any other: full ones if it is None."""

    answer: Grader | None = None
    type: ClassVar[str] = "no_tool_call"

    def grade(self, answer: str) -> float:
        _, made = read_reply(answer)
        if made:
            return 0.0
        return float(bool(strip_thinking(answer))) if self.answer is None else self.answer.grade(answer)

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type}
        return spec if self.answer is None else spec | {"answer": self.answer.to_json()}

    @classmethod
    def from_json(cls, spec: JsonObject, parse: Callable[[JsonObject], Grader]) -> NoToolCallGrader:
        """Read a grader, and by `parse` the one within it."""
        fields = Fields(spec, ("type", "answer"), "grader.")
        if not fields.has("answer"):
            return cls()
        inner = fields.mapping("answer")
        if inner.get("type") in _NOT_OF_TEXTS:
            raise fields.error("answer", f"a grader of a text, which {inner['type']!r} is not")
        return cls(parse(inner))
