"""Call no tool: none is needed, none fits, or something is missing that only the user knows."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import DATE, TEXT, TIME, WHOLE, answering, one_of, tool
from router_core.validation.graders import ExactGrader, Grader, NumericGrader

_UNAVAILABLE = "UNAVAILABLE"

_SYSTEM = (
    "You work with the tools that you are given, and with nothing else. Never make up an argument. If no tool can do"
    f" what is asked, reply with the one word {_UNAVAILABLE}. If an argument that is required was not told, reply with"
    " MISSING: and the name of that argument, as in MISSING: colour, and nothing else."
)

_TOOLS = (
    tool("book_train", "Book a seat on a train.", origin=TEXT, destination=TEXT, date=DATE),
    tool("get_balance", "The balance of an account.", account=one_of("current", "savings")),
    tool("play_song", "Play a song.", title=TEXT, artist=TEXT),
    tool("add_event", "Add an event to the calendar.", title=TEXT, date=DATE, time=TIME),
    tool("order_pizza", "Order pizzas of one kind.", kind=one_of("margherita", "funghi", "diavola"), quantity=WHOLE),
)

Task = tuple[str, Grader, str, str | None]


def _sum(rng: Random) -> Task:
    a, b = rng.randint(12, 80), rng.randint(12, 80)
    text = rng.choice(
        [
            "What is {a} plus {b}? Just the number.",
            "Quick question, {a} + {b} makes?",
            "Add {a} and {b} for me, please.",
        ]
    )
    return text.format(a=a, b=b), NumericGrader(a + b), str(a + b), None


def _fact(rng: Random) -> Task:
    text, answer = rng.choice(
        [
            ("How many days has a leap year?", 366),
            ("A spider has how many legs?", 8),
            ("How many minutes are there in two hours?", 120),
            ("How many sides has a hexagon?", 6),
        ]
    )
    return f"{text} Reply with the number.", NumericGrader(answer), str(answer), None


def _impossible(rng: Random) -> Task:
    name, town = rng.choice(PEOPLE), rng.choice(TOWNS)
    text = rng.choice(
        [
            f"Book me a flight to {town} for Friday.",
            f"Send {name} a message that I will be late.",
            f"Cancel the train to {town} that you booked for me.",
            f"Move 50 euros from my savings to {name}.",
            f"What is the weather in {town}?",
            f"Call {name} for me.",
            f"Find me a hotel in {town}.",
        ]
    )
    return text, ExactGrader((_UNAVAILABLE,)), _UNAVAILABLE, _SYSTEM


def _missing(rng: Random) -> Task:
    town, other = rng.sample(TOWNS, 2)
    text, missing = rng.choice(
        [
            (f"I need a seat on the train from {town} to {other}.", "date"),
            (f"A train to {town} on 2031-08-{rng.randint(10, 28)}, please. I have forgotten where I am.", "origin"),
            (f"Pizza funghi for the party of {rng.choice(PEOPLE)}! I will say later how many.", "quantity"),
            (f"{rng.randint(2, 9)} pizzas. Whichever: no, wait, I will tell you which kind.", "kind"),
            (f"Put the dentist in {town} on 2031-09-{rng.randint(10, 28)} into my calendar.", "time"),
            (f"Dinner with {rng.choice(PEOPLE)} at 19:00 goes into my calendar. Which day? I will ask.", "date"),
        ]
    )
    answers = (f"MISSING: {missing}", f"MISSING:{missing}")
    return text, ExactGrader(answers, whole=True), answers[0], _SYSTEM


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = ((_sum, _fact), (_impossible,), (_missing,))


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference, system = rng.choice(_TASKS[level - 1])(rng)
    return answering(text, rng.sample(_TOOLS, len(_TOOLS)), grader, reference, level, system=system)


SECTIONS = (Section("tool_abstention", 9, by_levels(_draw)),)
