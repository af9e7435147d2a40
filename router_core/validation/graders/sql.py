"""A SQL query, judged by the rows it returns from a small database in memory. Reads only, within a step limit."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from router_core.errors import InvalidValidationSet
from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import fenced, visible

Row = tuple[object, ...]

MAX_STEPS = 200_000
MAX_ROWS = 500
MAX_VALUE_BYTES = 2_000
MAX_QUERY_BYTES = 4_000
_STEPS_BETWEEN_LOOKS = 1_000
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
    """Full marks when the reply's query returns the rows that `query` returns. `ordered`: in that order, too."""

    setup: str
    query: str
    ordered: bool = False
    type: ClassVar[str] = "sql"

    def grade(self, answer: str) -> float:
        written = _written_query(visible(answer))
        if written is None:
            return 0.0
        try:
            with closing(_database(self.setup)) as database:
                return float(
                    _same_rows(rows_of(database, self.query), rows_of(database, written), ordered=self.ordered)
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
            raise fields.wrong("query", "a query that returns rows on 'setup'")
        return grader


def _database(setup: str) -> sqlite3.Connection:
    """Filled, and from then on read-only: the authorizer comes last."""
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
    """Selecting and reading, and functions that neither load, allocate nor change anything."""
    allowed = action in _READS or (action == sqlite3.SQLITE_FUNCTION and str(function).lower() in _FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _limit_steps(database: sqlite3.Connection) -> None:
    looks_left = MAX_STEPS // _STEPS_BETWEEN_LOOKS

    def out_of_steps() -> bool:
        nonlocal looks_left
        looks_left -= 1
        return looks_left < 0

    database.set_progress_handler(out_of_steps, _STEPS_BETWEEN_LOOKS)


def rows_of(database: sqlite3.Connection, query: str) -> list[Row]:
    """At most MAX_ROWS rows, each query with a step limit of its own."""
    _limit_steps(database)
    with closing(database.execute(query)) as cursor:
        rows = cursor.fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} rows")
    return [tuple(_rounded(value) for value in row) for row in rows]


def _rounded(value: object) -> object:
    """Numbers to six decimals, so that 2 and 2.0000000001 are one."""
    return round(float(value), 6) if isinstance(value, int | float) else value


def _same_rows(expected: list[Row], got: list[Row], *, ordered: bool) -> bool:
    return expected == got if ordered else sorted(expected, key=repr) == sorted(got, key=repr)


def _written_query(text: str) -> str | None:
    """The first statement of the last fenced block that has one, else from the first SELECT or WITH on."""
    for block in (*reversed(fenced(text)), text):
        if match := _QUERY.search(block):
            return match.group(0).split(";")[0].split("```")[0].strip()
    return None
