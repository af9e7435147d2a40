from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from router_core.documents import Fields, JsonObject
from router_core.validation.graders.answers import (
    bold_spans,
    boxed_answers,
    casefold,
    nonblank_lines,
    strip_markdown,
    strip_thinking,
    text_after_lead_in,
    trim,
)
from router_core.validation.graders.text import whole_word_pattern

_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?"
    r"(?:\d{1,3}(?:[,.'\u00a0\u202f ]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?)"
    r"(?:[eE][-+]?\d{1,3}|\s?(?:x|×|\\times|\*)\s?10\^\{?-?\d{1,3}\}?)?"
    r"(?:\s?/\s?\d+)?\s?%?"
)

_WORDS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn",
    "zh": "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五",
}

_WORD_VALUES = {word: value for words in _WORDS.values() for value, word in enumerate(words.split())}


@dataclass(frozen=True)
class NumericGrader:
    """Gives full marks if the number that the reply ends up with is `answer`, within `tolerance` (absolute)."""

    answer: float
    tolerance: float = 0.0
    type: ClassVar[str] = "numeric"

    def grade(self, answer: str) -> float:
        stated = stated_number(strip_thinking(answer))
        return float(any(self._equals(value) for value in stated))

    def _equals(self, value: float) -> bool:
        slack = max(self.tolerance, 1e-9 * abs(self.answer), 1e-9)
        return math.isfinite(value) and abs(value - self.answer) <= slack

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "answer": self.answer}
        return spec | {"tolerance": self.tolerance} if self.tolerance else spec

    @classmethod
    def from_json(cls, spec: JsonObject) -> NumericGrader:
        fields = Fields(spec, ("type", "answer", "tolerance"), "grader.")
        tolerance = fields.number("tolerance", 0.0)
        if tolerance < 0:
            raise fields.error("tolerance", "a number of 0 or more")
        return cls(fields.number("answer"), tolerance)


def stated_number(text: str) -> tuple[float, ...]:
    """Return the readings of the number that the reply states ("1,234" may be 1234 or 1.234); empty without one."""
    for part in _most_decided_first(text):
        if token := _conclusion(part):
            return parse_numbers(token)
    return _word_value(text)


def _most_decided_first(text: str) -> list[str]:
    flat = strip_markdown(text)
    lines = nonblank_lines(flat)
    first_alone = lines[:1] if lines and _is_number_alone(lines[0]) else []
    parts = [boxed_answers(text), text_after_lead_in(flat), *first_alone, *reversed(bold_spans(text)), *reversed(lines)]
    return [strip_markdown(part) for part in parts if part is not None]


def _conclusion(part: str) -> str | None:
    """Find a line's number: after the last equals sign, else the first if the line opens with it, else the last."""
    tail = re.split(r"=|≈|\\approx", part)[-1]
    if found := _NUMBER.findall(tail):
        return str(found[0] if tail != part or _is_lead(part) else found[-1])
    found = _NUMBER.findall(part)
    return str(found[-1]) if found else None


def _is_lead(part: str) -> bool:
    """Return whether the line opens with its number, as "12 apples, since 3 × 4"."""
    return _NUMBER.match(part.lstrip(" $€£¥:")) is not None


def _is_number_alone(line: str) -> bool:
    bare = line.strip(" $€£¥.*:`")
    match = _NUMBER.match(bare)
    return match is not None and len(bare[match.end() :].split()) <= 1


def parse_numbers(token: str) -> tuple[float, ...]:
    """Return every value that the written number can mean."""
    bare = token.replace(" ", "").replace("\u00a0", "").replace("\u202f", "").replace("'", "")
    percent = bare.endswith("%")
    values = _quotient(bare.rstrip("%"))
    return (*values, *(value / 100 for value in values)) if percent else values


def _quotient(bare: str) -> tuple[float, ...]:
    above, slash, below = bare.partition("/")
    tops = _decimals(above)
    if not slash:
        return tops
    return tuple(top / low for top in tops for low in _decimals(below) if low)


def _decimals(bare: str) -> tuple[float, ...]:
    """Read 1,234.5 and 1.234,5, which have one meaning each, and 1,234, which has two."""
    bare = re.sub(r"(?:x|×|\\times|\*)10\^\{?(-?\d+)\}?$", r"e\1", bare)
    last = max(bare.rfind(","), bare.rfind("."))
    if last < 0:
        return (float(bare),)
    mark, other = bare[last], ",."[bare[last] == ","]
    as_decimal = bare.replace(other, "")
    as_groups = bare.replace(",", "").replace(".", "")
    decimal = () if as_decimal.count(mark) > 1 else (float(as_decimal.replace(",", ".")),)
    grouped = (float(as_groups),) if re.fullmatch(r"[-+]?\d{1,3}(?:[,.]\d{3})+", bare) and other not in bare else ()
    return (*grouped, *decimal)


def _word_value(text: str) -> tuple[float, ...]:
    """Read "Three." or "三" in a reply that is little more than that word."""
    words = re.findall(r"[^\W\d_]+", strip_markdown(text).casefold())
    values = {_WORD_VALUES[word] for word in words if word in _WORD_VALUES}
    return (float(values.pop()),) if len(values) == 1 and len(words) <= 8 else ()


LETTERS = "ABCDEFGHIJ"

# A letter followed by the words of another option.
UNDECIDED = "?"

