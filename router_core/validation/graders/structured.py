from __future__ import annotations

import ast
import json
import re
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from router_core.documents import Fields, JsonObject
from router_core.errors import InvalidValidationSet
from router_core.validation.graders.answers import fenced_blocks, strip_thinking

_MAX_STARTS = 50


@dataclass(frozen=True)
class JsonSchemaGrader:
    """Gives full marks if a JSON value in the reply is valid. `whole`: the reply is that value and nothing else."""

    schema: Mapping[str, object]
    whole: bool = False
    type: ClassVar[str] = "json_schema"

    def grade(self, answer: str) -> float:
        from router_core.validation.graders.schemas import accepts

        text = strip_thinking(answer)
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
            raise fields.error("schema", "a JSON schema that is not empty: {} accepts every answer")
        check_schema(schema)
        return cls(schema, fields.flag("whole"))


def _whole(text: str) -> list[object]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _json_values(text: str) -> Iterator[object]:
    """Yield the JSON values of a reply: its fenced blocks, and wherever a bracket opens one."""
    for block in (*reversed(fenced_blocks(text)), text):
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


Row = tuple[object, ...]

MAX_STEPS = 200_000

MAX_ROWS = 500

MAX_VALUE_BYTES = 2_000

MAX_QUERY_BYTES = 4_000

_STEPS_PER_CHECK = 1_000

_FUNCTION_NAMES = """
    abs avg coalesce count date datetime ifnull iif instr julianday length like lower ltrim max min nullif round
    row_number rank dense_rank rtrim strftime substr substring sum time total trim upper lag lead first_value
    last_value ntile group_concat
"""

_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())

_READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})

_QUERY = re.compile(r"\b(?:SELECT|WITH)\b.*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class SqlGrader:
    """Gives full marks if the reply's query returns the same rows as `query`; with `ordered`, in the same order."""

    setup: str
    query: str
    ordered: bool = False
    type: ClassVar[str] = "sql"

    def grade(self, answer: str) -> float:
        answer_query = _query_in(strip_thinking(answer))
        if answer_query is None:
            return 0.0
        try:
            with closing(_database(self.setup)) as database:
                return float(
                    _same_rows(rows_of(database, self.query), rows_of(database, answer_query), ordered=self.ordered)
                )
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return 0.0

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "setup": self.setup, "query": self.query}
        return spec | {"ordered": True} if self.ordered else spec

    @classmethod
    def from_json(cls, spec: JsonObject) -> SqlGrader:
        fields = Fields(spec, ("type", "setup", "query", "ordered"), "grader.")
        grader = cls(fields.text("setup"), fields.text("query"), fields.flag("ordered"))
        try:
            with closing(_database(grader.setup)) as database:
                rows = rows_of(database, grader.query)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise InvalidValidationSet(f"fields 'grader.setup' and 'grader.query' do not run: {error}") from None
        if not rows:
            raise fields.error("query", "a query that returns rows on 'setup'")
        return grader


def _database(setup: str) -> sqlite3.Connection:
    """Open a database, fill it, and make it read-only: the authorizer is set last."""
    database = sqlite3.connect(":memory:")
    try:
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        _limit_steps(database)
        database.executescript(setup)
    except BaseException:
        database.close()
        raise
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_QUERY_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
    database.set_authorizer(_authorize)
    return database


def _authorize(action: int, _: str | None, function: str | None, *__: str | None) -> int:
    """Allow selecting and reading, and functions that neither load, allocate nor change anything."""
    allowed = action in _READS or (action == sqlite3.SQLITE_FUNCTION and str(function).lower() in _FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _limit_steps(database: sqlite3.Connection) -> None:
    checks_left = MAX_STEPS // _STEPS_PER_CHECK

    def out_of_steps() -> bool:
        nonlocal checks_left
        checks_left -= 1
        return checks_left < 0

    database.set_progress_handler(out_of_steps, _STEPS_PER_CHECK)


def rows_of(database: sqlite3.Connection, query: str) -> list[Row]:
    """Run a query within its own step limit; ValueError if it returns more than MAX_ROWS rows."""
    _limit_steps(database)
    with closing(database.execute(query)) as cursor:
        rows = cursor.fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} rows")
    return [tuple(_round(value) for value in row) for row in rows]


