"""Write a small Python function. Answers are parsed, never run."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.graders import PythonGrader

_FRAMES = (
    "Write a Python function `{head}` that {does}. {how}",
    "Implement {head} in Python 3. It {does}. {how} Reply with the code only.",
    "python pls: def {head} which {does}. {how}",
    (
        "I need a helper for my project. Name and arguments: `{head}`. What it does: it {does}. {how} Put the code in"
        " one code block."
    ),
)

# Name with arguments, what it does, how it must be written, the grader, a body.
Job = tuple[str, str, str, PythonGrader, str]


def _job(head: str, does: str, how: str, body: str, **rules: tuple[str, ...]) -> Job:
    name, _, arguments = head.rstrip(")").partition("(")
    grader = PythonGrader(name, tuple(part.strip() for part in arguments.split(",") if part), **rules)
    return head, does, how, grader, body


_JOBS: tuple[tuple[Job, ...], ...] = (
    (
        _job("is_even(n)", "returns whether n is even", "", "return n % 2 == 0", uses=("return",)),
        _job(
            "full_name(first, last)",
            "returns both names joined by a space",
            "",
            "return first + ' ' + last",
            uses=("return",),
        ),
        _job(
            "count_vowels(text)",
            "returns how many vowels the text has",
            "",
            "return sum(c in 'aeiou' for c in text)",
            uses=("return",),
        ),
        _job(
            "celsius_to_fahrenheit(celsius)",
            "converts a temperature",
            "",
            "return celsius * 9 / 5 + 32",
            uses=("return",),
        ),
        _job(
            "largest(values)",
            "returns the largest item of a list of numbers",
            "Do not call max().",
            "best = values[0]\nfor v in values:\n    if v > best:\n        best = v\nreturn best",
            uses=("return", "loop"),
        ),
    ),
    (
        _job(
            "squares(n)",
            "returns the list of the squares of 0 to n - 1",
            "Use a list comprehension.",
            "return [i * i for i in range(n)]",
            uses=("comprehension", "return"),
            mentions=("range",),
        ),
        _job(
            "factorial(n)",
            "returns n factorial",
            "Use recursion and no loop.",
            "return 1 if n < 2 else n * factorial(n - 1)",
            uses=("recursion", "return"),
            avoids=("loop",),
        ),
        _job(
            "safe_divide(a, b)",
            "returns a / b, or None when b is zero",
            "Catch the ZeroDivisionError.",
            "try:\n    return a / b\nexcept ZeroDivisionError:\n    return None",
            uses=("try", "return"),
            mentions=("ZeroDivisionError",),
        ),
        _job(
            "word_lengths(text)",
            "returns a dict from each word of the text to its length",
            "Use a dict comprehension.",
            "return {w: len(w) for w in text.split()}",
            uses=("comprehension",),
            mentions=("split", "len"),
        ),
        _job(
            "read_lines(path)",
            "returns the lines of a text file as a list",
            "Open the file in a with statement.",
            "with open(path) as f:\n    return f.readlines()",
            uses=("with", "return"),
            mentions=("open",),
        ),
    ),
    (
        _job(
            "flatten(items)",
            "yields the items of arbitrarily nested lists, one after another",
            "Make it a recursive generator with type hints and a docstring.",
            '"""Flat."""\nfor item in items:\n    if isinstance(item, list):\n        yield from flatten(item)\n   '
            " else:\n        yield item",
            uses=("yield", "recursion", "annotations", "docstring"),
        ),
        _job(
            "binary_search(values, target)",
            "returns the index of target in a sorted list, or -1",
            "Loop, do not recurse, do not import anything, and add type hints.",
            "low, high = 0, len(values) - 1\nwhile low <= high:\n    mid = (low + high) // 2\n    if values[mid] =="
            " target:\n        return mid\n    if values[mid] < target:\n        low = mid + 1\n    else:\n        high"
            " = mid - 1\nreturn -1",
            uses=("loop", "annotations"),
            avoids=("recursion", "import"),
        ),
        _job(
            "parse_age(text)",
            "returns the age as an int and raises ValueError for anything below 0 or above 150",
            "With type hints and a docstring; do not use try.",
            '"""Age."""\nage = int(text)\nif not 0 <= age <= 150:\n    raise ValueError(text)\nreturn age',
            uses=("raise", "annotations", "docstring"),
            avoids=("try",),
            mentions=("ValueError", "int"),
        ),
        _job(
            "group_by(items, key)",
            "returns a dict from key(item) to the list of such items",
            "No imports, no comprehension, with type hints.",
            "groups = {}\nfor item in items:\n    groups.setdefault(key(item), []).append(item)\nreturn groups",
            uses=("loop", "annotations", "return"),
            avoids=("import", "comprehension"),
        ),
    ),
)


def _draw(rng: Random, level: int) -> Draft:
    head, does, how, grader, body = rng.choice(_JOBS[level - 1])
    text = rng.choice(_FRAMES).format(head=head, does=does, how=how).strip()
    return Draft(text, grader, _code(head, body, typed="annotations" in grader.uses), level, LONG)


def _code(head: str, body: str, *, typed: bool) -> str:
    name, _, arguments = head.rstrip(")").partition("(")
    declared = ", ".join(f"{part.strip()}: object" for part in arguments.split(",")) if typed else arguments
    indented = "\n".join("    " + line for line in body.splitlines())
    return f"```python\ndef {name}({declared}){' -> object' if typed else ''}:\n{indented}\n```"


SECTIONS = (Section("code_writing", 18, by_levels(_draw)),)
