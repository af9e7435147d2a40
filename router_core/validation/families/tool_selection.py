"""Call the right tool out of several, some of which are alike."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.documents import JsonObject
from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import DATE, TEXT, WHOLE, call, calling, name_of, tool
from router_core.validation.graders import ExpectedCall

_ORDER = {"order_id": {**WHOLE, "description": "The number of the order"}}
_TOWN = {"town": TEXT}

_TOOLS = (
    tool("get_current_weather", "The weather in a town at this moment.", **_TOWN),
    tool("get_weather_forecast", "The weather in a town on a day to come.", **_TOWN, date=DATE),
    tool("get_weather_history", "The weather that was measured in a town on a day that is past.", **_TOWN, date=DATE),
    tool("get_order_status", "Tell where an order is now.", **_ORDER),
    tool("cancel_order", "Cancel an order that has not been sent yet.", **_ORDER),
    tool("return_order", "Start the return of an order that has been delivered.", **_ORDER),
    tool("print_invoice", "Make the invoice of an order as a PDF.", **_ORDER),
    tool("find_contact", "Look up the telephone number and address of a person.", name=TEXT),
    tool("delete_contact", "Remove a person from the address book for good.", name=TEXT),
    tool("list_birthdays", "List whose birthday is in a month.", month={**WHOLE, "description": "1 to 12"}),
    tool("translate_word", "Translate one word into another language.", word=TEXT, language=TEXT),
    tool("define_word", "Explain what a word means, in its own language.", word=TEXT),
    tool("find_rhymes", "List words that rhyme with a word.", word=TEXT),
)

Task = tuple[str, ExpectedCall]


def _status(rng: Random) -> Task:
    number = rng.randint(10_000, 99_999)
    asked = rng.choice(
        [
            f"Where is my order {number}?",
            f"Has {number} left your warehouse yet?",
            f"I'm waiting for order number {number}. How far is it?",
        ]
    )
    return asked, call("get_order_status", order_id=number)


def _contact(rng: Random) -> Task:
    name = rng.choice(PEOPLE)
    asked = rng.choice(
        [f"I need {name}'s phone number.", f"What is {name}'s address?", f"Which number do I dial to reach {name}?"]
    )
    return asked, call("find_contact", name=name)


def _meaning(rng: Random) -> Task:
    word = rng.choice(["gregarious", "ephemeral", "frugal", "candid", "opaque", "lucid"])
    asked = rng.choice([f'What does "{word}" mean?', f'My teacher called me "{word}". What is that?'])
    return asked, call("define_word", word=word)


def _now(rng: Random) -> Task:
    town = rng.choice(TOWNS)
    asked = rng.choice([f"Is it raining in {town} right now?", f"How warm is it in {town} at the moment?"])
    return asked, call("get_current_weather", town=town)


def _day(rng: Random) -> Task:
    town, day, past = rng.choice(TOWNS), f"2031-06-{rng.randint(2, 28):02}", rng.random() < 0.5
    if past:
        return (
            f"Today is 2031-07-04. How much did it rain in {town} on {day}?",
            call("get_weather_history", town=town, date=day),
        )
    return (
        f"It is 2031-05-30 today. Do I need an umbrella in {town} on {day}?",
        call("get_weather_forecast", town=town, date=day),
    )


def _back(rng: Random) -> Task:
    number, thing = rng.randint(10_000, 99_999), rng.choice(["boots", "lamp", "coat"])
    return (
        f"The {thing} of order {number} came yesterday and I do not like it at all. I want to send everything back.",
        call("return_order", order_id=number),
    )


def _not_sent(rng: Random) -> Task:
    number, thing = rng.randint(10_000, 99_999), rng.choice(["tent", "kettle", "desk"])
    return (
        f"You told me that order {number} is still in your warehouse. I found the {thing} cheaper elsewhere, so please"
        " do not send it.",
        call("cancel_order", order_id=number),
    )


def _paper(rng: Random) -> Task:
    number = rng.randint(10_000, 99_999)
    return (
        f"For my tax return I need something on paper that says what I paid for {number}. It need not be returned or"
        " cancelled.",
        call("print_invoice", order_id=number),
    )


def _foreign(rng: Random) -> Task:
    word, language = rng.choice(["harbour", "thunder", "pillow"]), rng.choice(["Italian", "Swedish", "Turkish"])
    return (
        f'I know what "{word}" means and I do not look for a rhyme: how do they say it in {language}?',
        call("translate_word", word=word, language=language),
    )


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_status, _contact, _meaning),
    (_now, _back, _not_sent),
    (_day, _paper, _foreign),
)

# How many tools are offered at each level.
_OFFERED = (3, 7, 13)


def _draw(rng: Random, level: int) -> Draft:
    text, expected = rng.choice(_TASKS[level - 1])(rng)
    return calling(text, _offered(rng, expected.name, _OFFERED[level - 1]), [expected], level)


def _offered(rng: Random, needed: str, count: int) -> list[JsonObject]:
    others = [each for each in _TOOLS if name_of(each) != needed]
    chosen = [each for each in _TOOLS if name_of(each) == needed] + rng.sample(others, count - 1)
    return rng.sample(chosen, count)


SECTIONS = (Section("tool_selection", 9, by_levels(_draw)),)
