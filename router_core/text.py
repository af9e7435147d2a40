"""What routing and grading need of a text: its size in tokens, its ends, its normal form."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

BYTES_PER_TOKEN = 4

# Characters that `truncate_middle` keeps from each end.
MAX_END_CHARS = 2_000

_PIECE = re.compile(r"\S{1,200}+|\s++")


def text_bytes(text: str) -> int:
    """Count the UTF-8 bytes of `text`; a lone surrogate counts as one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of `text`: a quarter of its bytes, at least one."""
    return max(text_bytes(text) // BYTES_PER_TOKEN, 1)


def truncate_middle(text: str) -> str:
    """Keep the first and the last MAX_END_CHARS characters of a longer text, joined by a line break.

    Blanks around a long text are dropped first. Every text is truncated before it is embedded, when a map is fitted and
    when a request is routed, so that a prompt always has the same vector.
    """
    if len(text) <= 2 * MAX_END_CHARS:
        return text
    stripped = text.strip()
    if len(stripped) <= 2 * MAX_END_CHARS:
        return stripped
    return f"{stripped[:MAX_END_CHARS]}\n{stripped[-MAX_END_CHARS:]}"


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Normalize `text` in pieces of at most 200 characters, in linear time.

    The standard library sorts a run of combining marks by insertion: 20,000 of them take 0.4 s, a million 20 minutes.
    In pieces, a mark may stay apart from its letter where a run without white space is longer than that.
    """
    if text.isascii():
        return text
    return "".join(unicodedata.normalize(form, piece) for piece in _PIECE.findall(text))
