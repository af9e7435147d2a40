"""The answer is a number, however it is written. Units are not checked: the prompt states them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import after_lead_in, bolds, boxed, lines_of, plain, visible

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
    """Full marks when the number that the reply ends up with is `answer`, within `tolerance` (absolute)."""

    answer: float
    tolerance: float = 0.0
    type: ClassVar[str] = "numeric"

    def grade(self, answer: str) -> float:
        stated = stated_number(visible(answer))
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
            raise fields.wrong("tolerance", "a number of 0 or more")
        return cls(fields.number("answer"), tolerance)


def stated_number(text: str) -> tuple[float, ...]:
    """The readings of the number that the reply states ("1,234" may be 1234 or 1.234); empty when there is none."""
    for part in _most_decided_first(text):
        if token := _conclusion(part):
            return readings(token)
    return _word_value(text)


def _most_decided_first(text: str) -> list[str]:
    flat = plain(text)
    lines = lines_of(flat)
    first_alone = lines[:1] if lines and _is_number_alone(lines[0]) else []
    parts = [boxed(text), after_lead_in(flat), *first_alone, *reversed(bolds(text)), *reversed(lines)]
    return [plain(part) for part in parts if part is not None]


def _conclusion(part: str) -> str | None:
    """Within one line: what follows the last equals sign, else the number; a lead-in states its number first."""
    tail = re.split(r"=|≈|\\approx", part)[-1]
    if found := _NUMBER.findall(tail):
        return str(found[0] if tail != part or _is_lead(part) else found[-1])
    found = _NUMBER.findall(part)
    return str(found[-1]) if found else None


def _is_lead(part: str) -> bool:
    """Does the line open with its number ("12 apples, since 3 × 4")?"""
    return _NUMBER.match(part.lstrip(" $€£¥:")) is not None


def _is_number_alone(line: str) -> bool:
    bare = line.strip(" $€£¥.*:`")
    match = _NUMBER.match(bare)
    return match is not None and len(bare[match.end() :].split()) <= 1


def readings(token: str) -> tuple[float, ...]:
    """Every value that the written number can mean."""
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
    """1,234.5 and 1.234,5 are one thing each; 1,234 alone may be a thousand or a decimal comma."""
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
    """ "Three." or "三": only when the reply is little more than that word."""
    words = re.findall(r"[^\W\d_]+", plain(text).casefold())
    values = {_WORD_VALUES[word] for word in words if word in _WORD_VALUES}
    return (float(values.pop()),) if len(values) == 1 and len(words) <= 8 else ()
