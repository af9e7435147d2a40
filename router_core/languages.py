"""Tell the language of a text by its script and, where many languages share one, by their commonest words."""

from __future__ import annotations

import re
from collections import Counter

# Scripts of one language, or of one that is far commoner than the others. Kana come before the characters of Chinese,
# which Japanese has too.
_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
)

_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to is are was what which how in that it for with this you do does from my an if i me can by",
        "es": "el los las que es una por para con cuál cómo cuánto cuántos qué y del se más tiene en está",
        "fr": "le les est une des que quel quelle combien et dans pour avec du vous qui sur au comment je font un puis",
        "de": "der die das ist und wie in welchem jahr ein eine was den welche mit von viel im nicht für ich wer auf",
        "pt": "o os as é uma que qual quanto quantos não e do da em para com foi mais você como no são",
        "it": "il gli è una che quanto quanti di e per con qual della chi ha in sono come non nel fa",
        "tr": "bir ve kaç nedir mi bu için ne ile hangi kim eder artı nasıl yalnızca daha çok ben",
        "pl": "ile jest co to w na z się nie jak kto który jakie i po do oraz tych jaki czy",
        "nl": "de het een en is van wat hoe dat voor niet met zijn op welke ik je hoeveel naar wie",
        "vi": "là của và có không một cho người những bao nhiêu gì được trong các tôi như",
    }.items()
}

_LATIN_WORD = re.compile(r"[^\W\d_]+")

# Characters that are read; the language of a prompt shows early.
_READ_CHARS = 2_000

# A script other than the Latin one counts if it has this share of the letters: names and quotations have less.
_MIN_SHARE = 0.2


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language; None if it has too few words, or code alone."""
    text = text[:_READ_CHARS]
    words = _LATIN_WORD.findall(text.lower())
    letters = sum(map(len, words))
    for language, script in _SCRIPTS:
        if letters and len(script.findall(text)) >= _MIN_SHARE * letters:
            return language
    counts = Counter(words)
    found = {language: sum(counts[word] for word in common) for language, common in _WORDS.items()}
    best = max(found, key=found.__getitem__)
    return best if found[best] else None
