"""Write the facts of a sentence or a message as JSON. The grader's schema fixes the values."""

from __future__ import annotations

import json
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, MONTHS, PEOPLE, SURNAMES, TOWNS
from router_core.validation.graders import JsonSchemaGrader

_FRAMES = (
    "Extract the data as one JSON object with the keys {keys}.\n\nText: {text}",
    "{text}\n\nTurn this into JSON. Keys: {keys}. Reply with the JSON only.",
    'Return a JSON object with exactly these keys: {keys}.\nInput:\n"""\n{text}\n"""',
    "You are a data entry service. From the message below fill in {keys} and answer with JSON, no prose.\n\n{text}",
)

Facts = dict[str, object]


def _person(rng: Random) -> tuple[str, Facts, str]:
    name, town, age = f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}", rng.choice(TOWNS), rng.randint(19, 84)
    text = f"{name}, who is {age} years old, lives in {town}."
    return text, {"name": name, "age": age, "city": town}, "name (string), age (number), city (string)"


def _product(rng: Random) -> tuple[str, Facts, str]:
    thing, colour = (
        rng.choice(["kettle", "backpack", "desk lamp", "tent"]),
        rng.choice(["red", "green", "black", "blue"]),
    )
    price, stock = rng.randint(12, 240), rng.random() < 0.5
    text = f"The {colour} {thing} costs {price} euros and is {'in stock' if stock else 'sold out'} at the moment."
    facts: Facts = {"product": thing, "colour": colour, "price": price, "in_stock": stock}
    return text, facts, "product (string), colour (string), price (number), in_stock (boolean)"


def _order(rng: Random) -> tuple[str, Facts, str]:
    number, lines = (
        rng.randint(10_000, 99_999),
        rng.sample(["pens", "folders", "chairs", "monitors", "cables"], rng.randint(2, 3)),
    )
    counts = [rng.randint(2, 40) for _ in lines]
    told = " and ".join(f"{count} {line}" for count, line in zip(counts, lines, strict=True))
    text = (
        f"Hello, this is {rng.choice(COMPANIES)}. For order {number} please send {told}. We changed our mind about the"
        " desks."
    )
    items = [{"item": line, "quantity": count} for count, line in zip(counts, lines, strict=True)]
    return (
        text,
        {"order_number": number, "items": items},
        "order_number (number), items (list of {item, quantity}, in the order of the text)",
    )


def _meeting(rng: Random) -> tuple[str, Facts, str]:
    people = rng.sample(PEOPLE, rng.randint(2, 3))
    month, day, hour = rng.randrange(12), rng.randint(1, 28), rng.randint(1, 8)
    told = f"{', '.join(people[:-1])} and {people[-1]}"
    text = (
        f"Can we meet on {MONTHS[month]} {day}, 2025 at {hour} pm in {rng.choice(TOWNS)}? {told} will come; "
        f"{rng.choice(SURNAMES)} cannot."
    )
    facts: Facts = {"date": f"2025-{month + 1:02d}-{day:02d}", "time": f"{hour + 12}:00", "attendees": people}
    return (
        text,
        facts,
        "date (YYYY-MM-DD), time (HH:MM, 24-hour), attendees (list of first names, in the order of the text)",
    )


def _invoice(rng: Random) -> tuple[str, Facts, str]:
    seller, buyer = rng.sample(COMPANIES, 2)
    net, rate = rng.randrange(200, 3000, 50), rng.choice([10, 20])
    gross = net * (100 + rate) // 100
    text = (
        f"{seller} billed {buyer} for consulting: {net} euros before tax, to which {rate} percent VAT was added. "
        f"{buyer} has paid half of the gross sum and still owes the other half. No discount was given."
    )
    facts: Facts = {"seller": seller, "buyer": buyer, "gross": gross, "open_amount": gross / 2, "discount": None}
    return (
        text,
        facts,
        (
            "seller, buyer (strings), gross (number, with tax), open_amount (number, still owed), discount (number or"
            " null)"
        ),
    )


def _log(rng: Random) -> tuple[str, Facts, str]:
    levels = [rng.choice(["INFO", "WARN", "ERROR"]) for _ in range(6)] + ["ERROR"]
    hosts = [f"web-{rng.randint(1, 4)}" for _ in levels]
    lines = [
        f"2025-03-{day:02d} 0{day}:15 {level} {host} request took {rng.randint(20, 900)} ms"
        for day, (level, host) in enumerate(zip(levels, hosts, strict=True), 1)
    ]
    bad = [host for level, host in zip(levels, hosts, strict=True) if level == "ERROR"]
    facts: Facts = {"errors": len(bad), "last_error_host": bad[-1], "hosts": sorted(set(hosts))}
    return (
        "\n".join(lines),
        facts,
        "errors (number of ERROR lines), last_error_host (string), hosts (sorted list of all distinct hosts)",
    )


_SOURCES = ((_person, _product), (_order, _meeting), (_invoice, _log))


def _draw(rng: Random, level: int) -> Draft:
    text, facts, keys = rng.choice(_SOURCES[level - 1])(rng)
    prompt = rng.choice(_FRAMES).format(keys=keys, text=text)
    return Draft(prompt, JsonSchemaGrader(exactly(facts)), json.dumps(facts), level, LONG)


def exactly(facts: Facts) -> dict[str, object]:
    """Return the schema that accepts exactly these values."""
    properties: dict[str, object] = {key: {"const": value} for key, value in facts.items()}
    return {"type": "object", "properties": properties, "required": list(facts), "additionalProperties": False}


SECTIONS = (Section("json_extraction", 15, by_levels(_draw)),)
