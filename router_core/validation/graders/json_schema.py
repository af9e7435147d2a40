"""The answer holds JSON that a schema accepts. References leave the schema never, patterns run under a time limit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from referencing import Registry

from router_core.errors import InvalidValidationSet
from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import fenced, visible
from router_core.validation.graders.patterns import check_pattern, found

_UNSUPPORTED = ("patternProperties", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef")
_MAX_STARTS = 50
_MAX_DEPTH = 64


def _pattern_in_time(_: object, pattern: str, value: object, __: object) -> Iterator[ValidationError]:
    if isinstance(value, str) and not found(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_extend: Any = extend
_Validator: Any = _extend(Draft202012Validator, {"pattern": _pattern_in_time})


@dataclass(frozen=True)
class JsonSchemaGrader:
    """Full marks when a JSON value in the reply is accepted. `whole`: the reply is that value and nothing else."""

    schema: Mapping[str, object]
    whole: bool = False
    type: ClassVar[str] = "json_schema"

    def grade(self, answer: str) -> float:
        text = visible(answer)
        values = _whole(text) if self.whole else _json_values(text)
        return float(any(self._accepts(value) for value in values))

    def _accepts(self, value: object) -> bool:
        try:
            return bool(self._validator.is_valid(value))
        except RecursionError:
            return False

    @cached_property
    def _validator(self) -> Any:
        return _Validator(self.schema, registry=Registry())

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "schema": dict(self.schema)}
        return spec | {"whole": True} if self.whole else spec

    @classmethod
    def from_json(cls, spec: JsonObject) -> JsonSchemaGrader:
        fields = Fields(spec, ("type", "schema", "whole"), "grader.")
        schema = fields.mapping("schema")
        if not schema:
            raise fields.wrong("schema", "a JSON schema that is not empty: {} accepts every answer")
        _check_schema(schema)
        return cls(schema, fields.flag("whole"))


def _check_schema(schema: JsonObject) -> None:
    _check_part(schema, 0)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(step) for step in error.absolute_path) or "(top)"
        raise InvalidValidationSet(f"field 'grader.schema' is not a JSON schema, at {where}: {error.message}") from None


def _check_part(part: object, depth: int) -> None:
    """Refuse what would read the network or run without a bound."""
    if depth > _MAX_DEPTH:
        raise InvalidValidationSet(f"field 'grader.schema' is nested deeper than {_MAX_DEPTH}: flatten it")
    if isinstance(part, list):
        for item in part:
            _check_part(item, depth + 1)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key in _UNSUPPORTED:
            raise InvalidValidationSet(f"field 'grader.schema' uses {key!r}, which is not supported: use 'properties'")
        if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise InvalidValidationSet(
                f"field 'grader.schema' refers to {value!r}: only '#/…' within itself is allowed"
            )
        if key == "pattern" and isinstance(value, str):
            check_pattern(value, "grader.schema/pattern")
        _check_part(value, depth + 1)


def _whole(text: str) -> list[object]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _json_values(text: str) -> Iterator[object]:
    """The JSON values of a reply: in its fenced blocks, else wherever a bracket opens one."""
    for block in (*reversed(fenced(text)), text):
        yield from _whole(block)
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(_MAX_STARTS):
        starts = [at for at in (text.find("{", position), text.find("[", position)) if at >= 0]
        if not starts:
            return
        try:
            value, position = decoder.raw_decode(text, min(starts))
            yield value
        except (ValueError, RecursionError):
            position = min(starts) + 1
