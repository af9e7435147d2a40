"""Summarise a generated text in one sentence that must name what matters. Style is not graded."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, SURNAMES, TOWNS
from router_core.validation.graders import Terms, WritingGrader

_FRAMES = (
    "Summarise the following text in one sentence{must}.\n\n{text}",
    "{text}\n\nTL;DR in a single sentence{must}, please.",
    'Please condense this into one sentence of at most {most} words{must}:\n"{text}"',
)

# A text, the terms that a summary must have, and a summary.
Told = tuple[str, tuple[str, ...], str]


def _council(rng: Random) -> Told:
    town, mayor, sum_ = rng.choice(TOWNS), rng.choice(SURNAMES), rng.randint(2, 9)
    thing = rng.choice(["bridge", "library", "school"])
    text = (
        f"The council of {town} met on Tuesday night for more than four hours. After a long debate about parking,"
        f" flower beds and the date of the summer fair, it approved {sum_} million euros for a new {thing}. Mayor"
        f" {mayor} said that building would begin next spring. Two members abstained, and the coffee machine failed"
        " halfway through the evening."
    )
    return text, (town, thing), f"{town} approved {sum_} million euros for a new {thing}."


def _merger(rng: Random) -> Told:
    buyer, bought = rng.sample(COMPANIES, 2)
    chief, price = rng.choice(PEOPLE), rng.randrange(100, 900, 50)
    text = (
        f"{buyer} announced on Monday that it will buy its smaller rival {bought} for {price} million dollars in cash."
        f" The deal, which regulators still have to approve, would make {buyer} the largest maker of garden tools in"
        f" the region. Its chief executive, {chief}, promised that no factory would close before 2030. Analysts were"
        f" surprised by the price, and the shares of {buyer} lost three percent by noon. Union leaders asked for talks"
        " within the month."
    )
    return text, (buyer, bought), f"{buyer} will buy {bought} for {price} million dollars."


def _study(rng: Random) -> Told:
    food, effect = rng.choice([("walnuts", "cholesterol"), ("oats", "blood pressure"), ("beetroot", "blood pressure")])
    place, count = rng.choice(TOWNS), rng.randrange(200, 900, 20)
    text = (
        f"Researchers at the university of {place} followed {count} adults for two years. Half of them ate a handful of"
        f" {food} every day, the others kept to their usual diet. At the end the first group had lower {effect} on"
        " average, while weight and sleep did not differ. The authors warn that the participants knew which group they"
        " were in, that most of them were over fifty, and that the study was paid for by growers. A larger trial is to"
        " start next year in three countries, and its results are not expected before the end of the decade."
    )
    return text, (food, effect), f"A study in {place} links {food} to lower {effect}."


def _draw(rng: Random, level: int) -> Draft:
    text, terms, summary = (_council, _merger, _study)[level - 1](rng)
    most = 50 - 10 * level
    must = "" if level == 1 else f", naming {terms[0]} and {terms[1]}"
    must += "" if level < 3 else ", without any figure"
    digits = tuple(str(digit) for digit in range(10))
    none = digits if level == 3 else ()
    grader = WritingGrader(Terms(all=terms, none=none), sentences=(1, 1), words=(5, most))
    return Draft(rng.choice(_FRAMES).format(text=text, must=must, most=most), grader, summary, level)


SECTIONS = (Section("summaries", 12, by_levels(_draw)),)
