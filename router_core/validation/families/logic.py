"""Orderings, house puzzles, liars and inference. Answers are found by trying every possibility."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels, choice, joined
from router_core.validation.families.names import PEOPLE
from router_core.validation.families.tables import Question
from router_core.validation.graders import ExactGrader, SequenceGrader

_SCALES = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("richer", "poorer", "richest", "poorest"),
)
_PETS = ("cat", "dog", "parrot", "rabbit", "turtle")
_DRINKS = ("tea", "coffee", "milk", "juice", "water")


def _ordering(rng: Random, level: int) -> Draft:
    people = rng.sample(PEOPLE, level + 2)
    more, less, most, least = rng.choice(_SCALES)
    clues = [rng.choice([f"{a} is {more} than {b}.", f"{b} is {less} than {a}."]) for a, b in pairwise(people)]
    rng.shuffle(clues)
    told = " ".join(clues)
    if rng.random() < 0.5:
        text = f"{told} List everyone from {most} to {least}, as names separated by commas."
        return Draft(text, SequenceGrader(tuple(people)), ", ".join(people), level, LONG)
    place = rng.randrange(1, len(people) - 1) if level > 1 else 0
    asked = f"the {most}" if place == 0 else f"number {place + 1} counting from the {most}"
    text = f"{told} Who is {asked}? Reply with the name."
    return Draft(text, ExactGrader((people[place],)), people[place], level, LONG)


def _houses(rng: Random, level: int) -> Draft:
    """Draw a house puzzle, and add clues until only one arrangement is left."""
    size = min(level + 1, 4)
    people, pets, drinks = rng.sample(PEOPLE, size), rng.sample(_PETS, size), rng.sample(_DRINKS, size)
    worlds = [(p, q) for p in permutations(range(size)) for q in permutations(range(size))]
    truth = worlds[rng.randrange(len(worlds))]
    clues: list[str] = []
    while len(worlds) > 1:
        clue, holds = _clue(rng, truth, people, pets, drinks)
        left = [world for world in worlds if holds(world)]
        if len(left) < len(worlds):
            worlds, clues = left, [*clues, clue]
    house = rng.randrange(size)
    what, answer = rng.choice([("keeps which pet", pets[truth[0][house]]), ("drinks what", drinks[truth[1][house]])])
    told = "\n".join(f"- {clue}" for clue in clues)
    text = (
        f"There are {size} houses in a row, numbered 1 to {size} from left to right. {joined(people)} live in houses "
        f"1 to {size} in this order. Each keeps one pet ({joined(sorted(pets))}) and drinks one drink "
        f"({joined(sorted(drinks))}); no two share either.\n{told}\nThe person in house {house + 1} {what}? "
        "Reply with one word."
    )
    return Draft(text, ExactGrader((answer, f"the {answer}", f"a {answer}")), answer, level, LONG)


World = tuple[tuple[int, ...], tuple[int, ...]]


def _clue(
    rng: Random, truth: World, people: Sequence[str], pets: Sequence[str], drinks: Sequence[str]
) -> tuple[str, Callable[[World], bool]]:
    """A true statement, and the test that an arrangement must pass to agree with it."""
    house, other = rng.randrange(len(people)), rng.randrange(len(people))
    pet, drink = truth[0][house], truth[1][house]
    if rng.random() < 0.4:
        return f"The owner of the {pets[pet]} drinks {drinks[drink]}.", lambda w: w[1][w[0].index(pet)] == drink
    if rng.random() < 0.5 and other != house:
        kept = truth[0][other]
        return f"{people[house]} does not keep the {pets[kept]}.", lambda w: w[0][house] != kept
    return f"{people[house]} drinks {drinks[drink]}.", lambda w: w[1][house] == drink


_FORMS = (
    (
        1,
        "All {a} are {b}. {n} is one of the {a}. What follows?",
        "{n} is one of the {b}",
        ("{n} is not one of the {b}", "All {b} are {a}", "Nothing follows about {n}"),
    ),
    (
        1,
        "No {a} are {b}. {n} is one of the {a}. What follows?",
        "{n} is not one of the {b}",
        ("{n} is one of the {b}", "All {b} are {a}", "Nothing follows about {n}"),
    ),
    (
        2,
        "All {a} are {b}. {n} is one of the {b}. What must be true of {n}?",
        "Nothing about being one of the {a}",
        ("{n} is one of the {a}", "{n} is not one of the {a}", "All {b} are {a}"),
    ),
    (
        2,
        "If the {a} arrive, the {b} leave. The {b} have not left. What follows?",
        "The {a} have not arrived",
        ("The {a} have arrived", "The {b} will never leave", "Nothing follows about the {a}"),
    ),
    (
        3,
        "Some {a} are {b}. All {b} are {c}. Which statement must be true?",
        "Some {a} are {c}",
        ("All {a} are {c}", "Some {a} are not {b}", "All {c} are {a}"),
    ),
    (
        3,
        "No {a} are {b}. Some {c} are {a}. Which statement must be true?",
        "Some {c} are not {b}",
        ("No {c} are {b}", "All {c} are {a}", "Some {b} are {c}"),
    ),
    (
        3,
        (
            "Either the {a} or the {b} broke it, not both. If the {b} broke it, the {c} saw it. The {c} saw nothing."
            " Who broke it?"
        ),
        "The {a}",
        ("The {b}", "The {c}", "It cannot be told"),
    ),
)
_KINDS = ("painters", "sailors", "gardeners", "drummers", "bakers", "climbers", "poets", "chess players", "pilots")


def _inference(rng: Random, level: int) -> Draft:
    words = dict(zip("abc", rng.sample(_KINDS, 3), strict=True)) | {"n": rng.choice(PEOPLE)}
    _, text, right, wrong = rng.choice([form for form in _FORMS if form[0] == level])
    question = Question(level, text.format(**words), right.format(**words), tuple(w.format(**words) for w in wrong))
    return choice(rng, question)


def _puzzle(rng: Random, level: int) -> Draft:
    return rng.choice((_ordering, _houses))(rng, level)


SECTIONS = (
    Section("ordering_puzzles", 15, by_levels(_puzzle), family="logic"),
    Section("inference", 9, by_levels(_inference), family="logic"),
)
