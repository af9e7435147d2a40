"""The answer is one of a few texts, or names given items in a given order. Numbers and letters: elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import after_lead_in, candidates, folded, lines_of, plain, trimmed, visible


@dataclass(frozen=True)
class ExactGrader:
    """Full marks when the reply, or the part of it that states the answer, is one of `answers`.

    `whole`: the reply must be that text and nothing else, to the letter (format following).
    """

    answers: tuple[str, ...]
    whole: bool = False
    case_sensitive: bool = False
    type: ClassVar[str] = "exact"

    def grade(self, answer: str) -> float:
        if self.whole:
            return float(_unwrapped(visible(answer)) in {text.strip() for text in self.answers})
        wanted = {self._key(text) for text in self.answers}
        return float(any(self._key(part) in wanted for part in candidates(answer)))

    def _key(self, text: str) -> str:
        bare = trimmed(text)
        return "\n".join(line.rstrip() for line in bare.split("\n")) if self.case_sensitive else folded(bare)

    def to_json(self) -> dict[str, object]:
        found: dict[str, object] = {"type": self.type, "answers": list(self.answers)}
        return found | {name: True for name in ("whole", "case_sensitive") if getattr(self, name)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> ExactGrader:
        fields = Fields(spec, ("type", "answer", "answers", "whole", "case_sensitive"), "grader.")
        answers = fields.texts("answers") or (fields.text("answer"),)
        return cls(answers, fields.flag("whole"), fields.flag("case_sensitive"))


def _unwrapped(text: str) -> str:
    """A reply that is one fenced block stands for the block's content."""
    match = re.fullmatch(r"```[^\n`]*\n([^`]*?)\n?```", text)
    return (match.group(1) if match else text).strip()


@dataclass(frozen=True)
class SequenceGrader:
    """Full marks when the reply names the items in this order: on one line, or as the last thing it says."""

    items: tuple[str, ...]
    type: ClassVar[str] = "sequence"

    def grade(self, answer: str) -> float:
        text = plain(visible(answer))
        wanted = [folded(item) for item in self.items]
        if (after := after_lead_in(text)) and self._mentions(after) == wanted:
            return 1.0
        mentions = self._mentions(text)
        on_one_line = any(self._mentions(line) == wanted for line in lines_of(text)[-3:])
        return float(mentions == wanted or mentions[-len(wanted) :] == wanted or on_one_line)

    def _mentions(self, text: str) -> list[str]:
        longest_first = sorted((folded(item) for item in self.items), key=len, reverse=True)
        pattern = "|".join(bounded(item) for item in longest_first)
        return re.findall(pattern, folded(text))

    def to_json(self) -> dict[str, object]:
        return {"type": self.type, "items": list(self.items)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> SequenceGrader:
        fields = Fields(spec, ("type", "items"), "grader.")
        items = fields.texts("items")
        if len(items) < 2:
            raise fields.wrong("items", "a list of two strings or more, in the right order")
        return cls(items)


def bounded(term: str) -> str:
    """A pattern for the term as a whole word; scripts without spaces match anywhere."""
    left = r"(?<!\w)" if _spaced(term[:1]) else ""
    right = r"(?!\w)" if _spaced(term[-1:]) else ""
    return left + re.escape(term) + right


def _spaced(letter: str) -> bool:
    return letter.isalnum() and letter < "\u2e80"
