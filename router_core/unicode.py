from __future__ import annotations

import re
import unicodedata
from typing import Final, Literal
from unicodedata import category

_PIECE = re.compile(r"\S{1,200}+|\s++")


def normalized(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Normalize `text` in pieces of at most 200 characters.

    The standard library sorts a run of combining marks by insertion: 20,000 of them take 0.4 s, a million 20 minutes.
    In pieces, a mark may stay apart from its letter where a run without white space is longer than that.
    """
    if text.isascii():
        return text
    return "".join(unicodedata.normalize(form, piece) for piece in _PIECE.findall(text))


_SEQUENCES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, erasing
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS…: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"
)

_LAYOUT: Final = frozenset("\n\t")

_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, invisible and direction-changing characters, half characters, separators of lines."""

_JOINERS: Final = frozenset("\u200c\u200d")
"""Within Persian words and emoji; they move nothing."""


def plain(text: str, *, lines: bool = True) -> str:
    """The text without control characters, escape sequences and characters that reorder what is around them.

    Args:
        lines: whether line ends and tabs stay; otherwise each becomes a blank.
    """
    if text.isprintable():
        return text
    shown = _SEQUENCES.sub("", text)
    return "".join(_seen(letter, lines) for letter in shown)


def _seen(letter: str, lines: bool) -> str:  # noqa: FBT001
    if letter in _LAYOUT:
        return letter if lines else " "
    if letter.isprintable() or letter in _JOINERS:
        return letter
    return "" if category(letter) in _UNSEEN else letter
