"""What every grader is, and the largest answer any of them reads. No grader lives here."""

from __future__ import annotations

from typing import ClassVar, Protocol

MAX_ANSWER_CHARS = 20_000
"""Longer answers are cut before grading, so that no answer can make a grader slow."""


class Grader(Protocol):
    """Turns the text of one answer into a score in [0, 1]; NaN where only a model could tell (JudgeGrader)."""

    type: ClassVar[str]

    def grade(self, answer: str) -> float: ...

    def to_json(self) -> dict[str, object]:
        """The object that `parse_grader` reads back."""
