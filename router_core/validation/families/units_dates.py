"""Convert units, and calculate with clocks and calendars. Dates come from the standard library's calendar."""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import MONTHS
from router_core.validation.graders import ExactGrader, Grader, NumericGrader

_EASY_UNITS = (
    ("kilometres", "metres", 1000), ("kilograms", "grams", 1000), ("hours", "minutes", 60),
    ("metres", "centimetres", 100), ("litres", "millilitres", 1000), ("weeks", "days", 7),
    ("minutes", "seconds", 60), ("feet", "inches", 12),
)  # fmt: skip
_MIDDLING_UNITS = (
    ("hours", "seconds", 3600), ("days", "minutes", 1440), ("square metres", "square centimetres", 10_000),
    ("gigabytes (1 GB = 1024 MB)", "megabytes", 1024), ("pounds (1 lb = 16 oz)", "ounces", 16), ("yards", "inches", 36),
)  # fmt: skip
_UNIT_FRAMES = (
    "Convert {a} {one} to {other}.",
    "How many {other} are there in {a} {one}?",
    "{a} {one} is how many {other}? Reply with the number only.",
    "I need {a} {one} expressed in {other}. Only the figure please.",
)


def _unit(rng: Random, level: int) -> Draft:
    if level == 3:
        return _rate(rng)
    one, other, factor = rng.choice(_EASY_UNITS if level == 1 else _MIDDLING_UNITS)
    amount = rng.randint(2, 30) if level == 1 else rng.randint(15, 95) / 2
    value = amount * factor
    text = rng.choice(_UNIT_FRAMES).format(a=f"{amount:g}", one=one, other=other)
    return Draft(text, NumericGrader(value), f"{value:,.10g}", level)


def _rate(rng: Random) -> Draft:
    speed, minutes, litres = rng.randrange(36, 144, 18), rng.randint(7, 55), rng.randint(5, 9)
    text, value = rng.choice(
        [
            (
                f"A train moves at {speed} km/h. How many metres does it cover in {minutes} seconds?",
                speed / 3.6 * minutes,
            ),
            (
                f"A car uses {litres} litres per 100 km. How many millilitres does it use on {minutes * 4} km?",
                litres * minutes * 40,
            ),
            (
                (
                    f"A tap drips {minutes} drops a minute and 20 drops make 1 millilitre. How many litres drip away in"
                    f" {litres} days?"
                ),
                minutes / 20 * 1440 * litres / 1000,
            ),
            (
                f"A room is {litres} m by {speed / 10:g} m. Tiles are 20 cm by 20 cm. How many tiles cover the floor?",
                litres * speed / 10 * 25,
            ),
        ]
    )
    return Draft(f"{text} Round to two decimals if needed.", NumericGrader(round(value, 3), 0.011), f"{value:.2f}", 3)


def _spoken(day: date) -> str:
    return f"{MONTHS[day.month - 1]} {day.day}, {day.year}"


def _date_answer(day: date) -> Grader:
    """Accept a day in ISO, American or British order."""
    month, ordinal = MONTHS[day.month - 1], f"{day.day}{_suffix(day.day)}"
    named = [
        f"{_spoken(day)}",
        f"{day.day} {month} {day.year}",
        f"{month} {ordinal}, {day.year}",
        f"{ordinal} {month} {day.year}",
    ]
    return ExactGrader((day.isoformat(), *named))


def _suffix(day: int) -> str:
    return "th" if 10 < day % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _date(rng: Random, level: int) -> Draft:
    start = date(rng.randint(2001, 2029), rng.randint(1, 12), rng.randint(1, 28))
    return (_clock, _later_day, _span_of_days)[level - 1](rng, start)


def _clock(rng: Random, start: date) -> Draft:
    hour, minute, later = rng.randint(6, 20), rng.randrange(0, 60, 5), rng.randrange(35, 170, 5)
    total = (hour * 60 + minute + later) % 1440
    clock = f"{total // 60:02d}:{total % 60:02d}"
    text = rng.choice(
        [
            (
                f"A meeting starts at {hour:02d}:{minute:02d} and lasts {later} minutes. When does it end? Reply as"
                " HH:MM, 24-hour."
            ),
            (
                f"It is {hour:02d}:{minute:02d}. What time will it be in {later} minutes? Answer in the form HH:MM"
                " (24-hour clock)."
            ),
            (
                f"My train left at {hour:02d}:{minute:02d} on {_spoken(start)} and took {later} minutes. Arrival time"
                " as HH:MM?"
            ),
        ]
    )
    return Draft(text, ExactGrader((clock, clock.lstrip("0"))), clock, 1)


def _later_day(rng: Random, start: date) -> Draft:
    days = rng.randint(9, 40)
    end = start + timedelta(days=days)
    if rng.random() < 0.5:
        text = f"What date is {days} days after {_spoken(start)}? Reply in the form YYYY-MM-DD."
    else:
        text = f"A library book borrowed on {_spoken(start)} is due {days} days later. Give the due date as YYYY-MM-DD."
    return Draft(text, _date_answer(end), end.isoformat(), 2)


def _span_of_days(rng: Random, start: date) -> Draft:
    end = start + timedelta(days=rng.randint(80, 640))
    weekday = end.strftime("%A")
    if rng.random() < 0.5:
        text = f"How many days are there from {_spoken(start)} to {_spoken(end)}, not counting the first day?"
        days = (end - start).days
        return Draft(text, NumericGrader(days), f"{days} days", 3)
    known = start.strftime("%A")
    text = (
        f"{_spoken(start)} was a {known}. Which day of the week was or will be {_spoken(end)}? Reply with the weekday."
    )
    return Draft(text, ExactGrader((weekday,)), f"{weekday}.", 3)


SECTIONS = (Section("units", 12, by_levels(_unit)), Section("dates", 12, by_levels(_date)))
