"""The answer holds JSON that a schema accepts. What the schema may hold is schemas'."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import fenced, visible

_MAX_STARTS = 50


@dataclass(frozen=True)
class JsonSchemaGrader:
    """Full marks when a JSON value in the reply is accepted. `whole`: the reply is that value and nothing else."""

    schema: Mapping[str, object]
    whole: bool = False
    type: ClassVar[str] = "json_schema"

    def grade(self, answer: str) -> float:
        from router_core.validation.graders.schemas import accepts  # the library takes a second to be imported

        text = visible(answer)
        values = _whole(text) if self.whole else _json_values(text)
        return float(any(accepts(self.schema, value) for value in values))

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "schema": dict(self.schema)}
        return spec | {"whole": True} if self.whole else spec

    @classmethod
    def from_json(cls, spec: JsonObject) -> JsonSchemaGrader:
        from router_core.validation.graders.schemas import check_schema

        fields = Fields(spec, ("type", "schema", "whole"), "grader.")
        schema = fields.mapping("schema")
        if not schema:
            raise fields.wrong("schema", "a JSON schema that is not empty: {} accepts every answer")
        check_schema(schema)
        return cls(schema, fields.flag("whole"))


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
