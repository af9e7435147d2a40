"""Read the tables of questions that ship with the package: one question a line, cells between bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "tables"


@dataclass(frozen=True)
class Question:
    """A multiple-choice question of level 1 to 3."""

    level: int
    text: str
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A question of fact. Any of `answers` is right; the first is the usual one."""

    level: int
    text: str
    answers: tuple[str, ...]


def read_questions(name: str) -> tuple[Question, ...]:
    """Read lines of `level | question | right | wrong | wrong | wrong`."""
    return tuple(Question(int(level), text, right, tuple(wrong)) for level, text, right, *wrong in read_rows(name))


def read_facts(name: str) -> tuple[Fact, ...]:
    """Read lines of `level | question | answer / another spelling`."""
    return parse_facts(_lines(name))


def parse_facts(lines: list[str]) -> tuple[Fact, ...]:
    rows = (line.split(" | ") for line in lines)
    return tuple(Fact(int(level), text, tuple(right.split(" / "))) for level, text, right in rows)


def read_rows(name: str) -> list[list[str]]:
    return [line.split(" | ") for line in _lines(name)]


def _lines(name: str) -> list[str]:
    content = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return [line.strip() for line in content.splitlines() if line.strip()]
