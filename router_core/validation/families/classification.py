"""Label a short text: its sentiment, its topic, what its writer wants, whether it is spam."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from router_core.validation.families.helpers import Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS
from router_core.validation.graders import ChoiceGrader

_FRAMES = (
    "Classify the text as one of: {labels}. Reply with the label only.\n\nText: {text}",
    "{text}\n\nWhich label fits best ({labels})? One word.",
    'Labels: {labels}\nInput: "{text}"\nLabel:',
    "Here is a message from our inbox.\n---\n{text}\n---\nIs it {either}? Give just the label.",
)

Labelled = tuple[str, str]

_SENTIMENT: tuple[tuple[Labelled, ...], ...] = (
    (
        ("I love this {thing}, it works perfectly and looks great.", "positive"),
        ("Terrible {thing}. It broke after one day and nobody answered my mails.", "negative"),
        ("Best {thing} I have ever owned, five stars!", "positive"),
        ("I hate it. The {thing} is a complete waste of money.", "negative"),
    ),
    (
        ("The parcel took three weeks, but the {thing} was worth every day of the wait.", "positive"),
        ("Nice colour, shame that the {thing} stopped working before I had finished reading the manual.", "negative"),
        ("The {thing} weighs 400 grams and comes in a brown box.", "neutral"),
        ("I expected little of the {thing} and now my whole family wants one.", "positive"),
    ),
    (
        ("Oh wonderful, another {thing} that needs charging twice a day. Just what I dreamed of.", "negative"),
        ("I cannot say that I regret buying the {thing}; not for a moment.", "positive"),
        ("If you enjoy queuing for refunds, you will adore this {thing}.", "negative"),
        ("Nothing about the {thing} was as bad as the reviews had made me fear. Quite the opposite.", "positive"),
    ),
)
_TOPICS: tuple[tuple[Labelled, ...], ...] = (
    (
        ("{town} won the cup final 3-1 after two late goals.", "sports"),
        ("The bank raised its interest rate and {company} shares fell by four percent.", "business"),
        ("Doctors report a new vaccine against the flu.", "health"),
        ("Parliament in {town} voted for the new election law.", "politics"),
    ),
    (
        ("{company} will let go of a tenth of its staff after a weak quarter.", "business"),
        ("Runners complained about the heat, and the favourite gave up at kilometre thirty.", "sports"),
        ("Patients in {town} wait longer for a bed than five years ago.", "health"),
        ("The minister of {town} resigned over the leaked letters.", "politics"),
    ),
    (
        ("The club's owner sold his stake to {company}, which will float it on the stock exchange.", "business"),
        ("Before the vote on hospital funding, the coalition fell apart over who would lead it.", "politics"),
        ("A torn ligament keeps the striker of {town} off the pitch for the derby.", "sports"),
        ("The firm's canteen was closed after forty workers fell ill with salmonella poisoning.", "health"),
    ),
)
_INTENTS: tuple[tuple[Labelled, ...], ...] = (
    (
        ("I want my money back for order {number}.", "refund"),
        ("Where is my parcel? The number is {number}.", "tracking"),
        ("Please close my account.", "cancellation"),
        ("I forgot my password and cannot log in.", "login"),
    ),
    (
        ("The jacket from order {number} does not fit and I would rather have the amount credited again.", "refund"),
        ("It said two days, it has been nine. Has order {number} even left {town}?", "tracking"),
        ("From next month on we will manage without your service.", "cancellation"),
        ("The code you text me never arrives, so I am stuck at the second step.", "login"),
    ),
    (
        ("I was charged twice for {number} and one of the two should not be on my card.", "refund"),
        ("The app says delivered, my doormat disagrees.", "tracking"),
        ("My contract renews on Friday. See to it that it does not.", "cancellation"),
        ("Since I changed phones the app no longer believes that I am me.", "login"),
    ),
)
_SPAM: tuple[tuple[Labelled, ...], ...] = (
    (
        ("CONGRATULATIONS!!! You won ${number}. Click here to claim NOW", "spam"),
        ("Hi {person}, lunch at noon tomorrow?", "ham"),
    ),
    (
        ("Dear customer, your {company} account is locked. Confirm your card number on the page below.", "spam"),
        ("Reminder from {company}: your appointment with {person} is on Monday. No reply needed.", "ham"),
    ),
    (
        (
            (
                "Hello, it's {person} from accounts. I am in a meeting, could you buy three gift cards and send me the"
                " codes?"
            ),
            "spam",
        ),
        ("Your invoice {number} from {company} is attached, as discussed on the phone with {person}.", "ham"),
    ),
)
_TASKS = (
    (("positive", "negative", "neutral"), _SENTIMENT),
    (("sports", "business", "health", "politics"), _TOPICS),
    (("refund", "tracking", "cancellation", "login"), _INTENTS),
    (("spam", "ham"), _SPAM),
)


def _draw(rng: Random, level: int) -> Draft:
    labels, texts = rng.choice(_TASKS)
    template, label = rng.choice(texts[level - 1])
    text = template.format(
        thing=rng.choice(["kettle", "phone", "lamp", "vacuum cleaner", "camera", "backpack"]),
        town=rng.choice(TOWNS),
        company=rng.choice(COMPANIES),
        person=rng.choice(PEOPLE),
        number=rng.randint(10_000, 99_999),
    )
    shuffled = rng.sample(labels, len(labels))
    prompt = rng.choice(_FRAMES).format(text=text, labels=", ".join(shuffled), either=" or ".join(shuffled))
    return Draft(prompt, _grader(labels, label), f"**{label.capitalize()}**", level)


def _grader(labels: Sequence[str], label: str) -> ChoiceGrader:
    """Grade a label as an option that is named by its words."""
    return ChoiceGrader("ABCD"[labels.index(label)], tuple(labels))


SECTIONS = (Section("classification", 18, by_levels(_draw)),)
