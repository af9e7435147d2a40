"""A short generated passage, and a question that the passage alone answers."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, SURNAMES, TOWNS
from router_core.validation.graders import Grader, NumericGrader, Terms, WritingGrader

_FRAMES = (
    "Read the passage and answer the question.\n\n{passage}\n\nQuestion: {question}",
    "{passage}\n\n{question}",
    'Passage:\n"""{passage}"""\n\nUsing only the passage: {question} Answer in a few words.',
    "{question}\n\nContext: {passage}\n\nIf the context did not say it you would have to say so, but it does.",
)


@dataclass(frozen=True)
class Asked:
    question: str
    grader: Grader
    reference: str


def _words(question: str, answer: str, others: tuple[str, ...]) -> Asked:
    """Require the answer's word; refuse the passage's other candidates, and a repetition of the passage."""
    return Asked(question, WritingGrader(Terms(all=(answer,), none=others), words=(1, 45)), answer)


def _number(question: str, value: float) -> Asked:
    return Asked(question, NumericGrader(value), f"{value:g}")


def _expedition(rng: Random, level: int) -> tuple[str, Asked]:
    a, b, c = rng.sample(SURNAMES, 3)
    days, camels, miles = rng.randint(11, 40), rng.randint(6, 24), rng.randint(120, 700)
    town, other = rng.sample(TOWNS, 2)
    passage = (
        f"In the spring the geologist {a} set out from {town} with {camels} camels and a cook named {b}. After {days}"
        f" days the party had covered {miles} miles. A storm killed {camels // 3} of the camels, and the guide, {c},"
        f" turned back to {other}. {a} went on with the cook and reached the salt lake a week later."
    )
    asked = (
        (
            _words("What was the cook's name?", b, (a, c)),
            _words("From which town did the party set out?", town, (other,)),
        ),
        (
            _words("Who turned back?", c, (a, b)),
            _number("How many camels were alive after the storm?", camels - camels // 3),
        ),
        (
            _number(
                "How many days after the start was the salt lake reached, if the party had been exactly that many days"
                " on the way when the guide left?",
                days + 7,
            ),
            _words("Besides the geologist, who reached the salt lake?", b, (c,)),
        ),
    )
    return passage, rng.choice(asked[level - 1])


def _company(rng: Random, level: int) -> tuple[str, Asked]:
    firm, rival = rng.sample(COMPANIES, 2)
    founder, chief = rng.sample(PEOPLE, 2)
    year, staff, opened = rng.randint(1950, 1995), rng.randint(40, 300), rng.randint(3, 9)
    passage = (
        f"{firm} was founded in {year} by {founder}, who sold clocks from a van. Ten years later it had {staff}"
        f" employees. {rival}, its only competitor, bought it when {founder} retired at the age of 60, and made {chief}"
        f" the chief executive. Within {opened} years of the purchase {chief} doubled the number of employees, closed"
        " the factory and moved the design office abroad."
    )
    asked = (
        (_words(f"Who founded {firm}?", founder, (chief,)), _number(f"In which year was {firm} founded?", year)),
        (
            _words(f"Which company bought {firm}?", rival, ()),
            _number(f"In which year did {firm} have {staff} employees?", year + 10),
        ),
        (
            _number(
                f"How many employees would {firm} have had after the doubling, starting from the {staff} named"
                " earlier?",
                staff * 2,
            ),
            _words("Who was in charge when the factory closed?", chief, (founder,)),
        ),
    )
    return passage, rng.choice(asked[level - 1])


def _trial(rng: Random, level: int) -> tuple[str, Asked]:
    drug, other = rng.sample(["Velorin", "Castimab", "Oxadrel", "Numexa", "Pirofen", "Tavidol"], 2)
    treated, helped, control = rng.randrange(80, 200, 10), rng.randint(30, 70), rng.randint(10, 25)
    passage = (
        f"The trial enrolled {treated} patients with chronic migraine. Half of them received {drug}, the rest a"
        f" placebo; a second drug, {other}, was dropped before the start because of liver toxicity. After twelve weeks"
        f" {helped} percent of the treated group and {control} percent of the placebo group had fewer attacks. The most"
        " common complaint with the drug was a dry mouth; sleep was not affected."
    )
    asked = (
        (
            _number("How many patients were enrolled?", treated),
            _words("What was the most common complaint?", "dry mouth", ()),
        ),
        (
            _words("Which drug was dropped before the trial began?", other, (drug,)),
            _words("What kind of toxicity led to dropping a drug?", "liver", ()),
        ),
        (
            _number(
                "By how many percentage points did the treated group do better than the placebo group?",
                helped - control,
            ),
            _number("How many patients received the placebo?", treated // 2),
        ),
    )
    return passage, rng.choice(asked[level - 1])


def _letter(rng: Random, level: int) -> tuple[str, Asked]:
    writer, sister, friend = rng.sample(PEOPLE, 3)
    town, rent, weeks = rng.choice(TOWNS), rng.randrange(400, 900, 50), rng.randint(3, 8)
    passage = (
        f"Dear {sister},\nthe flat in {town} is small but bright, and the rent is {rent} a month, of which {friend}"
        f" pays half. I started at the bakery {weeks} weeks ago; the hours are early but the pay is fair. The violin"
        f" stayed with mother. Come before the autumn fair, since {friend} leaves for the coast right after it and I"
        f" shall be alone.\nYour {writer}"
    )
    asked = (
        (_words("Where does the writer work?", "bakery", ()), _words("In which town is the flat?", town, ())),
        (
            _words("Who shares the rent with the writer?", friend, (sister,)),
            _words("What was left with the mother?", "violin", ()),
        ),
        (
            _number("How much of the monthly rent does the writer pay?", rent / 2),
            _words("After which event will the writer be alone?", "fair", ()),
        ),
    )
    return passage, rng.choice(asked[level - 1])


def _draw(rng: Random, level: int) -> Draft:
    passage, asked = rng.choice((_expedition, _company, _trial, _letter))(rng, level)
    text = rng.choice(_FRAMES).format(passage=passage, question=asked.question)
    return Draft(text, asked.grader, asked.reference, level)


SECTIONS = (Section("reading", 18, by_levels(_draw)),)
