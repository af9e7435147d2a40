from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import regex

from router_core.documents import Fields, JsonObject, short_repr
from router_core.errors import InvalidValidationSet
from router_core.validation.graders.answers import (
    answer_candidates,
    casefold,
    nonblank_lines,
    strip_markdown,
    strip_thinking,
    text_after_lead_in,
    trim,
)


@dataclass(frozen=True)
class ExactGrader:
    """Gives full marks if the reply, or the part of it that states the answer, is one of `answers`.

    With `whole`, the reply must be exactly that text and nothing else.
    """

    answers: tuple[str, ...]
    whole: bool = False
    case_sensitive: bool = False
    type: ClassVar[str] = "exact"

    def grade(self, answer: str) -> float:
        if self.whole:
            return float(_unwrap(strip_thinking(answer)) in {text.strip() for text in self.answers})
        wanted = {self._key(text) for text in self.answers}
        return float(any(self._key(part) in wanted for part in answer_candidates(answer)))

    def _key(self, text: str) -> str:
        bare = trim(text)
        return "\n".join(line.rstrip() for line in bare.split("\n")) if self.case_sensitive else casefold(bare)

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "answers": list(self.answers)}
        return spec | {name: True for name in ("whole", "case_sensitive") if getattr(self, name)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> ExactGrader:
        fields = Fields(spec, ("type", "answer", "answers", "whole", "case_sensitive"), "grader.")
        answers = fields.texts("answers") or (fields.text("answer"),)
        return cls(answers, fields.flag("whole"), fields.flag("case_sensitive"))


def _unwrap(text: str) -> str:
    """Return the block's content of a reply that is one fenced block."""
    match = re.fullmatch(r"```[^\n`]*\n([^`]*?)\n?```", text)
    return (match.group(1) if match else text).strip()


@dataclass(frozen=True)
class SequenceGrader:
    """Gives full marks if the reply names the items in this order, on one line or as the last thing it says."""

    items: tuple[str, ...]
    type: ClassVar[str] = "sequence"

    def grade(self, answer: str) -> float:
        text = strip_markdown(strip_thinking(answer))
        wanted = [casefold(item) for item in self.items]
        if (after := text_after_lead_in(text)) and self._mentions(after) == wanted:
            return 1.0
        mentions = self._mentions(text)
        on_one_line = any(self._mentions(line) == wanted for line in nonblank_lines(text)[-3:])
        return float(mentions == wanted or mentions[-len(wanted) :] == wanted or on_one_line)

    def _mentions(self, text: str) -> list[str]:
        longest_first = sorted((casefold(item) for item in self.items), key=len, reverse=True)
        pattern = "|".join(whole_word_pattern(item) for item in longest_first)
        return re.findall(pattern, casefold(text))

    def to_json(self) -> dict[str, object]:
        return {"type": self.type, "items": list(self.items)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> SequenceGrader:
        fields = Fields(spec, ("type", "items"), "grader.")
        items = fields.texts("items")
        if len(items) < 2:
            raise fields.error("items", "a list of two strings or more, in the right order")
        return cls(items)


def whole_word_pattern(term: str) -> str:
    """Return a pattern for the term as a whole word; in scripts without spaces it matches anywhere."""
    left = r"(?<!\w)" if _spaced(term[:1]) else ""
    right = r"(?!\w)" if _spaced(term[-1:]) else ""
    return left + re.escape(term) + right


def _spaced(letter: str) -> bool:
    return letter.isalnum() and letter < "\u2e80"


_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|etc|e\.g|i\.e|a\.m|p\.m|U\.S|[A-Z])\.", re.IGNORECASE)

# A run of marks is matched from its beginning only: matching from each mark takes quadratic time.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)*]*+(?=\s|$)|[。！？]++[”’」）]*+")


@dataclass(frozen=True)
class Terms:
    """Requires `all` of these, at least one of `any`, `none` of those, as whole words; case and accents are ignored."""

    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    case_sensitive: bool = False

    def met_by(self, text: str) -> bool:
        return (
            all(self._has(text, term) for term in self.all)
            and (not self.any or any(self._has(text, term) for term in self.any))
            and not any(self._has(text, term) for term in self.none)
        )

    def _has(self, text: str, term: str) -> bool:
        if self.case_sensitive:
            return re.search(whole_word_pattern(term), strip_markdown(text)) is not None
        return re.search(whole_word_pattern(casefold(term)), casefold(strip_markdown(text))) is not None

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {name: list(getattr(self, name)) for name in ("all", "any", "none")}
        spec["case_sensitive"] = self.case_sensitive
        return {name: value for name, value in spec.items() if value}


TERM_FIELDS = ("all", "any", "none", "case_sensitive")


def read_terms(fields: Fields) -> Terms:
    return Terms(fields.texts("all"), fields.texts("any"), fields.texts("none"), fields.flag("case_sensitive"))


@dataclass(frozen=True)
class ContainsGrader:
    """Gives full marks if the terms are met; an empty reply never meets them."""

    terms: Terms
    type: ClassVar[str] = "contains"

    def grade(self, answer: str) -> float:
        text = strip_thinking(answer)
        return float(bool(text) and self.terms.met_by(text))

    def to_json(self) -> dict[str, object]:
        return {"type": self.type, **self.terms.to_json()}

    @classmethod
    def from_json(cls, spec: JsonObject) -> ContainsGrader:
        terms = read_terms(Fields(spec, ("type", *TERM_FIELDS), "grader."))
        if not (terms.all or terms.any):
            raise InvalidValidationSet("field 'grader.all' is missing: add a list of words in 'all' or in 'any'")
        return cls(terms)


@dataclass(frozen=True)
class WritingGrader:
    """Gives full marks if a text keeps every constraint: terms, its ends, and its number of sentences, words, lines."""

    terms: Terms = Terms()
    sentences: tuple[int, int] | None = None
    words: tuple[int, int] | None = None
    lines: tuple[int, int] | None = None
    starts_with: str | None = None
    ends_with: str | None = None
    type: ClassVar[str] = "writing"

    def grade(self, answer: str) -> float:
        text = strip_thinking(answer)
        return float(bool(text) and self.terms.met_by(text) and self._right_size(text) and self._right_edges(text))

    def _right_size(self, text: str) -> bool:
        counts = (
            (self.sentences, count_sentences(text)),
            (self.words, count_words(text)),
            (self.lines, len(nonblank_lines(text))),
        )
        return all(span is None or span[0] <= count <= span[1] for span, count in counts)

    def _right_edges(self, text: str) -> bool:
        bare = text.strip("\"'“”*` \n")
        starts = self.starts_with is None or bare.startswith(self.starts_with)
        return starts and (self.ends_with is None or bare.endswith(self.ends_with))

    def to_json(self) -> dict[str, object]:
        spans = {name: list(span) for name in ("sentences", "words", "lines") if (span := getattr(self, name))}
        edges = {name: edge for name in ("starts_with", "ends_with") if (edge := getattr(self, name))}
        return {"type": self.type, **self.terms.to_json(), **spans, **edges}

    @classmethod
    def from_json(cls, spec: JsonObject) -> WritingGrader:
        own = ("sentences", "words", "lines", "starts_with", "ends_with")
        fields = Fields(spec, ("type", *TERM_FIELDS, *own), "grader.")
        if not any(fields.has(name) for name in ("all", "any", *own)):
            raise InvalidValidationSet(f"field 'grader' states no constraint: add one of all, any, {', '.join(own)}")
        spans = fields.span("sentences"), fields.span("words"), fields.span("lines")
        return cls(read_terms(fields), *spans, fields.optional_text("starts_with"), fields.optional_text("ends_with"))


def count_sentences(text: str) -> int:
    """Count sentences by their closing marks; a last one without a mark counts too."""
    flat = _ABBREVIATION.sub("x", " ".join(strip_markdown(text).split()))
    pieces = [piece for piece in _SENTENCE_END.split(flat) if re.search(r"\w", piece)]
    return len(pieces)


def count_words(text: str) -> int:
    """Count words by white space; in scripts without spaces every character is one."""
    rest, unspaced = re.subn(r"[\u3040-\u30ff\u3400-\u9fff]", " ", text)
    return unspaced + sum(1 for word in rest.split() if re.search(r"\w", word))


# CPU seconds that one search may take. The `regex` package stops itself, so that a catastrophic pattern cannot hang.
TIME_LIMIT_S = 0.1

MAX_PATTERN_CHARS = 2_000

_PROBES = ("a" * 3_000 + "!", "0" * 3_000 + "!", " " * 3_000 + "!", "a b " * 800 + "!", "word, " * 500 + "\n!")


@dataclass(frozen=True)
class RegexGrader:
    """Gives full marks if the pattern is found (`full`: matches the whole reply) within the time limit."""

    pattern: str
    full: bool = False
    ignore_case: bool = False
    type: ClassVar[str] = "regex"

    def grade(self, answer: str) -> float:
        text = strip_thinking(answer)
        return float(
            bool(text) and search_with_timeout(self.pattern, text, full=self.full, ignore_case=self.ignore_case)
        )

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "pattern": self.pattern}
        return spec | {name: True for name in ("full", "ignore_case") if getattr(self, name)}

    @classmethod
    def from_json(cls, spec: JsonObject) -> RegexGrader:
        fields = Fields(spec, ("type", "pattern", "full", "ignore_case"), "grader.")
        pattern = fields.text("pattern")
        check_pattern(pattern, "grader.pattern")
        return cls(pattern, fields.flag("full"), fields.flag("ignore_case"))


def search_with_timeout(pattern: str, text: str, *, full: bool = False, ignore_case: bool = False) -> bool:
    """Return whether the pattern matches. A search that runs out of time has found nothing."""
    compiled = _compiled(pattern, ignore_case=ignore_case)
    search = compiled.fullmatch if full else compiled.search
    try:
        return search(text, timeout=TIME_LIMIT_S) is not None
    except TimeoutError:
        return False


def check_pattern(pattern: str, field: str) -> None:
    """Raise InvalidValidationSet if the pattern does not compile, or runs out of time on a few plain texts."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise InvalidValidationSet(f"field {field!r} is longer than {MAX_PATTERN_CHARS} characters: shorten it")
    try:
        compiled = _compiled(pattern, ignore_case=False)
        for probe in _PROBES:
            compiled.search(probe, timeout=TIME_LIMIT_S)
    except regex.error as error:
        raise InvalidValidationSet(
            f"field {field!r} is not a regular expression: {error}; got {short_repr(pattern)}"
        ) from None
    except TimeoutError:
        raise InvalidValidationSet(
            f"field {field!r} takes too long to match (nested repetition?): simplify {short_repr(pattern)}"
        ) from None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, *, ignore_case: bool) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
