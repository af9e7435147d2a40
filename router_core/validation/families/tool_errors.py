"""Go on after a tool's error: mend the call, take another tool, try again, or say that it cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import (
    TEXT,
    TIME,
    WHOLE,
    answering,
    call,
    called,
    calling,
    described,
    tool,
)
from router_core.validation.graders import ExactGrader

_SYSTEM = (
    "You finish what the user asks for by calling tools, without asking back. If the last error says that it cannot be"
    " done at all, reply with FAILED: and the code of that error, as in FAILED: E12, and nothing else."
)

_RESERVE = tool("reserve_room", "Reserve a meeting room.", room=TEXT, day=described(TEXT, "The day"), start=TIME)
_LIST = tool("list_orders", "List the latest orders of a company.", company=TEXT, limit=WHOLE)
_SEND = tool("send_file", "Send a file to a person.", file=TEXT, person=TEXT)
_SHARE = tool("share_link", "Share a file of any size as a link.", file=TEXT, person=TEXT)
_TRAINS = tool("find_trains", "Find trains between two stations.", origin=TEXT, destination=TEXT)


def _error(code: str, message: str, **more: object) -> dict[str, object]:
    return {"error": {"code": code, "message": message, **more}}


def _date(rng: Random) -> Draft:
    room, day, hour = rng.choice(TOWNS), rng.randint(2, 28), rng.randint(9, 16)
    tried = call("reserve_room", room=room, day=f"{day} May 2031", start=f"{hour:02}:00")
    turns = called((tried, _error("E31", "day must be written as YYYY-MM-DD")))
    text = rng.choice(
        [
            f"Reserve the room {room} for {day} May 2031, {hour} o'clock.",
            f"I need room {room} on {day} May 2031 at {hour}:00.",
        ]
    )
    mended = call("reserve_room", room=room, day=f"2031-05-{day:02}", start=f"{hour:02}:00")
    return calling(text, [_RESERVE], [mended], 1, system=_SYSTEM, turns=turns)


def _limit(rng: Random) -> Draft:
    firm, asked, most = rng.choice(COMPANIES), rng.choice([200, 500, 1000]), rng.choice([40, 50, 80])
    turns = called((call("list_orders", company=firm, limit=asked), _error("E08", f"limit must be {most} at most")))
    text = rng.choice(
        [
            f"Show the last {asked} orders of {firm}, or as many as can be had at once.",
            f"{firm}: the {asked} newest orders. If that is too many, as many as go into one list.",
        ]
    )
    mended = call("list_orders", company=firm, limit=most)
    return calling(text, [_LIST], [mended], 1, system=_SYSTEM, turns=turns)


def _station(rng: Random) -> Draft:
    origin, town = rng.sample(TOWNS, 2)
    known = [f"{town} Central", f"{town} Harbour", f"{town} Airport"]
    tried = call("find_trains", origin=f"{origin} Central", destination=town)
    turns = called((tried, _error("E17", "destination is not a station", stations=rng.sample(known, 3))))
    text = rng.choice(
        [
            f"Trains from {origin} Central to {town}, please. I have a boat to catch there.",
            f"How do I get from {origin} Central to {town} by train? I am to board a ship there.",
        ]
    )
    mended = call("find_trains", origin=f"{origin} Central", destination=f"{town} Harbour")
    return calling(text, [_TRAINS], [mended], 2, system=_SYSTEM, turns=turns)


def _other_tool(rng: Random) -> Draft:
    person, file = rng.choice(PEOPLE), f"{rng.choice(COMPANIES).lower()}-{rng.randint(2020, 2031)}.zip"
    tried = call("send_file", file=file, person=person)
    turns = called((tried, _error("E44", "file is larger than 25 MB and cannot be sent: share a link")))
    text = rng.choice([f"{person} needs {file}.", f"Let {person} have {file}, please.", f"Get {file} to {person}."])
    mended = call("share_link", file=file, person=person)
    return calling(text, rng.sample([_SEND, _SHARE, _LIST], 3), [mended], 2, system=_SYSTEM, turns=turns)


def _again(rng: Random) -> Draft:
    person, file = rng.choice(PEOPLE), f"{rng.choice(COMPANIES).lower()}-{rng.randint(2020, 2031)}.pdf"
    tried = call("send_file", file=file, person=person)
    turns = called((tried, _error("E50", "the mail server was restarted; nothing was sent, send it again", retry=True)))
    text = f"{rng.choice(['Mail', 'Send', 'Forward'])} {file} to {person}. A link would not do: the person is offline."
    return calling(text, rng.sample([_SEND, _SHARE], 2), [tried], 3, system=_SYSTEM, turns=turns)


def _partly(rng: Random) -> Draft:
    file, people = f"{rng.choice(COMPANIES).lower()}.pdf", rng.sample(PEOPLE, 3)
    wrong = rng.randrange(3)
    mended = f"{people[wrong]} {rng.choice(['Berg', 'Ito', 'Novak'])}"
    error = _error("E21", "several people have this name: state the surname as well", people=[mended])
    steps = [
        (call("send_file", file=file, person=person), error if place == wrong else {"sent": True})
        for place, person in enumerate(people)
    ]
    text = f"Everybody should get {file}: {people[0]}, {people[1]} and {people[2]}. Nobody should get it twice."
    expected = [call("send_file", file=file, person=mended)]
    return calling(text, rng.sample([_SEND, _LIST], 2), expected, 3, system=_SYSTEM, turns=called(*steps))


def _hopeless(rng: Random) -> Draft:
    room, day, code = rng.choice(TOWNS), rng.randint(2, 28), f"E{rng.randint(60, 99)}"
    why = rng.choice(["the room was pulled down in 2030", "your account may not reserve rooms, and never will"])
    tried = call("reserve_room", room=room, day=f"2031-05-{day:02}", start="10:00")
    turns = called((tried, _error(code, f"{why}; do not try again", retry=False)))
    text = rng.choice(
        [f"I want the room {room} at ten on 2031-05-{day:02}.", f"At ten on 2031-05-{day:02} I need the room {room}."]
    )
    reference = f"FAILED: {code}"
    grader = ExactGrader((reference, f"FAILED:{code}"), whole=True)
    return answering(text, [_RESERVE], grader, reference, 3, system=_SYSTEM, turns=turns)


_TASKS: tuple[tuple[Callable[[Random], Draft], ...], ...] = (
    (_date, _limit),
    (_station, _other_tool),
    (_again, _partly, _hopeless),
)


def _draw(rng: Random, level: int) -> Draft:
    return rng.choice(_TASKS[level - 1])(rng)


SECTIONS = (Section("tool_errors", 9, by_levels(_draw)),)
