"""Make several calls in one turn: one for each thing that was asked for, and no other."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels, joined
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import SWITCH, TEXT, TIME, WHOLE, call, calling, one_of, tool
from router_core.validation.graders import ExpectedCall

_SYSTEM = "Calls that do not depend on each other are made in one turn, all together."

_ROOMS = ("kitchen", "hall", "study", "cellar", "attic", "garage")

_TOOLS = (
    tool("get_share_price", "The price of one company's share.", company=TEXT),
    tool("get_population", "How many people live in a town.", town=TEXT),
    tool("switch_light", "Switch the light of one room.", room=one_of(*_ROOMS), on=SWITCH),
    tool("send_reminder", "Remind one person of something today.", person=TEXT, time=TIME),
    tool("set_volume", "Set the volume of the loudspeaker in one room.", room=one_of(*_ROOMS), percent=WHOLE),
)

Task = tuple[str, list[ExpectedCall]]


def _populations(rng: Random) -> Task:
    towns = rng.sample(TOWNS, 2)
    text = rng.choice(
        [
            "Which town is larger, {0} or {1}?",
            "How many people live in {0}, and how many in {1}?",
            "{0} or {1}: where do more people live?",
        ]
    )
    return text.format(*towns), [call("get_population", town=town) for town in towns]


def _prices(rng: Random) -> Task:
    firms = rng.sample(COMPANIES, rng.randint(2, 3))
    text = rng.choice(["Share prices of {f}, please.", "What do {f} cost at the exchange?"]).format(f=joined(firms))
    return text, [call("get_share_price", company=firm) for firm in firms]


def _lights(rng: Random) -> Task:
    rooms = rng.sample(_ROOMS, rng.randint(3, 4))
    *on, off = rooms
    text = rng.choice(
        [
            f"Light on in the {joined(on)}, and off in the {off}.",
            f"Switch off the {off}. Then I want light in the {joined(on)}.",
        ]
    )
    calls = [call("switch_light", room=room, on=True) for room in on]
    return text, [*calls, call("switch_light", room=off, on=False)]


def _reminders(rng: Random) -> Task:
    people, hour = rng.sample(PEOPLE, 3), rng.randint(1, 6)
    text = (
        f"Remind {people[0]} and {people[1]} at {hour} pm, and {people[2]} one hour later. {rng.choice(COMPANIES)} need"
        " not be told."
    )
    times = (hour + 12, hour + 12, hour + 13)
    calls = [call("send_reminder", person=each, time=f"{at}:00") for each, at in zip(people, times, strict=True)]
    return text, calls


def _all_but(rng: Random) -> Task:
    left_out, percent = rng.sample(_ROOMS, 2), rng.choice([15, 25, 40])
    text = (
        f"Music at {percent} percent in every room that has a loudspeaker, which are all that you know of but the"
        f" {left_out[0]} and the {left_out[1]}."
    )
    return text, [call("set_volume", room=room, percent=percent) for room in _ROOMS if room not in left_out]


def _mixed(rng: Random) -> Task:
    person, firm, town = rng.choice(PEOPLE), rng.choice(COMPANIES), rng.choice(TOWNS)
    room, hour = rng.choice(_ROOMS), rng.randint(8, 11)
    text = (
        f"Before I leave: what is a share of {firm} worth, and how many people live in {town}? Remind {person} at"
        f" {hour}:30 in the morning, and switch the light in the {room} off."
    )
    return text, [
        call("get_share_price", company=firm),
        call("get_population", town=town),
        call("send_reminder", person=person, time=f"{hour:02}:30"),
        call("switch_light", room=room, on=False),
    ]


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_populations, _prices),
    (_lights, _reminders),
    (_all_but, _mixed),
)


def _draw(rng: Random, level: int) -> Draft:
    text, calls = rng.choice(_TASKS[level - 1])(rng)
    return calling(text, rng.sample(_TOOLS, len(_TOOLS)), calls, level, system=_SYSTEM)


SECTIONS = (Section("tool_parallel", 9, by_levels(_draw)),)
