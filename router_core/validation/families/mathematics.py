"""School and first-year mathematics, from percentages to calculus and probability. Answers are computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random
from statistics import median

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels, choice
from router_core.validation.families.tables import Question
from router_core.validation.graders import NumericGrader

_CLOSINGS = (
    "",
    " Reply with the number.",
    " Show your reasoning, then give the answer on the last line.",
    " Put the final answer in \\boxed{}.",
)

Problem = tuple[str, float]


def _linear(rng: Random) -> Problem:
    a, x, b = rng.randint(2, 9), rng.randint(2, 15), rng.randint(1, 30)
    return f"What is the value of x in {a}x + {b} = {a * x + b}?", x


def _percent(rng: Random) -> Problem:
    share, whole = rng.choice([5, 10, 20, 25, 40, 50, 75]), rng.randrange(40, 900, 20)
    return f"What is {share}% of {whole}?", share * whole / 100


def _area(rng: Random) -> Problem:
    a, b = rng.randint(4, 19), rng.randint(4, 19)
    return rng.choice(
        [
            (f"A rectangle has sides of {a} cm and {b} cm. What is its area in square centimetres?", a * b),
            (f"A rectangle is {a} m long and {b} m wide. Find its perimeter in metres.", 2 * (a + b)),
        ]
    )


def _quadratic(rng: Random) -> Problem:
    p, q = rng.sample(range(-9, 10), 2)
    return f"Find the larger root of x² {-(p + q):+d}x {p * q:+d} = 0.", max(p, q)


def _median(rng: Random) -> Problem:
    values = [rng.randint(10, 99) for _ in range(7)]
    return f"Find the median of these data: {', '.join(map(str, values))}.", median(values)


def _dice(rng: Random) -> Problem:
    wanted = rng.randint(3, 11)
    return f"Two fair dice are rolled. In how many of the 36 equally likely outcomes is the sum {wanted}?", 6 - abs(
        7 - wanted
    )


def _pythagoras(rng: Random) -> Problem:
    a, b, c = rng.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29)])
    k = rng.randint(1, 6)
    return f"A right triangle has legs of length {a * k} and {b * k}. How long is the hypotenuse?", c * k


def _modular(rng: Random) -> Problem:
    base, power, mod = rng.randint(3, 12), rng.randint(12, 60), rng.choice([7, 11, 13, 17])
    return f"What is the remainder when {base}^{power} is divided by {mod}?", pow(base, power, mod)


def _committee(rng: Random) -> Problem:
    men, women = rng.randint(5, 8), rng.randint(4, 7)
    return f"From {men} men and {women} women a committee of 2 men and 3 women is chosen. In how many ways?", math.comb(
        men, 2
    ) * math.comb(women, 3)


def _derivative(rng: Random) -> Problem:
    a, b, at = rng.randint(2, 7), rng.randint(2, 9), rng.randint(2, 5)
    return f"Let f(x) = {a}x³ - {b}x² + 7. What is f'({at})?", 3 * a * at**2 - 2 * b * at


def _integral(rng: Random) -> Problem:
    a, b, top = rng.randint(1, 5), rng.randint(1, 9), rng.randint(2, 5)
    return f"Evaluate the integral of {3 * a}x² + {2 * b}x from 0 to {top}.", a * top**3 + b * top**2


def _determinant(rng: Random) -> Problem:
    (a, b, c), (d, e, f), (g, h, i) = ([rng.randint(-4, 6) for _ in range(3)] for _ in range(3))
    value = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return f"Compute the determinant of the matrix [[{a}, {b}, {c}], [{d}, {e}, {f}], [{g}, {h}, {i}]].", value


def _subgroups(rng: Random) -> Problem:
    n = rng.choice([12, 18, 24, 30, 36, 48, 60])
    return f"How many subgroups does the cyclic group Z_{n} have?", sum(n % k == 0 for k in range(1, n + 1))


def _bayes(rng: Random) -> Problem:
    sick, hit, false = rng.choice([1, 2, 5]), rng.choice([90, 95, 99]), rng.choice([4, 5, 10])
    value = Fraction(sick * hit, sick * hit + (100 - sick) * false)
    text = (
        f"{sick}% of people have a disease. A test finds {hit}% of the sick and wrongly reports {false}% of the"
        " healthy. A person tests positive. What is the probability, in percent and to one decimal, that the person is"
        " sick?"
    )
    return text, round(float(value) * 100, 1)


_PROBLEMS: tuple[tuple[Callable[[Random], Problem], ...], ...] = (
    (_linear, _percent, _area),
    (_quadratic, _median, _dice, _pythagoras),
    (_modular, _committee, _derivative, _integral, _determinant, _subgroups, _bayes),
)


def _draw(rng: Random, level: int) -> Draft:
    text, value = rng.choice(_PROBLEMS[level - 1])(rng)
    if rng.random() < 0.3:
        return _as_choice(rng, text, value, level)
    return Draft(
        text + rng.choice(_CLOSINGS),
        NumericGrader(value, 0.051 if value % 1 else 0.0),
        f"\\boxed{{{value:g}}}",
        level,
        LONG,
    )


def _as_choice(rng: Random, text: str, value: float, level: int) -> Draft:
    """Offer near misses as the wrong options."""
    step = max(1, round(abs(value) / 7))
    wrong = rng.sample([value + step, value - step, value + 2 * step, value + 3 * step, value - 2 * step], 3)
    question = Question(level, text, f"{value:g}", tuple(f"{other:g}" for other in wrong))
    draft = choice(rng, question)
    return Draft(draft.text, draft.grader, draft.reference, level, LONG)


SECTIONS = (Section("mathematics", 21, by_levels(_draw)),)
