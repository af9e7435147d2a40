"""Puzzles with letters and words, such as reversing, counting and ciphers, that have one right result."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import words
from router_core.validation.graders import ExactGrader, Grader, NumericGrader, SequenceGrader

_WORDS = words(
    "planet window silver garden basket copper bridge candle forest marble rocket violin walnut pepper thunder lantern"
    " harvest blanket compass dolphin electric furniture hurricane landscape telescope breakfast strawberry committee"
    " mountain notebook umbrella saxophone crocodile wilderness"
)

Task = tuple[str, Grader, str]


def _text(question: str, answer: str) -> Task:
    return question, ExactGrader((answer,)), answer


def _easy(rng: Random) -> Task:
    word, other = rng.sample([word for word in _WORDS if len(word) <= 7], 2)
    letter = rng.randint(2, 5)
    return rng.choice(
        [
            _text(f"What is the last letter of the word '{word}'?", word[-1]),
            (f"How many letters does the word '{word}' have?", NumericGrader(len(word)), str(len(word))),
            _text(
                f"Write '{word}' in capital letters, then a hyphen, then '{other}' in capitals.".replace(
                    "capital letters", "upper case"
                ),
                f"{word.upper()}-{other.upper()}",
            ),
            _text(f"Which letter stands at position {letter} in '{word}'? Reply with the letter.", word[letter - 1]),
        ]
    )


def _middling(rng: Random) -> Task:
    words = rng.sample(_WORDS, 5)
    word = words[0]
    repeated = rng.choice([w for w in _WORDS if max(w.count(c) for c in w) > 1])
    letter = max(sorted(set(repeated)), key=repeated.count)
    return rng.choice(
        [
            _text(f"Spell '{word}' backwards. Only the result.", word[::-1]),
            (
                f"How often does the letter '{letter}' occur in '{repeated}'?",
                NumericGrader(repeated.count(letter)),
                str(repeated.count(letter)),
            ),
            (
                f"Sort these words alphabetically: {', '.join(words)}.",
                SequenceGrader(tuple(sorted(words))),
                ", ".join(sorted(words)),
            ),
            _text(
                f"Take the first letter of each word and join them into one word: {' '.join(words)}",
                "".join(w[0] for w in words),
            ),
            _text(
                f"Remove every vowel (a, e, i, o, u) from '{word}{words[1]}' and reply with what is left.",
                _without_vowels(word + words[1]),
            ),
        ]
    )


def _hard(rng: Random) -> Task:
    words = rng.sample(_WORDS, 4)
    shift = rng.randint(1, 5)
    joined = " ".join(words)
    sentence = f"{joined} {rng.choice(_WORDS)}"
    letter = rng.choice("aeort")
    every_second = "".join((words[0] + words[1])[1::2])
    return rng.choice(
        [
            _text(
                f"Shift every letter of '{words[0]}' forward by {shift} in the alphabet (after z comes a). What is the"
                " result?",
                _shifted(words[0], shift),
            ),
            (
                f"How many times does the letter '{letter}' appear in this text: {sentence}?",
                NumericGrader(sentence.count(letter)),
                str(sentence.count(letter)),
            ),
            _text(f"Reverse the order of the words and reverse the letters of each word: {joined}", joined[::-1]),
            _text(
                f"Join '{words[0]}' and '{words[1]}' and write only every second letter, starting with the second.",
                every_second,
            ),
            _text(
                f"Decode this: each letter was moved {shift} places forward in the alphabet."
                f" {_shifted(words[2], shift)}",
                words[2],
            ),
        ]
    )


def _without_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter not in "aeiou")


def _shifted(word: str, by: int) -> str:
    return "".join(chr((ord(letter) - ord("a") + by) % 26 + ord("a")) for letter in word)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference = (_easy, _middling, _hard)[level - 1](rng)
    return Draft(text, grader, reference, level, LONG if level == 3 else 256)


SECTIONS = (Section("strings", 18, by_levels(_draw)),)
