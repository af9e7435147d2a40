from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import TypeVar

from router_core.documents import JsonObject
from router_core.validation.families.tables import Question, read_questions
from router_core.validation.graders import ChoiceGrader, Grader
from router_core.validation.validation_set import Message

# Token limit for answers of a word or a line, with room for an explanation first.
SHORT = 256

# Token limit for answers that need working, and for texts and code.
LONG = 512

LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Draft:
    """A prompt without an id. `reference` is an answer that gets full marks."""

    text: str
    grader: Grader
    reference: str
    level: int
    max_tokens: int = SHORT
    language: str = "en"
    system: str | None = None
    tools: tuple[JsonObject, ...] = ()
    turns: tuple[Message, ...] = ()
    """What follows the user's text: earlier calls of the model, and their results."""


Row = TypeVar("Row")

Drafts = Callable[[Random], Iterator[Draft]]


@dataclass(frozen=True)
class Section:
    """A part of a family: the first `count` distinct prompts that `drafts` yields, or all if it is None.

    The section's name is that of the family unless another is given.
    """

    name: str
    count: int | None
    drafts: Drafts
    family: str | None = None


def by_levels(draw: Callable[[Random, int], Draft]) -> Drafts:
    """Draft prompts without end, of levels 1, 2 and 3 in turn."""

    def drafts(rng: Random) -> Iterator[Draft]:
        for level in cycle(LEVELS):
            yield draw(rng, level)

    return drafts


def of_rows(rows: Sequence[Row], draw: Callable[[Random, Row], Draft]) -> Drafts:
    """Draft one prompt for each row of a table, in random order."""

    def drafts(rng: Random) -> Iterator[Draft]:
        for row in rng.sample(rows, len(rows)):
            yield draw(rng, row)

    return drafts


CHOICE_FRAMES = (
    "{question}\n{dots}\nAnswer:",
    "{question}\n\n{brackets}\n\nReply with the letter of the right option.",
    "Question: {question}\nOptions:\n{round}\nWhich one is correct? Give its letter.",
    "{question}\n\nChoose one:\n{brackets}\nSay only the letter.",
    (
        "Pick the correct option.\n\n{question}\n{dots}\n\nYou may explain, but close with the line 'Answer:' and a"
        " letter."
    ),
)


def choice(rng: Random, question: Question, frames: Sequence[str] = CHOICE_FRAMES, *, language: str = "en") -> Draft:
    """Write the question in a random frame, with its options in random order."""
    options = [question.right, *question.wrong]
    rng.shuffle(options)
    letters = "ABCDEFGHIJ"[: len(options)]
    answer = letters[options.index(question.right)]
    listed = list(zip(letters, options, strict=True))
    text = rng.choice(frames).format(
        question=question.text,
        dots="\n".join(f"{letter}. {option}" for letter, option in listed),
        brackets="\n".join(f"{letter}) {option}" for letter, option in listed),
        round="\n".join(f"({letter}) {option}" for letter, option in listed),
    )
    return Draft(text, ChoiceGrader(answer, tuple(options)), answer, question.level, language=language)


def choices(name: str) -> Drafts:
    """Draft multiple-choice prompts from a table of questions."""

    def drafts(rng: Random) -> Iterator[Draft]:
        yield from of_rows(read_questions(name), choice)(rng)

    return drafts


def joined(items: Sequence[str], last: str = "and") -> str:
    """Join items as "a, b and c"."""
    return f"{', '.join(items[:-1])} {last} {items[-1]}" if len(items) > 1 else items[0]
