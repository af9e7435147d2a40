"""Lists of everyday words: which of them belong together, and sentences that use a few of them."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels, joined
from router_core.validation.families.names import words
from router_core.validation.graders import Terms, WritingGrader

_KINDS = {
    "animals": words("goldfish pony lizard goat pigeon hamster lobster beetle"),
    "things to wear": words("sweater mitten boots scarf apron sandals jacket sock"),
    "things to eat": words("pancake spaghetti carrot pineapple biscuit omelette dumpling yoghurt"),
    "pieces of furniture": words("armchair bookcase stool sofa wardrobe desk bench cradle"),
    "musical instruments": words("trumpet cello drum flute banjo harp accordion tuba"),
    "tools": words("hammer chisel pliers shovel saw screwdriver wrench rake"),
}
_FILLERS = words(
    "microphone bathtub towel cigarette balloon mirror blanket staircase playground brick rope kettle pillow candle"
    " broom"
)
_SENTENCE_WORDS = (
    "dog throw field",
    "brush tooth bathroom",
    "kick ball goal",
    "pan cook stove",
    "paddle river boat",
    "singer microphone stage",
    "roof climb ladder",
    "sharpen pencil desk",
    "carry chair room",
    "wash towel bathtub",
    "catch fish lake",
    "ride horse beach",
)


def _belonging(rng: Random, level: int) -> Draft:
    kind, members = rng.choice(list(_KINDS.items()))
    inside = rng.sample(members, level + 1)
    others = rng.sample(
        [*_FILLERS, *(word for name, words in _KINDS.items() if name != kind for word in words[:2])], 4 + 3 * level
    )
    words = rng.sample(inside + others, len(inside) + len(others))
    text = rng.choice(
        [
            f"{', '.join(words)}\n\nWhich of these words are {kind}? List only those.",
            f"From this list pick all {kind} and nothing else: {', '.join(words)}",
        ]
    )
    return Draft(text, WritingGrader(Terms(all=tuple(inside), none=tuple(others))), joined(inside), level)


def _sentence(rng: Random, level: int) -> Draft:
    words = rng.choice(_SENTENCE_WORDS).split() + rng.sample(_FILLERS, 2 * level - 1)
    words = list(dict.fromkeys(words))
    most = 14 + 5 * level
    text = rng.choice(
        [
            (
                f"{', '.join(words)}\n\nWrite one sentence of at most {most} words that uses every one of these words"
                " exactly as given. Only the sentence."
            ),
            (
                f"Make a single sentence out of these concepts, each word unchanged, at most {most} words, and give me"
                f" only that: {', '.join(words)}"
            ),
        ]
    )
    grader = WritingGrader(Terms(all=tuple(words), none=("sentence",)), sentences=(1, 1), words=(len(words), most + 2))
    return Draft(
        text, grader, f"They saw the {' near the '.join(words[:-3])}, {' and '.join(words[-3:])}.", level, LONG
    )


def _draw(rng: Random, level: int) -> Draft:
    return rng.choice((_belonging, _sentence))(rng, level)


SECTIONS = (Section("word_lists", 15, by_levels(_draw)),)
