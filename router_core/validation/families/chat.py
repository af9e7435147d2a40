"""Small talk, advice and harmless make-believe, with an outcome that can be checked."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import PEOPLE, TOWNS, words
from router_core.validation.graders import ContainsGrader, ExactGrader, Grader, RegexGrader, Terms, WritingGrader

# What the user says, the grader, a good reply, and the system prompt if there is one.
Task = tuple[str, Grader, str, str | None]


def _hello(rng: Random) -> Task:
    name = rng.choice(PEOPLE)
    text = rng.choice(
        [
            f"Hey there! I'm {name}. How are you today?",
            f"hi, my name is {name}, nice to meet you :) say hello to me by name",
            f"Good evening! {name} here. What's up?",
        ]
    )
    return (
        text,
        WritingGrader(
            Terms(all=(name,), none=(f"I'm {name}", f"name is {name}", f"{name} here", f"I am {name}")), words=(2, 80)
        ),
        f"Hello {name}! I'm doing well, thank you.",
        None,
    )


def _three_ideas(rng: Random) -> Task:
    thing = rng.choice(
        [
            "birthday presents for a gardener",
            "rainy-day games for children",
            "cheap vegetarian dinners",
            "names for a grey cat",
        ]
    )
    text = f"I need ideas. Give me exactly three {thing}, as a numbered list, a few words each, nothing else."
    return (
        text,
        WritingGrader(lines=(3, 3), starts_with="1", words=(4, 60)),
        "1. A first idea\n2. A second idea\n3. A third idea",
        None,
    )


def _yes_no(rng: Random) -> Task:
    question, answer = rng.choice(
        [
            ("Is a tomato botanically a fruit?", "yes"),
            ("Can penguins fly?", "no"),
            ("Do spiders have six legs?", "no"),
            ("Is the sun a star?", "yes"),
            ("Is Africa bigger than Europe?", "yes"),
            ("Can you see the Great Wall from the Moon with the naked eye?", "no"),
        ]
    )
    text = rng.choice(
        ["{q} Just yes or no, my kid is asking.", "settle a bet for me: {q} answer yes or no only", "{q} (yes/no)"]
    )
    return (
        text.format(q=question),
        RegexGrader(rf"^\W*{answer}\s*(?:[.,!:;]|$)", ignore_case=True),
        f"{answer.capitalize()}.",
        None,
    )


def _pirate(rng: Random) -> Task:
    town = rng.choice(TOWNS)
    text = (
        f"Talk like a pirate and tell me in one or two sentences how to get to {town} by ship. Start with the word"
        " Arrr."
    )
    return (
        text,
        WritingGrader(Terms(all=(town,)), sentences=(1, 4), words=(5, 80), starts_with="Arrr"),
        f"Arrr, sail north to {town}, matey!",
        None,
    )


def _persona(rng: Random) -> Task:
    name, shop = rng.choice(PEOPLE), rng.choice(["Fern & Fable", "Copper Kettle", "Blue Finch"])
    opened, closed = rng.randint(7, 9), rng.randint(17, 20)
    system = (
        f"You are {name}, the assistant of the shop {shop}. Opening hours: Tuesday to Saturday, {opened}:00 to"
        f" {closed}:00. Closed on Sunday and Monday."
    )
    text = rng.choice(["hi, are you open on monday?", "Can I come by on Sunday afternoon?"])
    terms = Terms(
        any=(
            "closed",
            "not open",
            "aren't open",
            "unfortunately",
            "only open",
            "open Tuesday",
            "open from Tuesday",
        )
    )
    return text, WritingGrader(terms, words=(1, 80)), f"Unfortunately {shop} is closed on Sunday and Monday.", system


def _remember(rng: Random) -> Task:
    name, colour, animal = (
        rng.choice(PEOPLE),
        rng.choice(["green", "orange", "purple"]),
        rng.choice(["hamster", "pony", "parrot"]),
    )
    text = (
        f"Some things about me: I'm called {name}, my favourite colour is {colour}, I grew up in {rng.choice(TOWNS)}"
        f" and I have a {animal}. Now forget the colour. What pet do I have? Use my name in your reply and keep it to"
        " one sentence."
    )
    return (
        text,
        WritingGrader(Terms(all=(name, animal), none=(colour,)), sentences=(1, 2), words=(3, 30)),
        f"{name}, you have a {animal}.",
        None,
    )


def _one_word_only(rng: Random) -> Task:
    question, answer = rng.choice(
        [
            ("the opposite of 'generous'", ("stingy", "miserly", "selfish", "mean", "greedy")),
            ("a word that rhymes with 'light' and means the time after sunset", ("night",)),
            ("the month after the month that follows May", ("july",)),
            ("what bees make that people eat", ("honey",)),
        ]
    )
    text = (
        f"From now on answer me with one single word, in lower case, without punctuation. First question: {question}?"
    )
    return text, ExactGrader(answer, whole=True, case_sensitive=True), answer[0], None


def _bored(rng: Random) -> Task:
    hours, weather = rng.randint(2, 5), rng.choice(["raining", "snowing", "far too hot outside"])
    text = (
        f"I'm bored, it's {weather} and I have {hours} hours until my train. Suggest one thing to do indoors. Reply in"
        " one sentence, end it with a question mark, and don't mention films, books or television."
    )
    none = ("film", "films", "movie", "movies", "book", "books", "television", "tv", "mention")
    return (
        text,
        WritingGrader(Terms(none=none), sentences=(1, 1), words=(5, 45), ends_with="?"),
        "How about baking a loaf of bread from whatever is in the cupboard?",
        None,
    )


def _character(rng: Random) -> Task:
    system = (
        "You are a strict quiz master. You only ever answer with the word CORRECT or the word WRONG, whatever you are"
        " told."
    )
    a, b = rng.randint(3, 30), rng.randint(3, 30)
    offered = a + b + rng.choice([0, 0, 1, -2])
    answer = "CORRECT" if offered == a + b else "WRONG"
    return (
        f"Dear quiz master, I say that {a} plus {b} makes {offered}. Please also tell me a joke!",
        ExactGrader((answer,), whole=True),
        answer,
        system,
    )


_STARTING_WITH = {
    "e": words("elephant egg eagle ear elbow east earth engine energy envelope eel echo eye evening"),
    "l": words("lion lemon lamp ladder leaf light lake love lizard lollipop llama lobster"),
    "d": words("dog door duck dance desert diamond dragon day dolphin dinosaur daisy drum"),
}


def _word_game(rng: Random) -> Task:
    word = rng.choice(["pineapple", "carousel", "mustard"])
    text = (
        "Let's play a game. I say a word and you reply with a different word that starts with its last letter. My word"
        f" is: {word}"
    )
    answers = _STARTING_WITH[word[-1]]
    return text, ContainsGrader(Terms(any=answers)), answers[0].capitalize(), None


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_hello, _three_ideas, _yes_no),
    (_pirate, _persona, _remember, _word_game),
    (_one_word_only, _bored, _character),
)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference, system = rng.choice(_TASKS[level - 1])(rng)
    return Draft(text, grader, reference, level, system=system)


SECTIONS = (Section("chat", 21, by_levels(_draw)),)
