"""Fill in arguments that are objects and lists within each other."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.documents import JsonObject
from router_core.validation.families.helpers import Draft, Section, by_levels, joined
from router_core.validation.families.names import COMPANIES, PEOPLE, SURNAMES, TOWNS
from router_core.validation.families.tool_helpers import (
    DATE,
    NUMBER,
    SWITCH,
    TEXT,
    WHOLE,
    call,
    calling,
    described,
    list_of,
    one_of,
    record,
    tool,
)
from router_core.validation.graders import ExpectedCall

_GOODS = ("pens", "folders", "chairs", "monitors", "cables", "lamps")

_ITEM = record(product=one_of(*_GOODS), quantity=WHOLE)
_ORDER = tool(
    "create_order",
    "Create an order. Items stand in the order in which they were asked for.",
    customer=record(first_name=TEXT, last_name=TEXT, address=record(town=TEXT, postcode=TEXT)),
    items=list_of(_ITEM),
    gift=SWITCH,
)
_ROUTE = tool(
    "plan_route",
    "Plan a route. Stops stand in the order in which they are visited, without start and destination.",
    start=TEXT,
    destination=TEXT,
    stops=list_of(TEXT),
    avoid=described(list_of(one_of("ferries", "motorways", "tolls")), "In alphabetical order"),
)
_CONDITION = record(
    field=one_of("country", "revenue", "employees", "founded"),
    operator=one_of("=", "<", ">", "<=", ">="),
    value=described({"type": ["string", "number"]}, "A number where the field holds numbers"),
)
_SEARCH = tool(
    "search_companies",
    "Search companies. A company is found if every condition holds of at least one group.",
    groups=list_of(record(conditions=described(list_of(_CONDITION), "In the order of the request"))),
    sort=record(by=one_of("revenue", "employees", "founded"), descending=SWITCH),
    limit=WHOLE,
)
_SHIFTS = tool(
    "save_shifts",
    "Save who works when. Days in order of time, people in the order of the request.",
    team=TEXT,
    days=list_of(record(date=DATE, shifts=list_of(record(person=TEXT, hours=NUMBER)))),
)

Task = tuple[str, JsonObject, ExpectedCall]


def _route(rng: Random) -> Task:
    start, end, *stops = rng.sample(TOWNS, rng.randint(4, 5))
    avoid = sorted(rng.sample(["ferries", "motorways", "tolls"], rng.randint(1, 2)))
    text = rng.choice(
        [
            "Plan my trip from {a} to {b} with stops in {s}, in that order. No {x}.",
            "I drive from {a} via {s} (in this order) to {b} and want to avoid {x}.",
            "Starting in {a}, ending in {b}, stopping in {s}: how do I get there without {x}?",
        ]
    ).format(a=start, b=end, s=joined(stops), x=joined(avoid))
    return text, _ROUTE, call("plan_route", start=start, destination=end, stops=stops, avoid=avoid)


def _order(rng: Random) -> Task:
    first, last, town = rng.choice(PEOPLE), rng.choice(SURNAMES), rng.choice(TOWNS)
    postcode, gift = f"0{rng.randint(1000, 9999)}", rng.random() < 0.5
    items = [{"product": each, "quantity": rng.randint(2, 30)} for each in rng.sample(_GOODS, rng.randint(2, 3))]
    told = joined([f"{item['quantity']} {item['product']}" for item in items])
    present = "It is a gift." if gift else "It is not a gift."
    text = rng.choice(
        [
            "{f} {l} from {p} {t} would like {i}. {g}",
            "New order: {i}. {g} Customer: {f} {l}, {p} {t}.",
            "Please order {i} for {f} {l}, who lives in {t}, postcode {p}. {g}",
        ]
    ).format(f=first, l=last, p=postcode, t=town, i=told, g=present)
    customer = {"first_name": first, "last_name": last, "address": {"town": town, "postcode": postcode}}
    return text, _ORDER, call("create_order", customer=customer, items=items, gift=gift)


def _shifts(rng: Random) -> Task:
    team, people, day = rng.choice(COMPANIES), rng.sample(PEOPLE, 3), rng.randint(2, 26)
    hours = [rng.choice([4, 5.5, 6, 7.5, 8]) for _ in range(4)]
    dates = [f"2031-10-{day + ahead:02}" for ahead in (0, 1)]
    text = (
        f"Team {team}, on October {day} and {day + 1}, 2031: {people[0]} works {hours[0]} hours on the first day and"
        f" {hours[1]} on the second, {people[1]} {hours[2]} hours on the first day only, {people[2]} {hours[3]} on the"
        " second only."
    )
    shifts = [
        [{"person": people[0], "hours": hours[0]}, {"person": people[1], "hours": hours[2]}],
        [{"person": people[0], "hours": hours[1]}, {"person": people[2], "hours": hours[3]}],
    ]
    days = [{"date": date, "shifts": each} for date, each in zip(dates, shifts, strict=True)]
    return text, _SHIFTS, call("save_shifts", team=team, days=days)


def _search(rng: Random) -> Task:
    one, other = rng.sample(["Norway", "Chile", "Kenya", "Japan"], 2)
    staff, year, count = rng.choice([50, 200, 1000]), rng.randint(1990, 2015), rng.choice([5, 10, 20])
    by, told = rng.choice([("revenue", "revenue"), ("employees", "number of employees")])
    text = (
        f"Find companies in {one} with more than {staff} employees, and also those in {other} that were founded in"
        f" {year} or later. Show me the {count} first by {told}, largest first."
    )
    groups = [
        {"conditions": [_condition("country", "=", one), _condition("employees", ">", staff)]},
        {"conditions": [_condition("country", "=", other), _condition("founded", ">=", year)]},
    ]
    return text, _SEARCH, call("search_companies", groups=groups, sort={"by": by, "descending": True}, limit=count)


def _condition(field: str, operator: str, value: object) -> JsonObject:
    return {"field": field, "operator": operator, "value": value}


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = ((_route,), (_order,), (_shifts, _search))


def _draw(rng: Random, level: int) -> Draft:
    text, offered, expected = rng.choice(_TASKS[level - 1])(rng)
    return calling(text, [offered], [expected], level)


SECTIONS = (Section("tool_nesting", 9, by_levels(_draw)),)