def _round(value: object) -> object:
    """Round numbers to six decimals, so that 2 and 2.0000000001 are equal."""
    return round(float(value), 6) if isinstance(value, int | float) else value


def _same_rows(expected: list[Row], got: list[Row], *, ordered: bool) -> bool:
    return expected == got if ordered else sorted(expected, key=repr) == sorted(got, key=repr)


def _query_in(text: str) -> str | None:
    """Return the first statement of the last fenced block with one, else what begins at the first SELECT or WITH."""
    for block in (*reversed(fenced_blocks(text)), text):
        if match := _QUERY.search(block):
            return match.group(0).split(";")[0].split("```")[0].strip()
    return None


MAX_CODE_CHARS = 4_000

_FEATURES: dict[str, tuple[type[ast.AST], ...]] = {
    "loop": (ast.For, ast.While, ast.AsyncFor),
    "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    "try": (ast.Try,),
    "raise": (ast.Raise,),
    "lambda": (ast.Lambda,),
    "yield": (ast.Yield, ast.YieldFrom),
    "import": (ast.Import, ast.ImportFrom),
    "with": (ast.With,),
    "if": (ast.If, ast.IfExp),
    "return": (ast.Return,),
}

FEATURES = (*_FEATURES, "recursion", "docstring", "annotations", "default")


@dataclass(frozen=True)
class PythonGrader:
    """Gives full marks if a function of this name and these arguments is defined. The code is parsed, and never run.

    It must have the features in `uses`, none of those in `avoids`, and every name in `mentions` (a function, method or
    variable).
    """

    function: str
    arguments: tuple[str, ...]
    uses: tuple[str, ...] = ()
    avoids: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    type: ClassVar[str] = "python"

    def grade(self, answer: str) -> float:
        text = strip_thinking(answer)
        return float(any(self._fits(node) for code in (*fenced_blocks(text), text) for node in _functions(code)))

    def _fits(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        if node.name != self.function or tuple(arg.arg for arg in node.args.args) != self.arguments:
            return False
        present = {feature for feature in FEATURES if _has(node, feature)}
        if present & set(self.avoids) or not set(self.uses) <= present or _is_empty(node):
            return False
        return set(self.mentions) <= set(_names(node))

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "function": self.function, "arguments": list(self.arguments)}
        return spec | {name: list(value) for name in ("uses", "avoids", "mentions") if (value := getattr(self, name))}

    @classmethod
    def from_json(cls, spec: JsonObject) -> PythonGrader:
        fields = Fields(spec, ("type", "function", "arguments", "uses", "avoids", "mentions"), "grader.")
        uses, avoids = fields.texts("uses"), fields.texts("avoids")
        for key, features in (("uses", uses), ("avoids", avoids)):
            if not set(features) <= set(FEATURES):
                raise fields.error(key, f"a list out of {', '.join(FEATURES)}")
        return cls(fields.text("function"), fields.texts("arguments"), uses, avoids, fields.texts("mentions"))


def _functions(code: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in string literals
            tree = ast.parse(code[:MAX_CODE_CHARS])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _has(node: ast.FunctionDef | ast.AsyncFunctionDef, feature: str) -> bool:
    if feature == "recursion":
        return any(isinstance(part, ast.Call) and node.name in _names(part.func) for part in ast.walk(node))
    if feature == "docstring":
        return ast.get_docstring(node) is not None
    if feature == "annotations":
        return node.returns is not None and all(arg.annotation is not None for arg in node.args.args)
    if feature == "default":
        return bool(node.args.defaults)
    return any(isinstance(part, _FEATURES[feature]) for part in ast.walk(node))


def _is_empty(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether the body is only `pass`, `...` or a docstring."""
    constant = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node.body]
    return all(is_constant or isinstance(part, ast.Pass) for is_constant, part in zip(constant, node.body, strict=True))


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.alias):
            yield part.name