_CHOSEN = re.compile(
    r"(?i:\b(?:option|choice|choose|pick|select|go with|opción|opcion|opção)|选项?|選択肢)[^\S\n]*+"
    r"(?:is|est|es|é|是)?+[^\S\n]*+[:：]?+[^\S\n]*+"
    r"\(?+([A-J])\b\)?"
)


@dataclass(frozen=True)
class ChoiceGrader:
    """Gives full marks if the reply settles on `answer`, a letter. A reply with two letters settles on none."""

    answer: str
    options: tuple[str, ...]
    """The options' texts, in the order of their letters A, B, C…"""
    type: ClassVar[str] = "choice"

    def grade(self, answer: str) -> float:
        return float(self.chosen(answer) == self.answer)

    def chosen(self, reply: str) -> str | None:
        """Return the letter that the reply settles on."""
        text = strip_thinking(reply)
        for stated in self._statements(text):
            if letter := self._letter(stated) or (self._by_words(stated) if self._is_brief(stated) else None):
                return letter
        if len(self._opening_letters(text)) > 1:
            return None
        return self._opening_letter(text) or self._only_letter(text) or self._by_words_somewhere(strip_markdown(text))

    @cached_property
    def _words(self) -> tuple[re.Pattern[str], ...]:
        """Each option's words as a pattern over case-folded text."""
        return tuple(re.compile(whole_word_pattern(casefold(trim(option)))) for option in self.options)

    def _is_brief(self, stated: str) -> bool:
        """Return whether it is little more than an option, unlike a question repeated after "Answer:"."""
        return len(stated) <= 40 + max(len(option) for option in self.options)

    def _statements(self, text: str) -> Iterator[str]:
        """Yield the parts of a reply that state its choice, the most decided first."""
        if (content := boxed_answers(text)) is not None:
            yield strip_markdown(content)
        flat = strip_markdown(text)
        if (rest := text_after_lead_in(flat)) is not None:
            yield rest
        if picked := _CHOSEN.findall(flat):
            yield str(picked[-1]).upper()
        marked = {
            self._letter(strip_markdown(bold)) or self._by_words(strip_markdown(bold)) for bold in bold_spans(text)
        } - {None}
        if len(marked) == 1:
            yield str(marked.pop())

    def _letter(self, stated: str) -> str | None:
        """Read "B", "(b)", "B) Paris" or "option B." at the start of a statement."""
        bare = re.sub(r"^(?:option|choice|letter|opción|选项)\s+", "", trim(stated), flags=re.IGNORECASE)
        match = re.match(r"\(?([A-Ja-j])(?:\)|[.:、,](?=\s|$)|(?=\s*[-–—])|$|(?=\s+(?:because|since|as|is)\b))", bare)
        letter = self._known(match.group(1)) if match else None
        if letter is None or match is None:
            return None
        return letter if self._follows(bare[match.end() :]) in (None, letter) else UNDECIDED

    def _follows(self, rest: str) -> str | None:
        """Return the option whose words follow a letter: "A) pear" names two options if pear is B."""
        words_after = casefold(trim(rest))
        starts = [index for index, words in enumerate(self._words) if words.match(words_after)]
        return LETTERS[max(starts, key=lambda index: len(self.options[index]))] if starts else None

    def _opening_letter(self, text: str) -> str | None:
        """Return the letter that the first line opens with."""
        lines = nonblank_lines(strip_markdown(text))
        return self._letter(lines[0]) if lines else None

    def _opening_letters(self, text: str) -> set[str]:
        """Return the letters that lines open with: more than one is a list of options, not a choice."""
        return {letter for line in nonblank_lines(strip_markdown(text)) if (letter := self._letter(line))}

    def _only_letter(self, text: str) -> str | None:
        """Return the one option letter in brackets or alone, anywhere; "A" as an English word does not count."""
        named = {
            letter
            for letter in re.findall(r"\(([A-J])\)|\b([B-HJ])\b(?!')", strip_markdown(text))
            for letter in letter
            if letter
        }
        known = {letter for letter in named if self._known(letter)}
        return known.pop() if len(known) == 1 and len(named) == 1 else None

    def _by_words_somewhere(self, text: str) -> str | None:
        lines = nonblank_lines(text)
        parts = (lines[0], text, lines[-1]) if lines else ()
        return next((letter for part in parts if (letter := self._by_words(part))), None)

    def _by_words(self, text: str) -> str | None:
        """Return the one option whose words occur; an option within another counts only where it stands alone."""
        rest = casefold(text)
        found = []
        for index in sorted(range(len(self.options)), key=lambda i: -len(self.options[i])):
            words = self._words[index]
            if words.search(rest):
                found.append(LETTERS[index])
                rest = words.sub(" ", rest)
        return found[0] if len(found) == 1 else None

    def _known(self, letter: str) -> str | None:
        upper = letter.upper()
        return upper if upper in LETTERS[: len(self.options)] else None

    def to_json(self) -> dict[str, object]:
        return {"type": self.type, "answer": self.answer, "options": list(self.options)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> ChoiceGrader:
        fields = Fields(spec, ("type", "answer", "options"), "grader.")
        options = fields.texts("options")
        if not 2 <= len(options) <= len(LETTERS):
            raise fields.error("options", f"a list of 2 to {len(LETTERS)} option texts")
        letters = LETTERS[: len(options)]
        answer = fields.text("answer").upper()
        if answer not in tuple(letters):
            raise fields.error("answer", f"the letter of one of the options, {letters[0]} to {letters[-1]}")
        return cls(answer, options)
