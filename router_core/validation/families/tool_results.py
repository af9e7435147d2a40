"""Answer from what a tool returned, without calling it again."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS
from router_core.validation.families.tool_helpers import TEXT, WHOLE, answering, call, called, tool
from router_core.validation.graders import ContainsGrader, NumericGrader, Terms

_FLIGHT = tool("get_flight", "Look up a flight by its number.", number=TEXT)
_STOCK = tool("list_stock", "List what a warehouse has.", warehouse=TEXT)
_INVOICES = tool("list_invoices", "List a company's invoices, one page at a time.", company=TEXT, page=WHOLE)
_STAFF = tool("get_employee", "Look up an employee and the manager's name.", name=TEXT)

_GOODS = ("hammers", "ladders", "buckets", "brushes", "drills", "gloves")


def _flight(rng: Random) -> Draft:
    number, town, gate = f"UR{rng.randint(100, 999)}", rng.choice(TOWNS), rng.randint(11, 89)
    result = {"number": number, "to": town, "gate": gate, "seats": 180, "departs": "14:05", "delay_minutes": 0}
    turns = called((call("get_flight", number=number), result))
    text = rng.choice(
        [f"Which gate does {number} leave from?", f"My flight is {number}. What is the number of the gate?"]
    )
    return answering(text, [_FLIGHT], NumericGrader(gate), f"It leaves from gate {gate}.", 1, turns=turns)


def _stock(rng: Random) -> Draft:
    town, goods, amounts = rng.choice(TOWNS), rng.sample(_GOODS, 4), rng.sample(range(20, 400), 4)
    asked = rng.randrange(4)
    result = [{"article": each, "amount": amount} for each, amount in zip(goods, amounts, strict=True)]
    turns = called((call("list_stock", warehouse=town), result))
    text = rng.choice(
        [
            f"How many {goods[asked]} are there in {town}?",
            f"In the warehouse of {town}, how many {goods[asked]} are left?",
        ]
    )
    return answering(text, [_STOCK], NumericGrader(amounts[asked]), str(amounts[asked]), 1, turns=turns)


def _scarce(rng: Random) -> Draft:
    town, goods, amounts = rng.choice(TOWNS), rng.sample(_GOODS, 5), rng.sample(range(20, 400), 5)
    ordered = rng.randrange(5)
    result = [
        {"article": each, "amount": amount, "ordered": place == ordered}
        for place, (each, amount) in enumerate(zip(goods, amounts, strict=True))
    ]
    _, scarce = min(
        (amount, each) for place, (each, amount) in enumerate(zip(goods, amounts, strict=True)) if place != ordered
    )
    turns = called((call("list_stock", warehouse=town), result))
    text = f"Of what does {town} have least, leaving out what is ordered already? Name that article alone."
    grader = ContainsGrader(Terms(all=(scarce,), none=tuple(each for each in goods if each != scarce)))
    return answering(text, [_STOCK], grader, scarce, 2, turns=turns)


def _compared(rng: Random) -> Draft:
    towns, amounts, goods = rng.sample(TOWNS, 2), rng.sample(range(100, 900), 2), rng.choice(_GOODS)
    results = [[{"article": goods, "amount": amount}, {"article": "rope", "amount": 77}] for amount in amounts]
    steps = [(call("list_stock", warehouse=town), result) for town, result in zip(towns, results, strict=True)]
    text = f"How many {goods} do {towns[0]} and {towns[1]} have together? Give me the number."
    return answering(text, [_STOCK], NumericGrader(sum(amounts)), str(sum(amounts)), 2, turns=called(*steps))


def _owed(rng: Random) -> Draft:
    firm = rng.choice(COMPANIES)
    invoices = [
        {"number": 7000 + place, "euros": rng.randrange(50, 950, 10), "paid": rng.random() < 0.5, "cancelled": False}
        for place in range(6)
    ]
    for place, (paid, cancelled) in enumerate(((True, False), (False, True), (False, False), (False, False))):
        invoices[place] |= {"paid": paid, "cancelled": cancelled}
    rng.shuffle(invoices)
    owed = sum(int(each["euros"]) for each in invoices if not each["paid"] and not each["cancelled"])
    turns = (
        *called((call("list_invoices", company=firm, page=1), {"invoices": invoices[:3], "more": True})),
        *called((call("list_invoices", company=firm, page=2), {"invoices": invoices[3:], "more": False}), first=2),
    )
    text = f"How many euros does {firm} still owe us? Cancelled invoices do not count. End with the sum."
    return answering(text, [_INVOICES], NumericGrader(owed), f"{firm} owes {owed} euros in all: {owed}", 3, turns=turns)


def _boss(rng: Random) -> Draft:
    names = rng.sample(PEOPLE, 3)
    rooms = rng.sample(range(100, 400), 3)
    steps = [
        (call("get_employee", name=name), {"name": name, "manager": boss, "room": room})
        for name, boss, room in zip(names, [*names[1:], None], rooms, strict=True)
    ]
    turns = tuple(turn for place, step in enumerate(steps, 1) for turn in called(step, first=place))
    text = f"In which room does the manager of {names[0]}'s manager sit? Only the number of the room."
    return answering(text, [_STAFF], NumericGrader(rooms[2]), str(rooms[2]), 3, turns=turns)


_TASKS: tuple[tuple[Callable[[Random], Draft], ...], ...] = ((_flight, _stock), (_scarce, _compared), (_owed, _boss))


def _draw(rng: Random, level: int) -> Draft:
    return rng.choice(_TASKS[level - 1])(rng)


SECTIONS = (Section("tool_results", 9, by_levels(_draw)),)
