"""The answer is one of the listed options, by its letter or by its words. Open answers: elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import (
    after_lead_in,
    bolds,
    boxed,
    folded,
    lines_of,
    plain,
    trimmed,
    visible,
)
from router_core.validation.graders.exact import bounded

LETTERS = "ABCDEFGHIJ"
UNDECIDED = "?"
"""A letter with the words of another option."""
_CHOSEN = re.compile(
    r"(?i:\b(?:option|choice|choose|pick|select|go with|opción|opcion|opção)|选项?|選択肢)[^\S\n]*+"
    r"(?:is|est|es|é|是)?+[^\S\n]*+[:：]?+[^\S\n]*+"
    r"\(?+([A-J])\b\)?"
)


@dataclass(frozen=True)
class ChoiceGrader:
    """Full marks when the reply settles on `answer`, a letter; on two letters it settles on none."""

    answer: str
    options: tuple[str, ...]
    """The texts, in the order of their letters A, B, C…"""
    type: ClassVar[str] = "choice"

    def grade(self, answer: str) -> float:
        return float(self.chosen(answer) == self.answer)

    def chosen(self, reply: str) -> str | None:
        """The letter that the reply settles on."""
        text = visible(reply)
        for stated in self._statements(text):
            if letter := self._letter(stated) or (self._by_words(stated) if self._is_brief(stated) else None):
                return letter
        if len(self._opening_letters(text)) > 1:
            return None
        return self._opening_letter(text) or self._only_letter(text) or self._by_words_somewhere(plain(text))

    @cached_property
    def _words(self) -> tuple[re.Pattern[str], ...]:
        """Each option's words as a pattern over folded text."""
        return tuple(re.compile(bounded(folded(trimmed(option)))) for option in self.options)

    def _is_brief(self, stated: str) -> bool:
        """Little more than an option: a question repeated after "Answer:" is not."""
        return len(stated) <= 40 + max(len(option) for option in self.options)

    def _statements(self, text: str) -> Iterator[str]:
        """Where a reply says its choice, most decided first."""
        if (content := boxed(text)) is not None:
            yield plain(content)
        flat = plain(text)
        if (rest := after_lead_in(flat)) is not None:
            yield rest
        if picked := _CHOSEN.findall(flat):
            yield str(picked[-1]).upper()
        marked = {self._letter(plain(bold)) or self._by_words(plain(bold)) for bold in bolds(text)} - {None}
        if len(marked) == 1:
            yield str(marked.pop())

    def _letter(self, stated: str) -> str | None:
        """ "B", "(b)", "B) Paris", "option B." at the start of a statement."""
        bare = re.sub(r"^(?:option|choice|letter|opción|选项)\s+", "", trimmed(stated), flags=re.IGNORECASE)
        match = re.match(r"\(?([A-Ja-j])(?:\)|[.:、,](?=\s|$)|(?=\s*[-–—])|$|(?=\s+(?:because|since|as|is)\b))", bare)
        letter = self._known(match.group(1)) if match else None
        if letter is None or match is None:
            return None
        return letter if self._follows(bare[match.end() :]) in (None, letter) else UNDECIDED

    def _follows(self, rest: str) -> str | None:
        """The option whose words come right after a letter: "A) pear" names two options when pear is B."""
        said = folded(trimmed(rest))
        starts = [index for index, words in enumerate(self._words) if words.match(said)]
        return LETTERS[max(starts, key=lambda index: len(self.options[index]))] if starts else None

    def _opening_letter(self, text: str) -> str | None:
        """The first line opens with a letter."""
        lines = lines_of(plain(text))
        return self._letter(lines[0]) if lines else None

    def _opening_letters(self, text: str) -> set[str]:
        """The letters that lines open with: more than one is a list of options, not a choice."""
        return {letter for line in lines_of(plain(text)) if (letter := self._letter(line))}

    def _only_letter(self, text: str) -> str | None:
        """One option letter in brackets or alone, anywhere; "A" as an English word does not count."""
        named = {
            letter
            for letter in re.findall(r"\(([A-J])\)|\b([B-HJ])\b(?!')", plain(text))
            for letter in letter
            if letter
        }
        known = {letter for letter in named if self._known(letter)}
        return known.pop() if len(known) == 1 and len(named) == 1 else None

    def _by_words_somewhere(self, text: str) -> str | None:
        lines = lines_of(text)
        parts = (lines[0], text, lines[-1]) if lines else ()
        return next((letter for part in parts if (letter := self._by_words(part))), None)

    def _by_words(self, text: str) -> str | None:
        """The one option whose words occur; an option that is part of another counts only on its own."""
        rest = folded(text)
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
            raise fields.wrong("options", f"a list of 2 to {len(LETTERS)} option texts")
        letters = LETTERS[: len(options)]
        answer = fields.text("answer").upper()
        if answer not in tuple(letters):
            raise fields.wrong("answer", f"the letter of one of the options, {letters[0]} to {letters[-1]}")
        return cls(answer, options)
