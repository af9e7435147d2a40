from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from router_core.validation.graders.structured import SqlGrader, _database, rows_of

SETUP = "CREATE TABLE t (name TEXT, n INTEGER); INSERT INTO t VALUES ('a', 1), ('b', 2), ('c', 3);"


def a_grader(query: str = "SELECT name FROM t WHERE n > 1", *, ordered: bool = False) -> SqlGrader:
    return SqlGrader(SETUP, query, ordered)


@pytest.mark.parametrize(
    "reply",
    [
        "SELECT name FROM t WHERE n >= 2;",
        "```sql\nSELECT name FROM t WHERE n > 1\n```",
        "Use:\n```\nWITH x AS (SELECT * FROM t) SELECT name FROM x WHERE n IN (2, 3) ORDER BY n DESC;\n```\nBye.",
        "select name from t where name <> 'a' -- all but a",
    ],
)
def test_a_query_is_graded_by_its_rows(reply: str) -> None:
    assert a_grader().grade(reply) == 1


WRONG = ("", "SELECT name FROM t", "SELECT n FROM t WHERE n > 1", "SELECT nope FROM t", "SELEC name", "b, c")


@pytest.mark.parametrize("reply", WRONG)
def test_other_rows_or_no_query_score_zero(reply: str) -> None:
    assert a_grader().grade(reply) == 0


def test_row_order_counts_only_if_ordered() -> None:
    backwards = "SELECT name FROM t ORDER BY n DESC"
    assert a_grader("SELECT name FROM t ORDER BY n", ordered=True).grade(backwards) == 0
    assert a_grader("SELECT name FROM t").grade(backwards) == 1


def test_numbers_are_compared_by_value() -> None:
    assert a_grader("SELECT AVG(n) FROM t").grade("SELECT SUM(n) / 3.0 FROM t") == 1


@pytest.mark.parametrize(
    "attack",
    [
        "SELECT name FROM t WHERE n > 1; DROP TABLE t",
        "WITH x AS (SELECT 1) DELETE FROM t",
        "SELECT load_extension('x')",
        "SELECT name FROM t WHERE n > 1 AND length(randomblob(10)) = 10",
        "SELECT name FROM t WHERE n > 1 AND (SELECT count(*) FROM pragma_database_list) > 0",
        "SELECT name FROM t WHERE n > 1 AND randomblob(1000000000) IS NOT NULL",
        "SELECT readfile('/etc/passwd')",
        "SELECT * FROM pragma_database_list",
        "SELECT name FROM t WHERE n > 1 AND length(zeroblob(1000000000)) > 1",
    ],
)
def test_anything_but_reading_is_denied(attack: str) -> None:
    grader = a_grader()
    score = grader.grade(attack)
    assert score == (1 if attack.endswith("DROP TABLE t") else 0)  # only the first statement is looked at
    assert grader.grade("SELECT name FROM t WHERE n > 1") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM t",
        "CREATE TABLE u (a)",
        "PRAGMA user_version = 1",
        "ATTACH ':memory:' AS m",
        "DROP TABLE t",
        "VACUUM",
    ],
)
def test_the_database_itself_refuses_to_be_written(statement: str) -> None:
    with closing(_database(SETUP)) as database, pytest.raises(sqlite3.DatabaseError, match=r"authori[sz]"):
        rows_of(database, statement)


def test_attaching_a_file_writes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.db"
    assert a_grader().grade(f"WITH a AS (SELECT 1) ATTACH '{target}' AS y") == 0
    assert a_grader().grade(f"SELECT 1 FROM t WHERE 1 = (SELECT 1); ATTACH '{target}' AS y") == 0
    assert not target.exists()


@pytest.mark.parametrize(
    "endless",
    [
        "WITH RECURSIVE x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x) SELECT count(*) FROM x",
        "SELECT count(*) FROM " + ", ".join(f"t t{i}" for i in range(30)),
        "WITH RECURSIVE x(s) AS (SELECT 'aaaaaaaa' UNION ALL SELECT s || s FROM x) SELECT max(s) FROM x",
        "WITH RECURSIVE x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x) SELECT i FROM x",
    ],
)
def test_a_query_without_end_is_stopped(endless: str) -> None:
    started = time.process_time()
    assert a_grader().grade(endless) == 0
    assert time.process_time() - started < 2
