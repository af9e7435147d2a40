"""Fill in the arguments of one tool: numbers, enums, dates, times, switches, and what may be left out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.documents import JsonObject
from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import MONTHS, PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import (
    DATE,
    NUMBER,
    SWITCH,
    TEXT,
    TIME,
    WHOLE,
    call,
    calling,
    described,
    one_of,
    tool,
)
from router_core.validation.graders import ExpectedCall

_ROOMS = ("kitchen", "bedroom", "bathroom", "office")

_HEATING = tool(
    "set_heating",
    "Set the heating of a room.",
    room=one_of(*_ROOMS),
    celsius=NUMBER,
    mode=one_of("comfort", "eco", "off_when_away"),
)
_ALARM = tool(
    "set_alarm", "Set an alarm.", ("repeats",), time=TIME, repeats=described(SWITCH, "Every day. False if left out.")
)
_PARCEL = tool(
    "book_parcel",
    "Book the transport of a parcel.",
    destination=TEXT,
    weight_grams=WHOLE,
    service=one_of("STANDARD", "EXPRESS", "SAME_DAY"),
    insured=SWITCH,
)
_TABLE = tool("book_table", "Book a table in the restaurant.", name=TEXT, guests=WHOLE, date=DATE, time=TIME)
_TRANSFER = tool(
    "transfer_money",
    "Transfer money to another account.",
    to_account=described(TEXT, "Letters and digits, without spaces"),
    amount=NUMBER,
    currency=one_of("EUR", "USD", "GBP", "CHF"),
    execution_date=DATE,
)
_TIMER = tool("start_timer", "Start a timer.", seconds=WHOLE, label=one_of("tea", "eggs", "bread", "other"))

Task = tuple[str, JsonObject, ExpectedCall]


def _heating(rng: Random) -> Task:
    room, celsius = rng.choice(_ROOMS), rng.choice([17.5, 19, 20.5, 21, 22])
    mode, told = rng.choice([("comfort", "comfort mode"), ("eco", "eco mode")])
    text = rng.choice(
        [
            "Please heat the {r} to {c} degrees, in {m}.",
            "{c} degrees in the {r}, {m}.",
            "Use {m} for the {r}, at {c} °C.",
        ]
    )
    return text.format(r=room, c=celsius, m=told), _HEATING, call("set_heating", room=room, celsius=celsius, mode=mode)


def _alarm(rng: Random) -> Task:
    hour, minute = rng.randint(5, 9), rng.choice([5, 20, 45])
    if rng.random() < 0.5:
        text = f"Wake me every day at {hour}:{minute:02} in the morning."
        return text, _ALARM, call("set_alarm", time=f"{hour:02}:{minute:02}", repeats=True)
    once = ExpectedCall("set_alarm", {"time": f"{hour + 12}:{minute:02}"}, optional={"repeats": [False]})
    return f"An alarm at {hour}:{minute:02} pm today, please.", _ALARM, once


def _timer(rng: Random) -> Task:
    minutes, label = rng.randint(2, 9), rng.choice(["tea", "eggs", "bread"])
    text = rng.choice([f"Timer for my {label}: {minutes} minutes.", f"Start {minutes} minutes for the {label}"])
    return text, _TIMER, call("start_timer", seconds=60 * minutes, label=label)


def _parcel(rng: Random) -> Task:
    town, tenths = rng.choice(TOWNS), rng.choice([12, 25, 34, 47])
    service, told = rng.choice(
        [("EXPRESS", "by express"), ("SAME_DAY", "so that it arrives today"), ("STANDARD", "the standard way")]
    )
    insured = rng.random() < 0.5
    text = (
        f"A parcel of {tenths / 10} kg has to go to {town}, {told}."
        f" {'Insure it, please.' if insured else 'No insurance.'}"
    )
    expected = call("book_parcel", destination=town, weight_grams=100 * tenths, service=service, insured=insured)
    return text, _PARCEL, expected


def _table(rng: Random) -> Task:
    name, month, day, hour = rng.choice(PEOPLE), rng.randrange(12), rng.randint(1, 28), rng.randint(6, 9)
    guests, word = rng.choice([(4, "four of us"), (5, "five of us"), (6, "six of us")])
    text = (
        f"Could we come on {MONTHS[month]} {day}, 2031 at half past {hour} in the evening? There will be {word}. The"
        f" name is {name}."
    )
    date = f"2031-{month + 1:02}-{day:02}"
    return text, _TABLE, call("book_table", name=name, guests=guests, date=date, time=f"{hour + 12}:30")


def _transfer(rng: Random) -> Task:
    bank, parts = rng.choice(["DE", "FR", "AT"]), [rng.randint(1000, 9999) for _ in range(3)]
    amount, (currency, told) = rng.randint(120, 900) + 0.5, rng.choice([("CHF", "Swiss francs"), ("GBP", "pounds")])
    day = rng.randint(2, 26)
    text = (
        f"Today is March {day}, 2031. Send {amount:.2f} {told} to the account {bank}{parts[0]} {parts[1]} {parts[2]},"
        " the day after tomorrow."
    )
    account = f"{bank}{''.join(map(str, parts))}"
    date = f"2031-03-{day + 2:02}"
    return (
        text,
        _TRANSFER,
        call("transfer_money", to_account=account, amount=amount, currency=currency, execution_date=date),
    )


def _odd_timer(rng: Random) -> Task:
    hours, minutes, rested = rng.choice([1, 2]), rng.choice([15, 30, 45]), rng.choice([5, 10, 12])
    text = (
        f"My dough has to rest for {hours} h and {minutes} min. Well, it has rested for {rested} minutes already, so"
        " count only what is left."
    )
    seconds = 3600 * hours + 60 * (minutes - rested)
    return text, _TIMER, ExpectedCall("start_timer", {"seconds": seconds, "label": "bread"}, {"label": ["other"]})


def _away(rng: Random) -> Task:
    room, low = rng.choice(_ROOMS), rng.choice([15, 16, 17])
    text = (
        f"The {room} is at {low} degrees now. Make it three and a half degrees warmer, and let it rest whenever"
        " nobody is at home."
    )
    return text, _HEATING, call("set_heating", room=room, celsius=low + 3.5, mode="off_when_away")


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_heating, _alarm, _timer),
    (_parcel, _table),
    (_transfer, _odd_timer, _away),
)


def _draw(rng: Random, level: int) -> Draft:
    text, offered, expected = rng.choice(_TASKS[level - 1])(rng)
    return calling(text, [offered], [expected], level)


SECTIONS = (Section("tool_arguments", 9, by_levels(_draw)),)
