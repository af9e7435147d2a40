"""A BERT tokenizer with the ids of known words in front of it: the same ids, several times faster. No vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = tuple[int, ...]

MOST_WORDS = 32_768
"""Words of one generation; two are kept."""
LONGEST_WORD = 32
"""Characters. Longer pieces are blobs, or scripts without spaces: they would fill the memory and not come again."""

# BERT splits at white space before it looks at words, so that a word has its ids whatever stands beside it. Control
# characters are no boundary: it removes them and joins what they kept apart, where str.split() would cut.
_PARTS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
"""Of a piece of printable ASCII: every mark of punctuation stands alone."""
_PLAIN_ASCII = re.compile(r"[\t\n\r -~]*")
_SPACES = re.compile(r"[ \t\n\r]+")


class WordTokenizer:
    """Vocabulary ids of texts. Used from several threads: a lost update only costs a look-up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: of BERT's normalizer and pre-tokenizer, without truncation or padding."""
        self._tokenizer = tokenizer
        special = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self._special = re.compile("|".join(special) or r"(?!)")
        self._young: dict[str, Ids] = {}
        self._old: dict[str, Ids] = {}

    def ids(self, text: str) -> list[int]:
        """Those of the tokenizer itself, special tokens not added."""
        if "[" in text and self._special.search(text):  # taken out of the text before anything is split
            return self._encoded(text)
        pieces = _pieces(text)
        try:
            return list(chain.from_iterable(map(self._young.__getitem__, pieces)))
        except KeyError:
            known = self._known(pieces)
            return list(chain.from_iterable(map(known.__getitem__, pieces)))

    def _known(self, pieces: Sequence[str]) -> dict[str, Ids]:
        """Of every piece: remembered, put together from remembered parts, or asked of the tokenizer."""
        known = dict[str, Ids]()
        parts_of = dict[str, list[str]]()
        for piece in pieces:
            ids = self._remembered(piece)
            if ids is not None:
                known[piece] = ids
            else:
                parts_of[piece] = _PARTS.findall(piece) if piece.isascii() and piece.isprintable() else [piece]
        of_parts = self._learned(list({part for parts in parts_of.values() for part in parts}))
        for piece, parts in parts_of.items():
            known[piece] = tuple(chain.from_iterable(map(of_parts.__getitem__, parts)))
            self._remember(piece, known[piece])
        return known

    def _learned(self, parts: Sequence[str]) -> dict[str, Ids]:
        known = {part: ids for part in parts if (ids := self._remembered(part)) is not None}
        missing = [part for part in parts if part not in known]
        if not missing:
            return known
        encoded = self._tokenizer.encode(missing, is_pretokenized=True, add_special_tokens=False)
        learned: list[list[int]] = [[] for _ in missing]
        for token, place in zip(encoded.ids, encoded.word_ids, strict=True):
            if place is not None:  # as it would be for a special token; none is added
                learned[place].append(token)
        for part, ids in zip(missing, map(tuple, learned), strict=True):
            known[part] = ids
            self._remember(part, ids)
        return known

    def _remembered(self, piece: str) -> Ids | None:
        ids = self._young.get(piece)
        if ids is None and (ids := self._old.get(piece)) is not None:
            self._young[piece] = ids
        return ids

    def _remember(self, piece: str, ids: Ids) -> None:
        if len(piece) > LONGEST_WORD:
            return
        self._young[piece] = ids
        if len(self._young) > MOST_WORDS:
            self._old, self._young = self._young, {}

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _pieces(text: str) -> list[str]:
    """What BERT would look at apart from everything around it, or more than that together."""
    return text.split() if _PLAIN_ASCII.fullmatch(text) else [piece for piece in _SPACES.split(text) if piece]
