"""Prompts from tables of questions of fact, with an answer of a word or two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from router_core.validation.families.helpers import Draft, Drafts
from router_core.validation.families.tables import Fact, read_facts
from router_core.validation.graders import ContainsGrader, Grader, NumericGrader, Terms


def fact_grader(answers: Sequence[str]) -> Grader:
    """Grade a number by its value, and words by their occurrence."""
    if len(answers) == 1 and answers[0].replace(".", "").isdigit():
        return NumericGrader(float(answers[0]))
    return ContainsGrader(Terms(any=tuple(answers)))


def fact_draft(fact: Fact, frame: str = "{q}", language: str = "en") -> Draft:
    text = frame.format(q=fact.text)
    return Draft(text, fact_grader(fact.answers), fact.answers[0], fact.level, language=language)


def facts(name: str, frames: Sequence[str], *, language: str = "en") -> Drafts:
    """Draft each row of the table in a random frame, in which `{q}` stands for the question."""

    def drafts(rng: Random) -> Iterator[Draft]:
        rows = read_facts(name)
        for fact in rng.sample(rows, len(rows)):
            yield fact_draft(fact, rng.choice(frames), language)

    return drafts
