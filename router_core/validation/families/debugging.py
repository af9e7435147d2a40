"""Find a program's fault: which line, which exception, which repair. Nothing is run."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels, choices
from router_core.validation.graders import ContainsGrader, NumericGrader, Terms

_FRAMES = (
    "One line of this program has a bug. {aim} Which line number is it? Reply with the number.\n\n{code}",
    "{code}\n\n{aim} But it does not work. On which line is the mistake? Give only the line number.",
    (
        "I can't find the bug in my code. {aim}\n{code}\nTell me the number of the faulty line, finish with 'Answer:"
        " <number>'."
    ),
)

# What the code should do, its lines, and the number of the wrong one.
Faulty = tuple[str, str, int]

_FAULTY: tuple[tuple[Faulty, ...], ...] = (
    (
        ("It should print the numbers 1 to {n}.", "i = 1\nwhile i <= {n}:\n    print(i)\n    i = i - 1", 4),
        ("It should greet the user.", 'name = "Ada{n}"\ngreeting = "Hello, " + nmae\nprint(greeting)', 2),
        (
            "It should add up a list of {n} prices.",
            "total = 0\nfor price in prices:\n    total = price\nprint(total)",
            3,
        ),
    ),
    (
        (
            "It should return the average of the values.",
            (
                "def average(values):\n    total = 0\n    for value in values:\n        total += value\n    return"
                " total / {n}"
            ),
            5,
        ),
        (
            "It should return the even numbers below {n}.",
            (
                "def evens():\n    found = []\n    for i in range({n}):\n        if i % 2 == 1:\n           "
                " found.append(i)\n    return found"
            ),
            4,
        ),
        (
            "It should count the words longer than {n} letters.",
            (
                "def long_words(text):\n    count = 0\n    for word in text.split():\n        if len(text) > {n}:\n    "
                "        count += 1\n    return count"
            ),
            4,
        ),
        (
            "It should find the smallest value.",
            (
                "def smallest(values):\n    best = {n} * 0\n    for value in values:\n        if value < best:\n       "
                "     best = value\n    return best"
            ),
            2,
        ),
    ),
    (
        (
            "It should remove every item below {n} from the list.",
            (
                "def prune(items):\n    limit = {n}\n    for item in items:\n        if item < limit:\n           "
                " items.remove(item)\n    return items"
            ),
            3,
        ),
        (
            "It should return the index of target in a sorted list, or -1.",
            (
                "def find(values, target):\n    low, high = 0, len(values) - 1\n    while low <= high:\n        mid ="
                " (low + high) // 2\n        if values[mid] < target:\n            low = mid\n        elif values[mid]"
                " > target:\n            high = mid - 1\n        else:\n            return mid\n    return -1  # {n}"
            ),
            6,
        ),
        (
            "Each call should return a fresh list with the one item in it.",
            "LIMIT = {n}\n\ndef wrap(item, found=[]):\n    found.append(item)\n    return found[:LIMIT]",
            3,
        ),
        (
            "It should return n factorial for n >= 0.",
            (
                "def factorial(n):\n    if n == 1:\n        return 1\n    return n * factorial(n -"
                " 1)\n\nprint(factorial({n}), factorial(0))"
            ),
            2,
        ),
    ),
)


def _faulty_line(rng: Random, level: int) -> Draft:
    aim, code, wrong = rng.choice(_FAULTY[level - 1])
    n = rng.randint(5, 90)
    lines = code.replace("{n}", str(n)).splitlines()
    skipped = rng.randint(0, 2)
    header = [f"# part {part + 1} of the script" for part in range(skipped)]
    numbered = "\n".join(f"{number:2d}  {line}" for number, line in enumerate([*header, *lines], 1))
    text = rng.choice(_FRAMES).format(aim=aim.replace("{n}", str(n)), code=numbered)
    return Draft(text, NumericGrader(wrong + skipped), f"Line {wrong + skipped}", level, LONG)


_RAISED = (
    (1, 'int("{n} apples")', "ValueError"),
    (1, "[1, 2, 3][{n}]", "IndexError"),
    (1, "{n} / 0", "ZeroDivisionError"),
    (1, '{{"a": {n}}}["b"]', "KeyError"),
    (2, '"total: " + {n}', "TypeError"),
    (2, "None.append({n})", "AttributeError"),
    (2, "(1, {n})[0] = 5", "TypeError"),
    (2, "next(iter([]))  # attempt {n}", "StopIteration"),
    (3, "{{[{n}]: 'x'}}", "TypeError"),
    (3, "a, b = [1, 2, {n}]", "ValueError"),
    (3, "def f():\n    x += {n}\nx = 1\nf()", "UnboundLocalError"),
    (3, "b'\\xff{n}'.decode('utf-8')", "UnicodeDecodeError"),
)
_RAISED_FRAMES = (
    "Which exception does this Python code raise? Name its class.\n\n```python\n{code}\n```",
    "```\n{code}\n```\nPython stops with an error here. What is the name of the exception?",
)


def _exception(rng: Random, level: int) -> Draft:
    _, code, name = rng.choice([row for row in _RAISED if row[0] == level])
    text = rng.choice(_RAISED_FRAMES).format(code=code.format(n=rng.randint(11, 99)))
    others = tuple(sorted({row[2] for row in _RAISED} - {name}))
    return Draft(text, ContainsGrader(Terms(all=(name,), none=others)), f"`{name}`", level)


def _draw(rng: Random, level: int) -> Draft:
    return rng.choice((_faulty_line, _faulty_line, _exception))(rng, level)


SECTIONS = (
    Section("debugging", 15, by_levels(_draw)),
    Section("repairs", None, choices("repairs"), family="debugging"),
)
