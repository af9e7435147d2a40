"""Make the next call with what the calls before it returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE, SURNAMES, TOWNS
from router_core.validation.families.tool_helpers import DATE, NUMBER, TEXT, WHOLE, call, called, calling, one_of, tool
from router_core.validation.graders import ExpectedCall
from router_core.validation.validation_set import Message

_SYSTEM = "You finish what the user asks for by calling tools, without asking back."

_FIND = tool("find_customer", "Find customers by their name.", name=TEXT)
_ORDERS = tool("list_orders", "List a customer's orders.", customer_id=WHOLE)
_CANCEL = tool("cancel_order", "Cancel an order.", order_id=WHOLE)
_PAY_BACK = tool("pay_back", "Pay money back to a customer.", customer_id=WHOLE, euros=NUMBER)
_SLOTS = tool("list_free_slots", "List when a repair is possible in a town.", town=TEXT)
_BOOK = tool("book_slot", "Book a free time for a repair.", slot_id=TEXT)
_LEVEL = tool(
    "set_customer_level", "Set a customer's level.", customer_id=WHOLE, level=one_of("basic", "silver", "gold")
)
_MOVE = tool("set_delivery_date", "Set when an order is delivered.", order_id=WHOLE, date=DATE)

_TOOLS = (_FIND, _ORDERS, _CANCEL, _PAY_BACK, _SLOTS, _BOOK, _LEVEL, _MOVE)


def _offer(rng: Random, text: str, expected: list[ExpectedCall], level: int, turns: Sequence[Message]) -> Draft:
    return calling(text, rng.sample(_TOOLS, len(_TOOLS)), expected, level, system=_SYSTEM, turns=turns)


def _orders(rng: Random) -> Draft:
    name, number = f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}", rng.randint(1000, 9999)
    turns = called(
        (call("find_customer", name=name), [{"customer_id": number, "name": name, "town": rng.choice(TOWNS)}])
    )
    text = rng.choice(["What has {n} ordered so far?", "Show me all orders of {n}.", "{n}: which orders are there?"])
    return _offer(rng, text.format(n=name), [call("list_orders", customer_id=number)], 1, turns)


def _promote(rng: Random) -> Draft:
    name, number, level = (
        f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}",
        rng.randint(1000, 9999),
        rng.choice(["silver", "gold"]),
    )
    turns = called((call("find_customer", name=name), [{"customer_id": number, "name": name, "level": "basic"}]))
    text = rng.choice(["Make {n} a {k} customer.", "From today on {n} is {k}, please set that."])
    expected = [call("set_customer_level", customer_id=number, level=level)]
    return _offer(rng, text.format(n=name, k=level), expected, 1, turns)


def _namesakes(rng: Random) -> Draft:
    name, (town, *others) = f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}", rng.sample(TOWNS, 3)
    numbers = rng.sample(range(1000, 9999), 3)
    found = [{"customer_id": n, "name": name, "town": t} for n, t in zip(numbers, [town, *others], strict=True)]
    rng.shuffle(found)
    euros = rng.randint(20, 300)
    text = rng.choice(["Pay {e} euros back to {n} in {t}.", "{n} from {t} gets {e} euros back."])
    turns = called((call("find_customer", name=name), found))
    expected = [call("pay_back", customer_id=numbers[0], euros=euros)]
    return _offer(rng, text.format(n=name, t=town, e=euros), expected, 2, turns)


def _earliest(rng: Random) -> Draft:
    town, hours = rng.choice(TOWNS), sorted(rng.sample(range(8, 18), 4))
    slots = [
        {"slot_id": f"{rng.choice('KLMN')}{rng.randint(100, 999)}", "starts": f"2031-07-09 {h:02}:00"} for h in hours
    ]
    bound = hours[1]
    turns = called((call("list_free_slots", town=town), rng.sample(slots, 4)))
    text = f"A repair in {town}, as early as possible, but not before {bound}:00 on that day. Book it."
    return _offer(rng, text, [call("book_slot", slot_id=slots[1]["slot_id"])], 2, turns)


def _refund(rng: Random) -> Draft:
    name, number = f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}", rng.randint(1000, 9999)
    states = rng.sample(["delivered", "delivered", "lost", "lost", "open"], 5)
    prices = [rng.randint(30, 200) for _ in states]
    orders = [
        {"order_id": 400 + place, "euros": price, "state": state}
        for place, (price, state) in enumerate(zip(prices, states, strict=True))
    ]
    euros = sum(price for price, state in zip(prices, states, strict=True) if state == "lost")
    turns = (
        *called((call("find_customer", name=name), [{"customer_id": number, "name": name}])),
        *called((call("list_orders", customer_id=number), orders), first=2),
    )
    text = f"Pay {name} back, in one sum, what was paid for orders that were lost."
    return _offer(rng, text, [call("pay_back", customer_id=number, euros=euros)], 3, turns)


def _open_orders(rng: Random) -> Draft:
    name, number, day = f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}", rng.randint(1000, 9999), rng.randint(10, 28)
    states = rng.sample(["delivered", "open", "open", "cancelled"], 4)
    orders = [{"order_id": 500 + rng.randint(1, 9) + 10 * place, "state": each} for place, each in enumerate(states)]
    turns = (
        *called((call("find_customer", name=name), [{"customer_id": number, "name": name}])),
        *called((call("list_orders", customer_id=number), orders), first=2),
    )
    still_open = [order["order_id"] for order in orders if order["state"] == "open"]
    if rng.random() < 0.5:
        text = f"Cancel everything of {name} that is still open, all at once."
        return _offer(rng, text, [call("cancel_order", order_id=each) for each in still_open], 3, turns)
    text = f"Whatever {name} still waits for is to come on 2031-12-{day}. Set that for all at once."
    calls = [call("set_delivery_date", order_id=each, date=f"2031-12-{day}") for each in still_open]
    return _offer(rng, text, calls, 3, turns)


_TASKS: tuple[tuple[Callable[[Random], Draft], ...], ...] = (
    (_orders, _promote),
    (_namesakes, _earliest),
    (_refund, _open_orders),
)


def _draw(rng: Random, level: int) -> Draft:
    return rng.choice(_TASKS[level - 1])(rng)


SECTIONS = (Section("tool_steps", 9, by_levels(_draw)),)
