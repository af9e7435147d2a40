"""Sums with one right number, from two-digit addition to four-digit products and nested brackets."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.graders import NumericGrader

_FRAMES = (
    "What is {sum}?",
    "Calculate {sum}. Reply with the number only.",
    "{sum} =",
    "Work out {sum} and give me just the result.",
    "hey quick one, whats {sum}",
    "Please compute the value of {sum}. Finish with a line that says 'Answer:' and the number.",
)


def _easy(rng: Random) -> tuple[str, int]:
    a, b = rng.randint(12, 89), rng.randint(12, 89)
    return rng.choice(
        [(f"{a} + {b}", a + b), (f"{a + b} - {a}", b), (f"{a % 9 + 3} × {b % 9 + 3}", (a % 9 + 3) * (b % 9 + 3))]
    )


def _middling(rng: Random) -> tuple[str, int]:
    a, b, c = rng.randint(112, 989), rng.randint(12, 98), rng.randint(3, 19)
    return rng.choice(
        [
            (f"{a} × {c}", a * c),
            (f"{a} + {b} × {c}", a + b * c),
            (f"{b * c} ÷ {c}", b),
            (f"{a * 7} - {b * 31}", a * 7 - b * 31),
        ]
    )


def _hard(rng: Random) -> tuple[str, int]:
    a, b, c = rng.randint(1203, 9897), rng.randint(103, 989), rng.randint(13, 97)
    return rng.choice(
        [
            (f"{a} × {b}", a * b),
            (f"({a} - {b}) × {c} + {b}", (a - b) * c + b),
            (f"{b * c} ÷ {c} + {a} × {c}", b + a * c),
            (f"the remainder when {a * b} is divided by {c}", a * b % c),
        ]
    )


def _draw(rng: Random, level: int) -> Draft:
    text, value = (_easy, _middling, _hard)[level - 1](rng)
    return Draft(rng.choice(_FRAMES).format(sum=text), NumericGrader(value), str(value), level)


SECTIONS = (Section("arithmetic", 15, by_levels(_draw)),)
