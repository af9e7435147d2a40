"""Texts to vocabulary ids: those of BERT's own tokenizer, from nanotoken, which splits a prompt in microseconds."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.errors import InvalidArtifact

MOST_WORDS = 8_192
"""Whose ids a thread remembers: about 2 MiB. So few that no choice of words can make looking one up slow."""
TEXTS_REMEMBERED = 4_096
"""The library forgets no word when its memory is full; after so many texts it begins again, with the words of today."""


class Tokenizer:
    """Used from several threads."""

    def __init__(self, description: Path) -> None:
        """`description`: a tokenizer.json of WordPiece; its truncation and padding are left out.

        Raises:
            InvalidArtifact: it is of another kind, damaged, or not there.
        """
        from nanotoken import WordPieceTokenizer, set_cache_entries

        set_cache_entries(MOST_WORDS)
        try:
            self._tokenizer = WordPieceTokenizer.from_json(description.read_bytes())
        except (OSError, ValueError) as error:
            folder = description.parent
            raise InvalidArtifact(f"{description} cannot be read: {error}; delete {folder}, it is made again") from None
        self._texts = count(1)

    def ids(self, text: bytes) -> NDArray[np.uint32]:
        """(n,), special tokens not added. `text` is UTF-8."""
        if next(self._texts) % TEXTS_REMEMBERED == 0:
            self._tokenizer.clear_cache()
        return self._tokenizer.encode(text, add_special_tokens=False)
