"""A BERT tokenizer with the ids of known words in front of it: the same ids, several times faster. No vectors."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from router_core.types import Indices
from router_core.word_pieces import Packed, word_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_WORDS = 16_384
"""Words of one generation; two are kept."""
MOST_MET_ONCE = 8_192
"""Words that have still to come again."""
NEW_CHARACTERS = 512
"""Of words that are not remembered: to look them up takes about a microsecond a character."""
LONGEST_WORD = 32
"""Characters. Longer pieces are blobs, or scripts without spaces: they would fill the memory and not come again."""

# BERT splits at white space before it looks at words, so that a word has its ids whatever stands beside it. Control
# characters are no boundary: it removes them and joins what they kept apart, where str.split() would cut.
_PARTS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
"""Of a piece of printable ASCII: every mark of punctuation stands alone."""
_PLAIN_ASCII = re.compile(r"[\t\n\r -~]*")
_ALONE = "\u3400-\u4dbf\u4e00-\u9fff、。,?!:;“”‘’《》()「」『』"
"""Ideographs, and marks that stand among them: BERT sets each apart, and so a sentence without spaces has words."""
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_WITH_IDEOGRAPHS = re.compile(f"[{_ALONE}]|[^ \t\n\r{_ALONE}]+")


class WordTokenizer:
    """Vocabulary ids of texts. Used from several threads: a lost update only costs a look-up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: of BERT's normalizer and pre-tokenizer, without truncation or padding."""
        self._tokenizer = tokenizer
        self._special = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._pieces_of = word_pieces(tokenizer)
        self._young: dict[str, Packed] = {}
        self._old: dict[str, Packed] = {}
        self._once: dict[str, Packed] = {}
        """Most words that are new never come again, and would push out those that do."""

    def ids(self, text: str) -> list[int]:
        """Those of the tokenizer itself, special tokens not added."""
        found: list[int] = self.indices(text).tolist()
        return found

    def indices(self, text: str) -> Indices:
        """The same, to index arrays with."""
        found = self._found(text)
        return self._encoded(text) if found is None else self._joined(found)

    def indices_at_hand(self, text: str) -> Indices | None:
        """The same. None: more of the text than NEW_CHARACTERS would have to be looked up, which takes longer."""
        found = self._found(text)
        if found is None or found.new_characters > NEW_CHARACTERS:
            return None
        return self._joined(found)

    def _found(self, text: str) -> _Found | None:
        """None where it holds a special token: these are taken out of a text before anything is split."""
        if "[" in text and any(token in text for token in self._special):
            return None
        pieces = _pieces(text)
        packed = list(map(self._young.get, pieces))
        if None not in packed:
            return _Found(pieces, packed)
        missing = [place for place, ids in enumerate(packed) if ids is None]
        old, new = self._old, []
        for place in missing:
            packed[place] = ids = old.get(pieces[place])
            if ids is None:
                new.append(place)
            else:
                self._remember(pieces[place], ids)
        return _Found(pieces, packed, new)

    def _joined(self, found: _Found) -> Indices:
        pieces, packed = found.pieces, found.packed
        for place in found.new:
            packed[place] = self._met(pieces[place])
        return np.frombuffer(b"".join(packed), dtype=np.int64)  # type: ignore[arg-type]  # nothing is missing any more

    def _met(self, piece: str) -> Packed:
        """Of a piece that is not remembered. It is from the second time on."""
        ids = self._once.pop(piece, None)
        if ids is not None:
            self._remember(piece, ids)
            return ids
        ids = self._looked_up(piece)
        if len(piece) <= LONGEST_WORD:
            self._once[piece] = ids
            if len(self._once) > MOST_MET_ONCE:
                self._once = {}
        return ids

    def _remember(self, piece: str, ids: Packed) -> None:
        self._young[piece] = ids
        if len(self._young) > MOST_WORDS:
            self._old, self._young = self._young, {}

    def _looked_up(self, piece: str) -> Packed:
        """A plain word is cut here, a piece of printable ASCII at its marks; the tokenizer is asked of the rest."""
        if self._pieces_of is not None and piece.isascii():
            if piece.isalnum():
                return self._pieces_of(piece)
            if len(piece) > 1 and piece.isprintable():
                young, old = self._young, self._old
                return b"".join([young.get(part) or old.get(part) or self._met(part) for part in _PARTS.findall(piece)])
        return array("q", self._asked(piece)).tobytes()

    def _asked(self, piece: str) -> list[int]:
        encoded = self._tokenizer.encode([piece], is_pretokenized=True, add_special_tokens=False)
        return [token for token, place in zip(encoded.ids, encoded.word_ids, strict=True) if place is not None]

    def _encoded(self, text: str) -> Indices:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


@dataclass(slots=True)
class _Found:
    """Pieces of a text, and the ids of those that are remembered."""

    pieces: list[str]
    packed: list[Packed | None]
    new: Sequence[int] = ()
    """Places of the others."""

    @property
    def new_characters(self) -> int:
        return sum([len(self.pieces[place]) for place in self.new])


def _pieces(text: str) -> list[str]:
    """What BERT would look at apart from everything around it, or more than that together."""
    if text.isascii() and (text.isprintable() or _PLAIN_ASCII.fullmatch(text)):
        return text.split()
    if _IDEOGRAPH.search(text):
        return _WITH_IDEOGRAPHS.findall(text)
    for space in "\t\n\r":
        text = text.replace(space, " ")
    return list(filter(None, text.split(" ")))
