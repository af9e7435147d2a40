"""Write notes, mails, verses and rewritings. Only what can be counted or looked up is graded."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS, words
from router_core.validation.graders import Terms, WritingGrader

Task = tuple[str, WritingGrader, str]


def _note(rng: Random) -> Task:
    name, thing, day = (
        rng.choice(PEOPLE),
        rng.choice(["keys", "umbrella", "laptop", "recipe"]),
        rng.choice(["Monday", "Friday", "Sunday"]),
    )
    text = rng.choice(
        [
            f"Write a one-sentence note to {name} asking for the {thing} back by {day}. Only the sentence.",
            f"can u write a short text to {name}, i need my {thing} back by {day}, one sentence pls, just the text",
        ]
    )
    grader = WritingGrader(Terms(all=(name, thing, day), none=("write", "note to")), sentences=(1, 2), words=(6, 40))
    return text, grader, f"Hi {name}, could you please return my {thing} by {day}?"


def _slogan(rng: Random) -> Task:
    company, thing = rng.choice(COMPANIES), rng.choice(["coffee", "running shoes", "bicycles", "sunscreen"])
    text = (
        f"Give me one advertising slogan for {thing} by {company}. It must name {company} and have at most ten words."
        " Just the slogan."
    )
    return text, WritingGrader(Terms(all=(company,)), words=(3, 10)), f"{company}: {thing} made for you"


def _thanks(rng: Random) -> Task:
    name, event = rng.choice(PEOPLE), rng.choice(["dinner", "concert", "workshop", "weekend"])
    text = (
        f"Compose a thank-you message to {name} for the {event}. Two or three sentences, no subject line, mention the"
        f" {event}."
    )
    grader = WritingGrader(Terms(all=(name, event), none=("subject",)), sentences=(2, 5), words=(10, 90))
    return text, grader, f"Dear {name}, thank you for the lovely {event}. We enjoyed every minute of it."


def _email(rng: Random) -> Task:
    name, project, day = (
        rng.choice(PEOPLE),
        rng.choice(["audit", "launch", "migration", "survey"]),
        rng.choice(["Tuesday", "Thursday"]),
    )
    text = (
        f"Write the body of an email to {name} in exactly two sentences: say that the {project} is delayed until {day},"
        " and offer help. Do not use the word 'sorry'. No greeting line, no signature."
    )
    grader = WritingGrader(
        Terms(all=(project, day), none=("sorry", "exactly two sentences")), sentences=(2, 2), words=(10, 70)
    )
    return text, grader, f"The {project} is delayed until {day}. I am glad to help wherever I can."


def _politely(rng: Random) -> Task:
    name, rude, must = rng.choice(
        [
            (rng.choice(PEOPLE), "Shut up and send me the damn report now, {name}.", "report"),
            (rng.choice(PEOPLE), "{name}, your stupid invoice is wrong again, fix it, idiot.", "invoice"),
            (rng.choice(PEOPLE), "I don't care about your crappy meeting, {name}. Don't bother me.", "meeting"),
        ]
    )
    text = (
        f"Rewrite this so that it is polite and professional. Keep the name and the matter:\n\n{rude.format(name=name)}"
    )
    insults = ("damn", "shut up", "stupid", "idiot", "crappy", "don't care")
    grader = WritingGrader(Terms(all=(name, must), none=insults), words=(5, 120))
    return text, grader, f"Dear {name}, may I ask you to look at the {must} when you have a moment? Thank you."


def _product(rng: Random) -> Task:
    thing, feature, other = (
        rng.choice(["tent", "kettle", "headset"]),
        rng.choice(["waterproof", "lightweight"]),
        rng.choice(["recycled", "foldable"]),
    )
    text = (
        f"Write a product description of 30 to 60 words for a {thing}. Use the words '{feature}' and '{other}', and do"
        " not use 'best', 'perfect' or exclamation marks."
    )
    reference = (
        f"This {feature} {thing} is made from {other} material and goes wherever you go. It is quick to set up, easy to"
        " clean and small enough for any shelf, so that it is ready whenever you need it."
    )
    return text, WritingGrader(Terms(all=(feature, other), none=("best", "perfect", "!")), words=(28, 63)), reference


def _three_lines(rng: Random) -> Task:
    subject, season = rng.choice(["river", "moon", "sparrow", "harbour"]), rng.choice(["autumn", "winter", "spring"])
    text = (
        f"Write a poem in the manner of a haiku: three lines, no title, about {season}, with the word '{subject}' in"
        " it. Just the poem."
    )
    grader = WritingGrader(Terms(all=(subject,), none=("haiku", "manner")), lines=(3, 3), words=(7, 24))
    return text, grader, f"The {subject} is still\n{season} has come to the fields\nand no one is here"


def _story(rng: Random) -> Task:
    name, town, used = (
        rng.choice(PEOPLE),
        rng.choice(TOWNS),
        rng.sample(["lantern", "violin", "compass", "letter", "ferry", "clock"], 3),
    )
    text = (
        f"Tell a very short story of exactly four sentences set in {town}. The main character is {name}. Use the words "
        f"{', '.join(used)}. The last word of the story must be 'home'. Give only the story."
    )
    reference = (
        f"{name} found a {used[0]} in {town}. Beside it lay a {used[1]}. Nobody knew to whom the {used[2]} belonged."
        f" So {name} carried all of it home."
    )
    grader = WritingGrader(Terms(all=(name, town, *used), none=("exactly",)), sentences=(4, 4), ends_with="home.")
    return text, grader, reference


def _headlines(rng: Random) -> Task:
    town, thing = rng.choice(TOWNS), rng.choice(["bridge", "library", "swimming pool", "tram line"])
    text = (
        f"The town of {town} opens a new {thing}. Write five different headlines, one a line, numbered 1. to 5., each"
        f" with the word {town}, each at most nine words. No other text."
    )
    reference = "\n".join(f"{i}. {town} celebrates its new {thing}" for i in range(1, 6))
    return (
        text,
        WritingGrader(Terms(all=(town,), none=("write five",)), lines=(5, 5), words=(20, 55), starts_with="1."),
        reference,
    )


def _no_letter(rng: Random) -> Task:
    subject = rng.choice(["ocean", "desert", "market", "mountain"])
    count = rng.randint(12, 16)
    text = (
        f"Describe a walk near the {subject} in one sentence of exactly {count} words. Do not use the words 'the',"
        " 'and' or 'I'. Only the sentence."
    )
    filler = words(
        f"Long golden paths lead past {subject} views while soft wind moves over old stones under pale skies"
    )
    return (
        text,
        WritingGrader(Terms(all=(subject,), none=("the", "and", "i")), sentences=(1, 1), words=(count, count)),
        " ".join(filler[:count]) + ".",
    )


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_note, _slogan, _thanks),
    (_email, _politely, _product),
    (_three_lines, _story, _headlines, _no_letter),
)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference = rng.choice(_TASKS[level - 1])(rng)
    return Draft(text, grader, reference, level, LONG)


SECTIONS = (Section("writing", 21, by_levels(_draw)),)
