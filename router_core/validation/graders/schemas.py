"""JSON schemas by the library `jsonschema`, in bounded time.

The first grader that needs it imports this module: the library takes up to three seconds to be imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from router_core.documents import JsonObject
from router_core.errors import InvalidValidationSet
from router_core.validation.graders.text import check_pattern, search_with_timeout

_UNSUPPORTED = ("patternProperties", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef")

_MAX_DEPTH = 64

_MAX_PATTERNS = 50

# Parts of a schema with every `$ref` unfolded. Thirty levels that each refer twice to the next are 2^30.
MAX_PARTS = 10_000

# References followed for one value. A schema that refers twice to itself doubles them with each level of the value.
MAX_REFERENCES = 5_000

_PROBES: tuple[object, ...] = (None, 0, "", {}, [])


class _TooManyReferences(Exception):
    """More than MAX_REFERENCES were followed, or there are more than MAX_PARTS."""


def _pattern_in_time(_: object, pattern: str, value: object, __: object) -> Iterator[ValidationError]:
    if isinstance(value, str) and not search_with_timeout(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _unique_items(_: object, wanted: object, value: object, __: object) -> Iterator[ValidationError]:
    """Check `uniqueItems` in linear time: the library compares every two items if they cannot be sorted."""
    items = value if wanted is True and isinstance(value, list) else []
    if len({json.dumps(_canonical(item), sort_keys=True) for item in items}) < len(items):
        yield ValidationError("an item is there twice")


def _canonical(value: object) -> object:
    """Write 1.0 as 1: in JSON they are the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return {key: _canonical(item) for key, item in value.items()} if isinstance(value, dict) else value


_extend: Any = extend

_Validator: Any = _extend(Draft202012Validator, {"pattern": _pattern_in_time, "uniqueItems": _unique_items})


def accepts(schema: Mapping[str, object], value: object) -> bool:
    """Return whether `value` is valid. A value that takes too many steps is not."""
    try:
        return _is_valid(schema, value)
    except (RecursionError, ArithmeticError, Unresolvable, _TooManyReferences):  # 1e999 is no multiple of anything
        return False


def _is_valid(schema: Mapping[str, object], value: object) -> bool:
    left = MAX_REFERENCES

    def follow(validator: Any, ref: str, instance: object, part: object) -> Iterator[ValidationError]:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooManyReferences
        yield from _Validator.VALIDATORS["$ref"](validator, ref, instance, part)

    return bool(_extend(_Validator, {"$ref": follow})(schema, registry=Registry()).is_valid(value))


def check_schema(schema: JsonObject) -> None:
    """Raise InvalidValidationSet if the schema is not one, or could run without bound or read the network."""
    _check_part(schema, 0)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(step) for step in error.absolute_path) or "(top)"
        raise InvalidValidationSet(f"field 'grader.schema' is not a JSON schema, at {where}: {error.message}") from None
    try:
        parts = _Parts(schema)
        if parts.count(schema) > MAX_PARTS:
            raise _TooManyReferences
        for value in _PROBES:
            _is_valid(schema, value)
    except (RecursionError, _TooManyReferences):
        raise InvalidValidationSet(
            f"field 'grader.schema' has a '$ref' that leads to itself, or more than {MAX_PARTS} parts once each '$ref'"
            " is unfolded: refer less often"
        ) from None
    if parts.patterns > _MAX_PATTERNS:
        raise InvalidValidationSet(f"field 'grader.schema' has more than {_MAX_PATTERNS} patterns: keep the best")


class _Parts:
    """Counts the parts of a schema, including those that it refers to. What refers back to itself counts once."""

    def __init__(self, schema: JsonObject) -> None:
        self._resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
        self._known: dict[int, int] = {}
        self.patterns = 0

    def count(self, part: object) -> int:
        if not isinstance(part, dict | list):
            return 1
        if id(part) in self._known:
            return self._known[id(part)]
        self._known[id(part)] = 1
        count = 1 + sum(self.count(inner) for inner in (part.values() if isinstance(part, dict) else part))
        if isinstance(part, dict):
            self.patterns += isinstance(part.get("pattern"), str)
            if isinstance(ref := part.get("$ref"), str):
                count += self.count(self._target(ref))
        self._known[id(part)] = count
        return count

    def _target(self, ref: str) -> object:
        try:
            return self._resolver.lookup(ref).contents
        except Unresolvable:
            raise InvalidValidationSet(f"field 'grader.schema' refers to {ref!r}, which is not in it") from None


def _check_part(part: object, depth: int) -> None:
    """Raise InvalidValidationSet for what would read the network or run without bound."""
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
        if key == "$id" and isinstance(value, str) and depth:
            raise InvalidValidationSet("field 'grader.schema' has an inner '$id', which moves '#': leave it out")
        if key == "pattern" and isinstance(value, str):
            check_pattern(value, "grader.schema/pattern")
        _check_part(value, depth + 1)
