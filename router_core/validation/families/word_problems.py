"""Short stories with numbers, solved in one to five steps."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE
from router_core.validation.graders import NumericGrader

Story = tuple[str, float]

_CLOSINGS = (
    "",
    " Think step by step and end with 'Answer:' and the number.",
    " Show your working, then state the final number.",
    " Just the number, please.",
)


def _apples(rng: Random) -> Story:
    name, thing = rng.choice(PEOPLE), rng.choice(["apples", "marbles", "stickers", "postcards"])
    has, gets, gives = rng.randint(20, 60), rng.randint(5, 30), rng.randint(3, 18)
    return (
        f"{name} has {has} {thing}, gets {gets} more and gives away {gives}. How many {thing} are left?",
        has + gets - gives,
    )


def _tickets(rng: Random) -> Story:
    count, price = rng.randint(3, 9), rng.randint(6, 19)
    return f"Cinema tickets cost ${price} each. How many dollars do {count} tickets cost?", count * price


def _shelves(rng: Random) -> Story:
    rows, each = rng.randint(4, 9), rng.randint(6, 12)
    return f"A library shelf has {rows} boards with {each} books on each. How many books stand on it?", rows * each


def _bakery(rng: Random) -> Story:
    rolls, price, bread, cost = rng.randint(4, 12), rng.randint(2, 4), rng.randint(2, 5), rng.randint(5, 8)
    paid = rng.choice([100, 120, 150])
    story = (
        f"At the bakery {rng.choice(PEOPLE)} buys {rolls} rolls at ${price} each and {bread} loaves at ${cost} each,"
        f" and pays with ${paid}. How much change, in dollars, comes back?"
    )
    return story, paid - rolls * price - bread * cost


def _wages(rng: Random) -> Story:
    hours, wage, bonus = rng.randint(22, 38), rng.randint(14, 28), rng.randint(20, 90)
    story = (
        f"A waiter works {hours} hours at ${wage} an hour and earns ${bonus} in tips. What is the total pay in dollars?"
    )
    return story, hours * wage + bonus


def _journey(rng: Random) -> Story:
    first, second, t1, t2 = rng.randint(40, 70), rng.randint(75, 110), rng.randint(2, 4), rng.randint(2, 4)
    story = (
        f"A van drives {t1} hours at {first} km/h and then {t2} hours at {second} km/h. How many kilometres is the"
        " whole trip?"
    )
    return story, first * t1 + second * t2


def _discount(rng: Random) -> Story:
    price, off, tax = rng.randrange(200, 900, 40), rng.choice([10, 15, 20, 25, 30]), rng.choice([5, 10, 20])
    story = (
        f"A bicycle is listed at ${price}. The shop takes {off}% off and then adds {tax}% sales tax to the lower price."
        " What does the customer pay in dollars? Give the exact amount."
    )
    return story, round(price * (100 - off) * (100 + tax) / 10_000, 4)


def _tank(rng: Random) -> Story:
    fill, drain, hours = rng.randint(45, 90), rng.randint(10, 35), rng.randint(6, 15)
    story = (
        f"A pump fills a tank with {fill} litres an hour while a leak loses {drain} litres an hour. The tank was empty,"
        f" and after 3 hours the leak is closed. How many litres are in it after {hours} hours in total?"
    )
    return story, 3 * (fill - drain) + (hours - 3) * fill


def _ages(rng: Random) -> Story:
    child, factor, years = rng.randint(4, 11), rng.randint(3, 5), rng.randint(3, 9)
    older, younger = rng.sample(PEOPLE, 2)
    story = (
        f"{older} is {factor} times as old as {younger}. In {years} years the two ages will add up to "
        f"{child * (factor + 1) + 2 * years}. How old is {older} now?"
    )
    return story, child * factor


def _mixture(rng: Random) -> Story:
    adults, children, price, cheap = rng.randint(18, 70), rng.randint(18, 70), rng.randint(9, 15), rng.randint(4, 7)
    story = (
        f"A museum sold {adults + children} tickets in one day, ${price} for adults and ${cheap} for children, and took"
        f" in ${adults * price + children * cheap}. How many adult tickets were sold?"
    )
    return story, adults


_STORIES: tuple[tuple[Callable[[Random], Story], ...], ...] = (
    (_apples, _tickets, _shelves),
    (_bakery, _wages, _journey),
    (_discount, _tank, _ages, _mixture),
)


def _draw(rng: Random, level: int) -> Draft:
    story, value = rng.choice(_STORIES[level - 1])(rng)
    return Draft(story + rng.choice(_CLOSINGS), NumericGrader(value, 0.005), f"Answer: {value:g}", level, LONG)


SECTIONS = (Section("word_problems", 18, by_levels(_draw)),)
