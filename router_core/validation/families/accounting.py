"""Accounting: profit, equity, depreciation, stock, break-even, present value. Answers are computed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES
from router_core.validation.graders import NumericGrader

Problem = tuple[str, float]


def _profit(rng: Random) -> Problem:
    revenue, cost = rng.randrange(40_000, 90_000, 500), rng.randrange(10_000, 39_000, 500)
    return (
        (
            f"{rng.choice(COMPANIES)} Co. had revenue of ${revenue:,} and expenses of ${cost:,}. What was its profit in"
            " dollars?"
        ),
        revenue - cost,
    )


def _equity(rng: Random) -> Problem:
    assets, debts = rng.randrange(200_000, 900_000, 5_000), rng.randrange(50_000, 190_000, 5_000)
    return (
        (
            f"A company has total assets of ${assets:,} and total liabilities of ${debts:,}. How large is shareholders'"
            " equity, in dollars?"
        ),
        assets - debts,
    )


def _depreciation(rng: Random) -> Problem:
    years, yearly, scrap = rng.randint(4, 10), rng.randrange(1_000, 9_000, 250), rng.randrange(500, 4_000, 500)
    return (
        (
            f"A machine costs ${years * yearly + scrap:,}, lasts {years} years and then has a residual value of"
            f" ${scrap:,}. What is the straight-line depreciation for each year in dollars?"
        ),
        yearly,
    )


def _break_even(rng: Random) -> Problem:
    price, variable, units = rng.randint(40, 90), rng.randint(10, 35), rng.randint(100, 900)
    return (
        (
            f"{rng.choice(COMPANIES)} sells lamps for ${price} each. The variable cost is ${variable} each, fixed costs"
            f" are ${(price - variable) * units:,} a month. How many lamps must be sold each month to break even?"
        ),
        units,
    )


def _goods_sold(rng: Random) -> Problem:
    opening, bought, closing = (rng.randrange(10_000, 60_000, 500) for _ in range(3))
    return (
        (
            f"Opening inventory was ${opening:,}, purchases were ${bought + closing:,} and closing inventory was"
            f" ${closing:,}. What was the cost of goods sold, in dollars?"
        ),
        opening + bought,
    )


def _present_value(rng: Random) -> Problem:
    base, rate = rng.randrange(1_000, 9_000, 500), rng.choice([5, 10, 20])
    future = base * (100 + rate) ** 2 / 10_000
    return (
        (
            f"An investor will receive ${future:,.2f} in two years. The discount rate is {rate}% a year, compounded"
            " yearly. What is the present value in dollars?"
        ),
        base,
    )


_PROBLEMS: tuple[tuple[Callable[[Random], Problem], ...], ...] = (
    (_profit, _equity),
    (_depreciation, _goods_sold),
    (_break_even, _present_value),
)


def _draw(rng: Random, level: int) -> Draft:
    text, value = rng.choice(_PROBLEMS[level - 1])(rng)
    closing = rng.choice(["", " Reply with the amount only.", " Explain briefly, then state the result."])
    return Draft(
        text + closing, NumericGrader(value, 0.5), f"${value:,.0f}" if value > 1_000 else f"{value:g}", level, LONG
    )


SECTIONS = (Section("accounting", 12, by_levels(_draw), family="economics_and_business"),)
