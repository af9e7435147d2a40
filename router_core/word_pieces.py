"""BERT's WordPiece for one plain word: the longest known beginning, again and again. What is no such word is not ours.

Asking the tokenizer takes twice as long, and more often than not a prompt has some word that was never met before: a
name, a number, a slip of the keyboard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PiecesOf = Callable[[str], list[int]]
"""A word of ASCII letters and digits → its ids."""


def word_pieces(tokenizer: Tokenizer) -> PiecesOf | None:
    """None where the tokenizer is no uncased WordPiece, so that it has to be asked."""
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    model, normalizer = described["model"], described["normalizer"] or {}
    lowers = normalizer.get("type") == "BertNormalizer" and normalizer.get("lowercase")
    if (
        model.get("type") != "WordPiece"
        or not lowers
        or (described["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer"
    ):
        return None
    prefix: str = model["continuing_subword_prefix"]
    vocabulary: dict[str, int] = model["vocab"]
    beginnings = {word: token for word, token in vocabulary.items() if not word.startswith(prefix)}
    endings = {word.removeprefix(prefix): token for word, token in vocabulary.items() if word.startswith(prefix)}
    unknown, most = [vocabulary[model["unk_token"]]], int(model["max_input_chars_per_word"])
    reach = (_reach(beginnings), _reach(endings))

    def pieces_of(word: str) -> list[int]:
        if len(word) > most:
            return unknown
        word, found, start, known, longest = word.lower(), list[int](), 0, beginnings, reach[0]
        while start < len(word):
            end = start + longest.get(word[start : start + 2], 1)  # a slice may end behind its word
            while (token := known.get(word[start:end])) is None:
                end -= 1
                if end <= start:
                    return unknown
            found.append(token)
            start, known, longest = min(end, len(word)), endings, reach[1]
        return found

    return pieces_of


def _reach(vocabulary: Iterable[str]) -> dict[str, int]:
    """The first two characters → those of the longest entry that begins so: most look no further than that."""
    found = dict[str, int]()
    for word in vocabulary:
        found[word[:2]] = max(len(word), found.get(word[:2], 1))
    return found
