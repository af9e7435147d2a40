"""A user's regular expression, under a time limit. What a match means is the author's business."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import regex

from router_core.errors import InvalidValidationSet
from router_core.validation.fields import Fields, JsonObject, shown
from router_core.validation.graders.answers import visible

TIME_LIMIT_S = 0.1
"""CPU time that one search may take; the `regex` package stops itself, so a catastrophic pattern hangs nobody."""

MAX_PATTERN_CHARS = 2_000
_PROBES = ("a" * 3_000 + "!", "0" * 3_000 + "!", " " * 3_000 + "!", "a b " * 800 + "!", "word, " * 500 + "\n!")


@dataclass(frozen=True)
class RegexGrader:
    """Full marks when the pattern is found (`full`: matches the whole reply) within the time limit."""

    pattern: str
    full: bool = False
    ignore_case: bool = False
    type: ClassVar[str] = "regex"

    def grade(self, answer: str) -> float:
        text = visible(answer)
        return float(bool(text) and found(self.pattern, text, full=self.full, ignore_case=self.ignore_case))

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "pattern": self.pattern}
        return spec | {name: True for name in ("full", "ignore_case") if getattr(self, name)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> RegexGrader:
        fields = Fields(spec, ("type", "pattern", "full", "ignore_case"), "grader.")
        pattern = fields.text("pattern")
        check_pattern(pattern, "grader.pattern")
        return cls(pattern, fields.flag("full"), fields.flag("ignore_case"))


def found(pattern: str, text: str, *, full: bool = False, ignore_case: bool = False) -> bool:
    """Does it match? A search that runs out of time has found nothing."""
    compiled = _compiled(pattern, ignore_case=ignore_case)
    search = compiled.fullmatch if full else compiled.search
    try:
        return search(text, timeout=TIME_LIMIT_S) is not None
    except TimeoutError:
        return False


def check_pattern(pattern: str, field: str) -> None:
    """Refuse a pattern that does not compile, or that already runs out of time on a few plain texts."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise InvalidValidationSet(f"field {field!r} is longer than {MAX_PATTERN_CHARS} characters: shorten it")
    try:
        compiled = _compiled(pattern, ignore_case=False)
        for probe in _PROBES:
            compiled.search(probe, timeout=TIME_LIMIT_S)
    except regex.error as error:
        raise InvalidValidationSet(
            f"field {field!r} is not a regular expression: {error}; got {shown(pattern)}"
        ) from None
    except TimeoutError:
        raise InvalidValidationSet(
            f"field {field!r} takes too long to match (nested repetition?): simplify {shown(pattern)}"
        ) from None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, *, ignore_case: bool) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
