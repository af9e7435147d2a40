"""Words that a reply must and must not have, and how long it may be. Meaning is not judged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from router_core.errors import InvalidValidationSet
from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import folded, lines_of, plain, visible
from router_core.validation.graders.exact import bounded

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|etc|e\.g|i\.e|a\.m|p\.m|U\.S|[A-Z])\.", re.IGNORECASE)
# A run of marks is looked at from its beginning alone: from each of them, a long run takes quadratic time.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)*]*+(?=\s|$)|[。！？]++[”’」）]*+")


@dataclass(frozen=True)
class Terms:
    """`all` of these, at least one of `any`, `none` of those; as whole words, case and accents ignored."""

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
            return re.search(bounded(term), plain(text)) is not None
        return re.search(bounded(folded(term)), folded(plain(text))) is not None

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {name: list(getattr(self, name)) for name in ("all", "any", "none")}
        spec["case_sensitive"] = self.case_sensitive
        return {name: value for name, value in spec.items() if value}


TERM_FIELDS = ("all", "any", "none", "case_sensitive")


def read_terms(fields: Fields) -> Terms:
    return Terms(fields.texts("all"), fields.texts("any"), fields.texts("none"), fields.flag("case_sensitive"))


@dataclass(frozen=True)
class ContainsGrader:
    """Full marks when the terms are met; an empty reply never meets them."""

    terms: Terms
    type: ClassVar[str] = "contains"

    def grade(self, answer: str) -> float:
        text = visible(answer)
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
    """Full marks when a written text keeps every constraint: terms, and how many sentences, words and lines it has."""

    terms: Terms = Terms()
    sentences: tuple[int, int] | None = None
    words: tuple[int, int] | None = None
    lines: tuple[int, int] | None = None
    starts_with: str | None = None
    ends_with: str | None = None
    type: ClassVar[str] = "writing"

    def grade(self, answer: str) -> float:
        text = visible(answer)
        return float(bool(text) and self.terms.met_by(text) and self._right_size(text) and self._right_edges(text))

    def _right_size(self, text: str) -> bool:
        counts = (
            (self.sentences, count_sentences(text)),
            (self.words, count_words(text)),
            (self.lines, len(lines_of(text))),
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
    """Closing marks, with a last sentence that has none counted too."""
    flat = _ABBREVIATION.sub("x", " ".join(plain(text).split()))
    pieces = [piece for piece in _SENTENCE_END.split(flat) if re.search(r"\w", piece)]
    return len(pieces)


def count_words(text: str) -> int:
    """Words by white space; in scripts without spaces every character is one."""
    rest, unspaced = re.subn(r"[\u3040-\u30ff\u3400-\u9fff]", " ", text)
    return unspaced + sum(1 for word in rest.split() if re.search(r"\w", word))
