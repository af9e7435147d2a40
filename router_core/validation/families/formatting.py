"""Reply in exactly the given form: the whole reply is compared letter by letter. The content is easy."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE, TOWNS, words
from router_core.validation.graders import ExactGrader, Grader, JsonSchemaGrader, RegexGrader, Terms, WritingGrader

_WORDS = words("amber basil cedar delta ember fjord grove hazel indigo jasper kelp lotus maple nutmeg onyx pearl")

Task = tuple[str, Grader, str]


def _say(rng: Random) -> Task:
    phrase = f"{rng.choice(_WORDS).upper()}-{rng.randint(100, 999)}"
    frames = [
        "Reply with exactly the code {p} and nothing else: no quotes, no full stop.",
        "Your whole answer must be: {p}\nDo not add anything.",
        "Repeat after me, word for word, without any comment: {p}",
    ]
    return rng.choice(frames).format(p=phrase), ExactGrader((phrase,), whole=True, case_sensitive=True), phrase


def _upper_list(rng: Random) -> Task:
    words = rng.sample(_WORDS, 4)
    expected = ";".join(word.upper() for word in words)
    text = (
        "Write these words in capital letters, separated by semicolons without spaces, and nothing else:"
        f" {', '.join(words)}"
    )
    return text, ExactGrader((expected,), whole=True, case_sensitive=True), expected


def _bullets(rng: Random) -> Task:
    words = sorted(rng.sample(_WORDS, rng.randint(3, 5)), key=lambda _: rng.random())
    expected = "\n".join(f"- {word}" for word in sorted(words))
    text = (
        "Sort these words alphabetically and print them as a list, one a line, each line starting with a hyphen and a"
        f" space. No other text.\n\n{' '.join(words)}"
    )
    return text, ExactGrader((expected,), whole=True, case_sensitive=True), expected


def _csv(rng: Random) -> Task:
    people, towns = rng.sample(PEOPLE, 3), rng.sample(TOWNS, 3)
    ages = [rng.randint(20, 70) for _ in people]
    told = " ".join(f"{p} is {a} and comes from {t}." for p, a, t in zip(people, ages, towns, strict=True))
    rows = "\n".join(f"{p},{a},{t}" for p, a, t in zip(people, ages, towns, strict=True))
    expected = f"name,age,town\n{rows}"
    return (
        f"{told}\n\nWrite this as CSV with the header name,age,town. Only the CSV, no spaces after commas.",
        ExactGrader((expected,), whole=True, case_sensitive=True),
        expected,
    )


def _tagged(rng: Random) -> Task:
    town, count = rng.choice(TOWNS), rng.randint(3, 5)
    pattern = rf"(?:\[\d+\] \S[^\n]*\n?){{{count}}}"
    text = (
        f"Invent {count} street names for the town of {town}. One a line, each line starting with its number in square "
        "brackets and a space, like [1] for the first. Nothing before or after the list."
    )
    return text, RegexGrader(pattern, full=True), "\n".join(f"[{i}] Mill Lane" for i in range(1, count + 1))


def _strict_json(rng: Random) -> Task:
    key, low = rng.choice(_WORDS), rng.randint(2, 40)
    values = [low * i for i in range(1, 6)]
    schema = {
        "type": "object",
        "properties": {key: {"const": values}},
        "required": [key],
        "additionalProperties": False,
    }
    text = (
        f"Output raw JSON and nothing else (no code fence): an object with the single key {key!r} whose value is the"
        f" list of the first five multiples of {low}, starting with {low} itself."
    )
    return text, JsonSchemaGrader(schema, whole=True), json.dumps({key: values})


def _padded(rng: Random) -> Task:
    words = rng.sample(_WORDS, 3)
    width = rng.randint(9, 12)
    expected = "|".join(word.ljust(width, ".") for word in words)
    text = (
        f"Take the words {', '.join(words)}. Fill each on the right with dots until it is {width} characters long, and"
        " join the three with | between them. Print only the resulting line."
    )
    return text, ExactGrader((expected,), whole=True, case_sensitive=True), expected


def _nested(rng: Random) -> Task:
    a, b, n = *rng.sample(_WORDS, 2), rng.randint(3, 6)
    expected = f"<{a}>" + f"<{b}/>" * n + f"</{a}>"
    text = (
        f"Write one line of XML: an element named {a} that contains {n} empty elements named {b}, self-closed without"
        " spaces. Only the XML."
    )
    return text, ExactGrader((expected,), whole=True, case_sensitive=True), expected


def _bare_sentence(rng: Random) -> Task:
    town, words = rng.choice(TOWNS), rng.randint(6, 9)
    text = (
        f"Write one sentence about the weather in {town} that has exactly {words} words and ends with an exclamation"
        " mark. Only the sentence."
    )
    grader = WritingGrader(Terms(all=(town,)), sentences=(1, 1), words=(words, words), ends_with="!")
    return text, grader, " ".join([town, "will", "be", "quite", "warm", "and", "sunny", "all", "day"][:words]) + "!"


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_say, _upper_list),
    (_bullets, _csv, _tagged),
    (_strict_json, _padded, _nested, _bare_sentence),
)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference = rng.choice(_TASKS[level - 1])(rng)
    return Draft(text, grader, reference, level)


SECTIONS = (Section("formatting", 15, by_levels(_draw)),)
