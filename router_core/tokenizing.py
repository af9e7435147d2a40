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

MOST_WORDS = 32_768
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
        if None in packed and sum(len(pieces[place]) for place in _missing(packed)) > NEW_CHARACTERS:
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
            places = _missing(packed)
            known = self._known([pieces[place] for place in places])
            for place in places:
                packed[place] = known[pieces[place]]
        return packed  # type: ignore[return-value]  # nothing is missing any more

    def _known(self, pieces: Sequence[str]) -> dict[str, Packed]:
        """Of every piece: remembered, put together from remembered parts, or asked of the tokenizer."""
        known = dict[str, Packed]()
        parts_of = dict[str, list[str]]()
        for piece in pieces:
            ids = self._remembered(piece)
            if ids is not None:
                known[piece] = ids
            elif self._pieces_of and piece.isascii() and piece.isalnum():
                known[piece] = array("q", self._pieces_of(piece)).tobytes()
                self._remember(piece, known[piece])
            else:
                parts_of[piece] = _PARTS.findall(piece) if piece.isascii() and piece.isprintable() else [piece]
        of_parts = self._learned(list({part for parts in parts_of.values() for part in parts}))
        for piece, parts in parts_of.items():
            known[piece] = b"".join(map(of_parts.__getitem__, parts))
            self._remember(piece, known[piece])
        return known

    def _learned(self, parts: Sequence[str]) -> dict[str, Packed]:
        known = {part: ids for part in parts if (ids := self._remembered(part)) is not None}
        missing = [part for part in parts if part not in known]
        if not missing:
            return known
        for part, tokens in self._looked_up(missing).items():
            known[part] = array("q", tokens).tobytes()
            self._remember(part, known[part])
        return known

    def _looked_up(self, parts: Sequence[str]) -> dict[str, list[int]]:
        found = {}
        if self._pieces_of:
            found = {part: self._pieces_of(part) for part in parts if part.isascii() and part.isalnum()}
        if others := [part for part in parts if part not in found]:
            found |= self._asked(others)
        return found

    def _asked(self, parts: Sequence[str]) -> dict[str, list[int]]:
        """What the tokenizer itself says."""
        encoded = self._tokenizer.encode(parts, is_pretokenized=True, add_special_tokens=False)
        found: list[list[int]] = [[] for _ in parts]
        for token, place in zip(encoded.ids, encoded.word_ids, strict=True):
            if place is not None:  # as it would be for a special token; none is added
                found[place].append(token)
        return dict(zip(parts, found, strict=True))

    def _remembered(self, piece: str) -> Packed | None:
        ids = self._young.get(piece)
        if ids is None and (ids := self._old.get(piece)) is not None:
            self._young[piece] = ids
        return ids

    def _remember(self, piece: str, ids: Packed) -> None:
        if len(piece) > LONGEST_WORD:
            return
        self._young[piece] = ids
        if len(self._young) > MOST_WORDS:
            self._old, self._young = self._young, {}

    def _encoded(self, text: str) -> Indices:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _missing(packed: Sequence[Packed | None]) -> list[int]:
    return [place for place, ids in enumerate(packed) if ids is None]


def _pieces(text: str) -> list[str]:
    """What BERT would look at apart from everything around it, or more than that together."""
    if text.isascii() and (text.isprintable() or _PLAIN_ASCII.fullmatch(text)):
        return text.split()
    for space in "\t\n\r":
        text = text.replace(space, " ")
    return list(filter(None, text.split(" ")))
