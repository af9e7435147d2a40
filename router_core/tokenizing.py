"""A BERT tokenizer with the ids of known words in front of it: the same ids, several times faster. No vectors."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from router_core.types import Indices
from router_core.word_pieces import word_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Packed = bytes
"""Ids as int64, one after the other: texts are put together of them without a look at each."""

MOST_WORDS = 16_384
"""Words of one generation; two are kept."""
NEW_CHARACTERS = 512
"""Of words that were not met before: to look them up takes about a microsecond a character."""
LONGEST_WORD = 32
"""Characters. Longer pieces are blobs, or scripts without spaces: they would fill the memory and not come again."""

# BERT splits at white space before it looks at words, so that a word has its ids whatever stands beside it. Control
# characters are no boundary: it removes them and joins what they kept apart, where str.split() would cut.
_PARTS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
"""Of a piece of printable ASCII: every mark of punctuation stands alone."""
_PLAIN_ASCII = re.compile(r"[\t\n\r -~]*")


class WordTokenizer:
    """Vocabulary ids of texts. Used from several threads: a lost update only costs a look-up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: of BERT's normalizer and pre-tokenizer, without truncation or padding."""
        self._tokenizer = tokenizer
        self._special = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._pieces_of = word_pieces(tokenizer)
        self._young: dict[str, Packed] = {}
        self._old: dict[str, Packed] = {}

    def ids(self, text: str) -> list[int]:
        """Those of the tokenizer itself, special tokens not added."""
        found: list[int] = self.indices(text).tolist()
        return found

    def indices(self, text: str) -> Indices:
        """The same, to index arrays with."""
        found = self._found(text)
        if found is None:
            return self._encoded(text)
        pieces, packed = found
        return np.frombuffer(b"".join(self._completed(pieces, packed)), dtype=np.int64)

    def indices_at_hand(self, text: str) -> Indices | None:
        """The same. None: more of the text than NEW_CHARACTERS would have to be looked up, which takes longer."""
        found = self._found(text)
        if found is None:
            return None
        pieces, packed = found
        if None in packed and _new_characters(pieces, packed) > NEW_CHARACTERS:
            return None
        return np.frombuffer(b"".join(self._completed(pieces, packed)), dtype=np.int64)

    def _found(self, text: str) -> tuple[Sequence[str], list[Packed | None]] | None:
        """Its pieces, and the ids of those that are remembered. None where it holds a special token: these are taken
        out of a text before anything is split."""
        if "[" in text and any(token in text for token in self._special):
            return None
        pieces = _pieces(text)
        return pieces, list(map(self._young.get, pieces))

    def _completed(self, pieces: Sequence[str], packed: list[Packed | None]) -> list[Packed]:
        if None in packed:
            for place, ids in enumerate(packed):
                if ids is None:
                    packed[place] = self._met(pieces[place])
        return packed  # type: ignore[return-value]  # nothing is missing any more

    def _met(self, piece: str) -> Packed:
        """Of a piece that is not among the young: it is from now on."""
        ids = self._old.get(piece)
        if ids is None:
            ids = self._looked_up(piece)
        if len(piece) <= LONGEST_WORD:
            self._young[piece] = ids
            if len(self._young) > MOST_WORDS:
                self._old, self._young = self._young, {}
        return ids

    def _looked_up(self, piece: str) -> Packed:
        """A plain word is cut here, a piece of printable ASCII at its marks; the tokenizer is asked of the rest."""
        if self._pieces_of is not None and piece.isascii():
            if piece.isalnum():
                return array("q", self._pieces_of(piece)).tobytes()
            if len(piece) > 1 and piece.isprintable():
                return b"".join(self._young.get(part) or self._met(part) for part in _PARTS.findall(piece))
        return array("q", self._asked(piece)).tobytes()

    def _asked(self, piece: str) -> list[int]:
        encoded = self._tokenizer.encode([piece], is_pretokenized=True, add_special_tokens=False)
        return [token for token, place in zip(encoded.ids, encoded.word_ids, strict=True) if place is not None]

    def _encoded(self, text: str) -> Indices:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _new_characters(pieces: Sequence[str], packed: Sequence[Packed | None]) -> int:
    return sum(len(piece) for piece, ids in zip(pieces, packed, strict=True) if ids is None)


def _pieces(text: str) -> list[str]:
    """What BERT would look at apart from everything around it, or more than that together."""
    if text.isascii() and (text.isprintable() or _PLAIN_ASCII.fullmatch(text)):
        return text.split()
    for space in "\t\n\r":
        text = text.replace(space, " ")
    return list(filter(None, text.split(" ")))
