"""BERT's WordPiece for one plain word: the longest known beginning, again and again. What is no such word is not ours.

Asking the tokenizer takes twice as long, and more often than not a prompt has some word that was never met before: a
name, a number, a slip of the keyboard.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Packed = bytes
"""Ids as int64, one after the other: texts are put together of them without a look at each."""
PiecesOf = Callable[[str], Packed]
"""A word of ASCII letters and digits → its ids."""
_HEAD = 3
"""Characters that say how much further the longest entry that begins with them reaches: most words need no more."""
_SHORT = _HEAD - 1
"""Characters of the entries that names, numbers and slips of the keyboard fall into."""


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
    ids: dict[str, Packed] = {word: token.to_bytes(8, sys.byteorder) for word, token in model["vocab"].items()}
    unknown, most = ids[model["unk_token"]], int(model["max_input_chars_per_word"])
    beginnings = _Entries({word: packed for word, packed in ids.items() if not word.startswith(prefix)})
    endings = _Entries({word.removeprefix(prefix): packed for word, packed in ids.items() if word.startswith(prefix)})

    def pieces_of(word: str) -> Packed:
        size = len(word)
        if size > most:
            return unknown
        word, found, start, entries = word.lower(), list[Packed](), 0, beginnings
        while start < size:
            reach = entries.reach.get(word[start : start + _HEAD], _SHORT)
            known, end = entries.short if reach == _SHORT else entries.known, start + reach
            while (packed := known.get(word[start:end])) is None:  # a slice may end behind its word
                end -= 1
                if end <= start:
                    return unknown
            found.append(packed)
            start, entries = end, endings
        return b"".join(found)

    return pieces_of


class _Entries:
    """Of a vocabulary: those that begin a word, or those that go on with one."""

    def __init__(self, known: dict[str, Packed]) -> None:
        self.known = known
        self.short = {word: packed for word, packed in known.items() if len(word) <= _SHORT}
        """Few enough to stay in the processor's cache, where all of them together do not."""
        self.reach: dict[str, int] = {}
        """The first _HEAD characters of a longer entry → those of the longest one that begins so."""
        for word in known.keys() - self.short.keys():
            head = word[:_HEAD]
            self.reach[head] = max(len(word), self.reach.get(head, _HEAD))
